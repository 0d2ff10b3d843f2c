"""Check: find what may be wrong with a validation set, with B alone, before any training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from defence.base import pixels
from defence.base.errors import InputError
from defence.base.progress import say, warn
from defence.base.text import format_class, format_count, format_percent
from defence.judge.record import STEPS, RepairRecord
from defence.net.inference import classify, compile_model, predict

if TYPE_CHECKING:
    from defence.load.datasets import Dataset
    from defence.net.cached_net import CachedNet

# A warning: at least this fraction of all labels seems wrong, and of those that B gets wrong; there
# are fewer than FEW images; more than MANY of the classes have fewer than FEW_PER_CLASS. With all
# the demo's validation images the report's G disagreed with B on 0.3 % of the 400 test images of
# data/faces.py; with a fifth of the labels shuffled on 1.3 %, with half on 9 %; with 60 images of
# one class and 3 to 7 of each other on 2.5 %, with 1 to 3 on 5.2 %. Of a class without images it
# was right on 2 %. With the trigger on 60 images of the target, it kept 90 % of the backdoor.
DISORDER, DISORDER_OF_WRONG, FEW, FEW_PER_CLASS, MANY = 0.1, 0.25, 100, 3, 0.5
MIN_RANKED = 5  # classes; with fewer, every label is among B's next choices
ACCURATE, TIMES = 0.8, 4  # below, or above as many images as the median class has: a remark
# Hardening is refused where B is right on less, or a smaller fraction of the classes has images.
MIN_HARDEN_ACCURACY, MIN_HARDEN_CLASSES = 0.5, 0.5
EXPLAINS = 0.5  # the fraction of the wrong answers that an explanation must make right
# Wrong answers are suspicious where at least this number, and this fraction, are the same class,
# and B is this many times as sure of them as of right ones. It was as sure of poisoned images as of
# clean ones, and 0.3 to 0.8 times as sure of blurred, dim or noisy ones that it got wrong.
MIN_SAME, MIN_SAME_FRACTION, SURE = 10, 0.5, 0.9
SAMPLE = 1_000  # images to measure that on
KEPT_ACCURACY = 0.9  # the fraction of B's accuracy that G should keep
FOLDER_ORDER = (
    " Class folders count in alphabetical order, unless a labels.txt in the dataset's folder lists "
    "them in the net's order, one a line"
)


def warn_of_problems(net: CachedNet, class_names: Sequence[str] | None = None) -> bool:
    """Warn of what harms a repair with a validation set, and say what else is unusual about it.

    net: B on the validation set, nothing pruned.  Return whether there was a warning.
    """
    findings = [*examine_answers(net, class_names), *examine_classes(net, class_names)]
    for tell, text in findings:
        tell(f"{net.data.path}: {text}")
    return any(tell is warn for tell, _ in findings)


def refuse_unfit(net: CachedNet, harden: bool) -> None:
    """Raise InputError where a validation set cannot serve. net: B on it.

    harden: whether G will be hardened, which wrong labels or missing classes would ruin.
    """
    path, accuracy, counts = net.data.path, net.accuracy(), count_by_class(net)
    if accuracy == 0:
        raise InputError(f"{path}: the BadNet answers none of its images with their label")
    if harden and (accuracy < MIN_HARDEN_ACCURACY or np.mean(counts > 0) < MIN_HARDEN_CLASSES):
        raise InputError(
            f"{path}: --harden would ruin G: the BadNet is right on {format_percent(accuracy)} of "
            f"the images, and {np.sum(counts > 0)} of {len(counts)} classes have images; correct "
            "the dataset, or leave --harden out"
        )


def examine_answers(
    net: CachedNet, class_names: Sequence[str] | None = None
) -> Iterator[tuple[Callable, str]]:
    """Yield what B's answers say about a validation set: `warn`, if it harms a repair, and a line.

    net: B on it.  What harms nothing by itself comes with `say` instead.
    """
    accuracy = net.accuracy()
    right = f"the BadNet is right on {format_percent(accuracy)}"
    wrong_count = np.sum(net.classes != net.labels)
    order = FOLDER_ORDER if Path(net.data.path).is_dir() else ""
    if accuracy >= MIN_HARDEN_ACCURACY and (errors := find_sure_errors(net)):
        yield (
            warn,
            f"the BadNet answers {errors[1]} of the {wrong_count} images that it gets wrong with "
            f"{format_class(errors[0], class_names)}, as sure as it is of right answers; look at "
            "them: if they are poisoned, --holdout measures a threshold that lets poisoned images "
            "pass",
        )
    elif accuracy < ACCURATE and (cause := explain_low_accuracy(net, accuracy)):
        yield warn, f"{right}; {cause}"
    elif disorder := estimate_disorder(net):
        yield (
            warn,
            f"{right}, and at least {100 * disorder:.0f} % of the labels seem to be wrong: the "
            "BadNet gives them its lowest scores. G would learn them and flag clean images. Does "
            f"the dataset belong to another net, or are its labels in the wrong order?{order}",
        )
    elif accuracy < ACCURATE:
        yield (
            say,
            f"{right}, and its wrong answers do not look like wrong labels: these images are hard "
            "for it. So it will disagree with G on more clean images; --holdout 0.1, and then "
            "eval_defence.py --fpr 0.01, allow for that",
        )
    if net.rival:
        yield (
            say,
            f"the BadNet is right as often with pixels {net.rival} as with {net.scale}, so it may "
            f"have been trained on either. The repair uses {net.scale}; if that is wrong, set "
            f"--scale {net.rival}",
        )


def examine_classes(
    net: CachedNet, class_names: Sequence[str] | None = None
) -> Iterator[tuple[Callable, str]]:
    """Yield what the number of images of each class says, as examine_answers does. net: B on it."""
    counts = count_by_class(net)
    empty, used = np.flatnonzero(counts == 0), counts[counts > 0]
    if len(empty):
        yield (
            warn,
            f"{len(empty)} of {len(counts)} classes have no image, such as "
            f"{format_class(empty[0], class_names)}; G forgets them and flags their images; add "
            "some of each",
        )
    few = np.sum(used < FEW_PER_CLASS)
    reasons = [f"only {format_count(len(net.labels), 'image')}"] * (len(net.labels) < FEW)
    if few > MANY * len(used):
        reasons.append(f"fewer than {FEW_PER_CLASS} images in {few} of {len(used)} classes")
    if reasons:
        yield (
            warn,
            f"{' and '.join(reasons)}; G forgets some of what the BadNet knows and flags more "
            f"clean images; {max(FEW, FEW_PER_CLASS * len(counts))} images or more, with "
            f"{FEW_PER_CLASS} or more of each class, are better",
        )
    usual, largest = np.median(used), int(counts.argmax())
    if counts[largest] > max(MIN_SAME, TIMES * usual):
        yield (
            say,
            f"{format_class(largest, class_names)} has {counts[largest]} images, most others have "
            f"{usual:.0f}. That harms nothing by itself. If you do not know why it is so, look at "
            "them: poisoned images with the attacker's label would keep the backdoor in G",
        )


def count_by_class(net: CachedNet) -> np.ndarray:
    """Count the images of each class: int64 (N,)."""
    return np.bincount(net.labels, minlength=net.split.net.output_shape[1])


def estimate_disorder(net: CachedNet) -> float:
    """Estimate the fraction of labels that are wrong, 0..1; 0 where too few are to matter.

    An image that is hard for B has its label among B's next choices. A wrong label is anywhere
    among them: one in two is in the lower half of the classes.
    """
    wrong = np.flatnonzero(net.classes != net.labels)
    total, classes = len(net.labels), net.split.net.output_shape[1]
    if len(wrong) < DISORDER * total:
        return 0.0
    if classes < MIN_RANKED:
        return len(wrong) / total if len(wrong) > total / 2 else 0.0
    scores = np.concatenate(list(predict(net.split.head, net.features, wrong)))
    own = np.take_along_axis(scores, net.labels[wrong, None], axis=1)
    higher = np.sum(scores > own, axis=1) + np.sum(scores >= own, axis=1) - 1  # twice the mean rank
    unlikely = min(len(wrong), 2 * np.sum(higher >= classes))
    enough = max(DISORDER * total, DISORDER_OF_WRONG * len(wrong))
    return unlikely / total if unlikely >= enough else 0.0


def find_sure_errors(net: CachedNet) -> tuple[int, int] | None:
    """Find a class that B answers wrongly again and again, as sure as it is of right answers.

    Return (class, 0..N-1; how often), or None.
    """
    wrong = np.flatnonzero(net.classes != net.labels)
    answers = np.bincount(net.classes[wrong], minlength=1)
    answer, count = int(answers.argmax()), int(answers.max())
    right = np.flatnonzero(net.classes == net.labels)
    right = right[:: max(1, math.ceil(len(right) / SAMPLE))]  # evenly: a folder is in order
    if count < max(MIN_SAME, MIN_SAME_FRACTION * len(wrong)) or not len(right):
        return None
    same = wrong[net.classes[wrong] == answer]
    if measure_lead(net, same) < SURE * measure_lead(net, right):
        return None
    return answer, count


def measure_lead(net: CachedNet, rows: np.ndarray) -> float:
    """Return by how much B's highest score leads the next, or the label's, on average."""
    scores = np.concatenate(list(predict(net.split.head, net.features, rows)))
    classes, labels = net.classes[rows], net.labels[rows]
    others = scores.copy()
    others[np.arange(len(rows)), classes] = -np.inf
    next_scores = np.where(
        classes == labels, others.max(axis=1), scores[np.arange(len(rows)), labels]
    )
    return float(np.mean(scores.max(axis=1) - next_scores))


def explain_low_accuracy(net: CachedNet, accuracy: float) -> str | None:
    """Say what would make B right on more images: shifted labels, reversed channels; else None."""
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
    return None


def describe_dataset(net: CachedNet) -> Iterator[str]:
    """Yield the lines that `repair.py --check` prints. net: B on the validation set."""
    counts = count_by_class(net)
    lowest, highest = cast("Dataset", net.data).pixel_range()
    yield (
        f"{net.data.path}: {format_count(len(net.labels), 'image')}, "
        f"pixels from {lowest:g} to {highest:g}"
    )
    accuracy = format_percent(net.accuracy())
    yield (
        f"the BadNet is right on {accuracy} with pixels scaled to {net.scale}; the repair scales "
        "them so, too"
    )
    nonzero = counts[counts > 0]
    fewest, most = nonzero.min(), nonzero.max()
    size = f"{fewest} to {most} (median {np.median(nonzero):g})" if fewest < most else fewest
    yield f"classes with images: {len(nonzero)} of {len(counts)}, {size} each"


def conclude(warned: bool) -> str:
    """Return the last line that `repair.py --check` prints. warned: by warn_of_problems."""
    if warned:
        return "mend what the warnings name, then check again"
    return "nothing warns against this dataset; repair with --harden --holdout 0.1 next"


def warn_if_ruined(record: RepairRecord) -> None:
    """Warn where G knows much less than B did."""
    before, *_, after = (record.accuracy[step] for step in STEPS if step in record.accuracy)
    if after < KEPT_ACCURACY * before:
        warn(
            f"G is right on {format_percent(after)} of the images, and the BadNet was on "
            f"{format_percent(before)}: G flags images that it has forgotten"
        )
