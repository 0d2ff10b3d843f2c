"""Check: what can be told of a validation set, with B alone, before anything is trained on it."""

import numpy as np

from defence.base import pixels
from defence.base.errors import InputError
from defence.base.progress import warn
from defence.base.text import format_count, format_percent
from defence.judge.record import STEPS, RepairRecord
from defence.net.inference import classify, compile_model

# A set is warned of where B is right on less, a class has so many times as many images as others,
# or there are fewer images in all, or for each class.
ACCURATE, TIMES, FEW, FEW_EACH = 0.8, 4, 100, 3
# Hardening on a set is refused where B is right on less, or fewer of the classes have images.
HARDENABLE, COVERED = 0.5, 0.5
EXPLAINS = 0.5  # the part of the wrong answers that an explanation must make right
# Wrong answers are suspicious where so many, and so large a share of them, are one class.
ALIKE, MOST_OF_THEM = 10, 0.5
KEPT = 0.9  # the fraction of B's accuracy that G should keep


def warn_of_problems(net):
    """Say what may be wrong with a validation set. Returns whether anything is.

    net: the CachedNet of B on it.
    """
    found = list(find_problems(net))
    for line in found:
        warn(f"{net.data.path}: {line}")
    return bool(found)


def refuse_unfit(net, harden):
    """Raise InputError where a validation set cannot serve. net: as for `warn`.

    harden: whether G is to be hardened, which a set that teaches what is wrong would wreck.
    """
    path, accuracy, counts = net.data.path, net.accuracy(), count_images(net)
    if accuracy == 0:
        raise InputError(f"{path}: the BadNet answers none of its images with their label")
    if harden and (accuracy < HARDENABLE or np.mean(counts > 0) < COVERED):
        raise InputError(
            f"{path}: --harden would teach G what is wrong here: the BadNet is right on "
            f"{format_percent(accuracy)}, and {np.sum(counts > 0)} of {len(counts)} classes have images"
        )


def find_problems(net):
    """Yield what may be wrong with a validation set, a line each. net: as for `warn`."""
    accuracy, counts = net.accuracy(), count_images(net)
    if accuracy < ACCURATE:
        yield f"the BadNet is right on only {format_percent(accuracy)}; {explain_low_accuracy(net, accuracy)}"
    if net.rival:
        yield (
            f"it does not tell whether the net takes pixels {net.scale} or {net.rival}; "
            f"{net.scale} are taken, unless --scale says otherwise"
        )
    absent = np.flatnonzero(counts == 0)
    if len(absent):
        yield (
            f"classes without an image: {len(absent)} of {len(counts)}, such as label {absent[0]}; "
            "what the BadNet knows of them may get lost"
        )
    usual, most = np.median(counts[counts > 0]), counts.argmax()
    if counts[most] > TIMES * usual:
        yield (
            f"label {most} has {counts[most]} images, most others {usual:.0f}; so it looks where "
            "poisoned images are among them, labelled with the attacker's class"
        )
    wrong = np.flatnonzero(net.classes != net.labels)
    answers = np.bincount(net.classes[wrong], minlength=len(counts))
    if answers.max() >= max(ALIKE, MOST_OF_THEM * len(wrong)):
        yield (
            f"of the {len(wrong)} images that the BadNet gets wrong it answers {answers.max()} "
            f"with label {answers.argmax()}; look at them: poisoned images have that in common"
        )
    if len(net.labels) < max(FEW, FEW_EACH * len(counts)):
        yield (
            f"only {format_count(len(net.labels), 'image')} for {len(counts)} classes; "
            f"{max(FEW, FEW_EACH * len(counts))} or more are better"
        )


def count_images(net):
    """How many images each class has: int64 (N,)."""
    return np.bincount(net.labels, minlength=net.split.net.output_shape[1])


def explain_low_accuracy(net, accuracy):
    """What would make B right on more of a set: labels that are shifted, channels in disorder."""
    shifts = {-1: "labels seem to count from 1; subtract 1", 1: "labels seem one too low; add 1"}
    enough = accuracy + EXPLAINS * (1 - accuracy)
    for shift, meaning in shifts.items():
        if np.mean(net.classes == net.labels + shift) > enough:
            return meaning
    x, y = next(net.data.batches())
    for scale in pixels.SCALES if x.shape[-1] == 3 else ():
        features = np.asarray(
            compile_model(net.split.trunk)(pixels.scale_pixels(x[..., ::-1], scale))[0]
        )
        right = np.mean(classify(net.split.head, features) == y)
        if right > enough:
            return f"its pixels seem to be BGR, not RGB: so turned it is right on {format_percent(right)}"
    return "is it another net's set, or are its labels in disorder?"


def describe_dataset(net):
    """Yield the lines that `repair.py --check` prints. net: as for `warn`."""
    counts = count_images(net)
    lowest, highest = net.data.pixel_range()
    yield (
        f"{net.data.path}: {format_count(len(net.labels), 'image')}, pixels {lowest:g} to {highest:g}; "
        f"the BadNet takes {net.scale}"
    )
    yield f"the BadNet is right on {format_percent(net.accuracy())}"
    some = counts[counts > 0]
    least, most = some.min(), some.max()
    each = f"{least} to {most}, in the median {np.median(some):g}," if least < most else least
    yield f"classes with images: {len(some)} of {len(counts)}, {each} each"


def warn_if_ruined(record: RepairRecord) -> None:
    """Warn where G knows much less than B did."""
    before, *_, after = (record.accuracy[step] for step in STEPS if step in record.accuracy)
    if after < KEPT * before:
        warn(
            f"G is right on {format_percent(after)} of the images, the BadNet was on "
            f"{format_percent(before)}: G flags what it has forgotten"
        )
