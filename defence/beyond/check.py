"""Check: find what may be wrong with a validation set, with B alone, before any training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from defence.base import pixels
from defence.base.errors import InputError
from defence.base.progress import warn
from defence.base.text import format_class, format_count, format_percent
from defence.judge.record import STEPS, RepairRecord
from defence.net.inference import classify, compile_model

if TYPE_CHECKING:
    from defence.load.datasets import Dataset
    from defence.net.cached_net import CachedNet

# find_problems warns where B is right on less than ACCURATE, a class has more than TIMES the median
# class's images, or there are fewer than FEW images, or than FEW_PER_CLASS for each class.
ACCURATE, TIMES, FEW, FEW_PER_CLASS = 0.8, 4, 100, 3
# Hardening is refused where B is right on less, or a smaller fraction of the classes has images.
MIN_HARDEN_ACCURACY, MIN_HARDEN_CLASSES = 0.5, 0.5
EXPLAINS = 0.5  # the fraction of the wrong answers that an explanation must make right
# Wrong answers are suspicious where at least this number, and this fraction, are the same class.
MIN_SAME, MIN_SAME_FRACTION = 10, 0.5
KEPT_ACCURACY = 0.9  # the fraction of B's accuracy that G should keep


def warn_of_problems(net: CachedNet, class_names: Sequence[str] | None = None) -> bool:
    """Warn of what may be wrong with a validation set. Return whether anything is.

    net: B on the validation set.
    """
    problems = list(find_problems(net, class_names))
    for problem in problems:
        warn(f"{net.data.path}: {problem}")
    return bool(problems)


def refuse_unfit(net: CachedNet, harden: bool) -> None:
    """Raise InputError where a validation set cannot serve. net: B on it.

    harden: whether G will be hardened, which wrong labels or missing classes would ruin.
    """
    path, accuracy, counts = net.data.path, net.accuracy(), count_images(net)
    if accuracy == 0:
        raise InputError(f"{path}: the BadNet answers none of its images with their label")
    if harden and (accuracy < MIN_HARDEN_ACCURACY or np.mean(counts > 0) < MIN_HARDEN_CLASSES):
        raise InputError(
            f"{path}: --harden would ruin G: the BadNet is right on {format_percent(accuracy)} of "
            f"the images, and {np.sum(counts > 0)} of {len(counts)} classes have images; correct "
            "the dataset, or leave --harden out"
        )


def find_problems(net: CachedNet, class_names: Sequence[str] | None = None) -> Iterator[str]:
    """Yield what may be wrong with a validation set, a line each. net: B on it."""
    accuracy, counts = net.accuracy(), count_images(net)
    if accuracy < ACCURATE:
        cause = explain_low_accuracy(net, accuracy)
        yield f"the BadNet is right on only {format_percent(accuracy)}; {cause}"
    if net.rival:
        yield (
            f"its images do not tell whether the net takes pixels {net.scale} or {net.rival}; "
            f"using {net.scale}, unless --scale says otherwise"
        )
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        yield (
            f"{len(empty)} of {len(counts)} classes have no image, such as "
            f"{format_class(empty[0], class_names)}; G may forget them"
        )
    usual, largest = np.median(counts[counts > 0]), counts.argmax()
    if counts[largest] > TIMES * usual:
        yield (
            f"{format_class(largest, class_names)} has {counts[largest]} images, most others "
            f"have {usual:.0f}, as if poisoned images carried the attacker's label"
        )
    wrong = np.flatnonzero(net.classes != net.labels)
    answers = np.bincount(net.classes[wrong], minlength=len(counts))
    if answers.max() >= max(MIN_SAME, MIN_SAME_FRACTION * len(wrong)):
        yield (
            f"the BadNet gets {len(wrong)} images wrong and answers {answers.max()} of them with "
            f"{format_class(answers.argmax(), class_names)}; look at them: they may be poisoned"
        )
    enough = max(FEW, FEW_PER_CLASS * len(counts))
    if len(net.labels) < enough:
        yield (
            f"only {format_count(len(net.labels), 'image')} for {len(counts)} classes; "
            f"{enough} or more are better"
        )


def count_images(net: CachedNet) -> np.ndarray:
    """Count the images of each class: int64 (N,)."""
    return np.bincount(net.labels, minlength=net.split.net.output_shape[1])


def explain_low_accuracy(net: CachedNet, accuracy: float) -> str:
    """Say what would make B right on more images: shifted labels, or reversed channels."""
    shifts = {-1: "labels seem to count from 1; subtract 1", 1: "labels seem one too low; add 1"}
    enough = accuracy + EXPLAINS * (1 - accuracy)
    for shift, meaning in shifts.items():
        if np.mean(net.classes == net.labels + shift) > enough:
            return meaning
    x, rows = next(net.data.spread_batches())
    trunk = compile_model(net.split.trunk)
    for scale in pixels.SCALES if x.shape[-1] == 3 else ():
        features = np.asarray(trunk(pixels.scale_pixels(x[..., ::-1], scale))[0])
        right = np.mean(classify(net.split.head, features) == net.labels[rows])
        if right > enough:
            return (
                "its pixels seem to be BGR, not RGB: with reversed channels the BadNet is right "
                f"on {format_percent(right)} of {format_count(len(rows), 'image')}, taken evenly"
            )
    return "does the dataset belong to another net, or are its labels in the wrong order?"


def describe_dataset(net: CachedNet) -> Iterator[str]:
    """Yield the lines that `repair.py --check` prints. net: B on the validation set."""
    counts = count_images(net)
    lowest, highest = cast("Dataset", net.data).pixel_range()
    yield (
        f"{net.data.path}: {format_count(len(net.labels), 'image')}, "
        f"pixels {lowest:g} to {highest:g}; the BadNet takes {net.scale}"
    )
    yield f"the BadNet is right on {format_percent(net.accuracy())}"
    nonzero = counts[counts > 0]
    fewest, most = nonzero.min(), nonzero.max()
    size = f"{fewest} to {most} (median {np.median(nonzero):g})" if fewest < most else fewest
    yield f"classes with images: {len(nonzero)} of {len(counts)}, {size} each"


def warn_if_ruined(record: RepairRecord) -> None:
    """Warn where G knows much less than B did."""
    before, *_, after = (record.accuracy[step] for step in STEPS if step in record.accuracy)
    if after < KEPT_ACCURACY * before:
        warn(
            f"G is right on {format_percent(after)} of the images, and the BadNet was on "
            f"{format_percent(before)}: G flags images that it has forgotten"
        )
