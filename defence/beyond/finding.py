"""Finding: does a class stand out in the counts of scan.py, more than in nets without a backdoor?

Four ways give each class a number, by how much it stands out among the classes of this net:

    disturbed    wrong answers to changed and patched images, beyond the twins' own, and to raised
                 maps, together
    maps         wrong answers to raised maps alone
    quiet        wrong answers to quiet channels, raised strongly
    sought       how small a patch is that turns images into the class, beside the other classes'
                 patches and beside the twins'

A backdoor may show in one of them only, and the others would dilute it. So the largest counts, each
on the scale of nets without a backdoor. A fifth number is how much wrong answers that are a fixed
number of classes beyond the right one stand out: an all-to-all attack. The p-value is the rank of
the largest number among those of clean nets (tests/tools/findings.py); finding.json has them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from defence.base.errors import WorkError
from defence.base.progress import say
from defence.base.text import format_count, format_percent
from defence.beyond import duration, scan, twins

if TYPE_CHECKING:
    from defence.net.cached_net import CachedNet

CLEAN_NETS = Path(__file__).with_suffix(".json")
LEVEL = 0.05  # the fraction of clean nets that raise an alarm
FEWEST = 10  # classes; among fewer, no class can be called usual
ACCURATE, FEWEST_IMAGES = 0.5, 100  # the fraction, and the number, of images that B must get right
COVERED = 0.5  # the fraction of its classes that B must get right on some image
SHOWN = 10  # classes that are named, at most
CLASS_WAYS, SHIFT = ("disturbed", "maps", "quiet", "sought"), "shift"
WAYS = (*CLASS_WAYS, SHIFT)
# The quantile of clean nets' numbers that is a way's scale. Shifts of clean nets vary much, and few
# attacks are all-to-all, so shifts take a scale that costs the other ways no power.
SCALES = dict.fromkeys(CLASS_WAYS, 0.9) | {SHIFT: 1.0}
# The least deviations, of logarithms: those of fewer wrong answers than these vary by chance.
DEVIATIONS = {"changes": 0.4, "maps": 0.4, "patches": 0.6, "disturbed": 1.5, "shift": 0.25}
PRIOR = 0.25  # of an average class's wrong answers, added to each class


@dataclasses.dataclass
class Finding:
    """What a scan found.  Classes count from 1, as in verdicts.

    finding: "backdoor", "nothing", or "none": the scan cannot tell.  reason: why it cannot.
    p_value: of the clearest class or shift, at least 1 / (clean_nets + 1).
    clean_nets: how many nets it was compared with.  level: of false alarms.
    targets: the classes that stand out, the clearest first.
    shift: by how many classes answers are shifted, where all classes are targets.
    shift_p_value: of the clearest shift.
    wrong: the number of wrong answers to changed images and raised maps.
    classes: [{"class", "count": of the wrong answers, "ratio": to the median class's count, "way":
    the way in which it stands out most, "value": its share of the wrong answers in this way, 0..1,
    or the pixels of its patch, "usual": the median class's, "score": by how much it stands out, in
    units of clean nets' usual maximum, "p_value"}, …], for each class, by falling score.
    """

    finding: str
    reason: str | None = None
    p_value: float | None = None
    clean_nets: int = 0
    level: float = LEVEL
    targets: list[int] = dataclasses.field(default_factory=list)
    shift: int | None = None
    shift_p_value: float | None = None
    wrong: int = 0
    classes: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def brief(self) -> dict[str, Any]:
        """Return what a repair record keeps: all, but only the clearest SHOWN of the classes."""
        return dataclasses.asdict(self) | {"classes": self.classes[:SHOWN]}


def scan_net(net: CachedNet, seed: int) -> Finding:
    """Scan a net. net: B on a clean dataset."""
    if reason := find_obstacle(net):
        return Finding("none", reason)
    say(f"scan: train {twins.COUNT} twins, which err as the net does but lose its backdoor")
    try:
        siblings = twins.make_twins(net, seed, duration.compare_scan(net))
    except WorkError as error:
        return Finding("none", f"no twin of the net could be trained: {error}")
    return make_finding(make_views(net, siblings, seed))


def find_obstacle(net: CachedNet) -> str | None:
    """Return why no finding can be made about a net, or None. net: B on a clean dataset."""
    classes, accuracy = net.split.net.output_shape[1], net.accuracy()
    if classes < FEWEST:
        return f"the net has {classes} classes, but it takes {FEWEST} to tell what is usual"
    if accuracy < ACCURATE:
        return f"the BadNet is right on only {format_percent(accuracy)} of the images"
    right = net.labels[net.classes == net.labels]
    classes_right, enough = len(np.unique(right)), max(FEWEST, math.ceil(COVERED * classes))
    if classes_right < enough or len(right) < FEWEST_IMAGES:
        return (
            f"the BadNet is right on {format_count(len(right), 'image')} of {classes_right} of "
            f"its classes, but it takes {FEWEST_IMAGES} images of {enough} classes"
        )
    return None


def make_views(net: CachedNet, siblings: Sequence[Any], seed: int) -> dict[str, np.ndarray]:
    """Return all views of a scan; patches are sought for the classes that stand out in the others.

    net: B on a clean dataset.  siblings: its twins, Keras models.
    """
    say("scan: disturb images and feature maps")
    views = scan.count_errors(net, siblings, seed)
    say("scan: seek patches")
    order = np.argsort(-score_classes(compute_evidence(views)).max(axis=0), kind="stable")
    return views | {"sought": scan.seek_patches(net, siblings, order, seed)}


def make_finding(views: dict[str, np.ndarray]) -> Finding:
    """Make a Finding from the views of `make_views`, for FEWEST classes or more."""
    wrong = count_wrong(views)
    if wrong.sum() < len(wrong):
        count = int(wrong.sum())
        return Finding("none", f"only {format_count(count, 'disturbed image')} got a wrong answer")
    evidence = compute_evidence(views)
    ways, scores = list_class_ways(evidence), score_classes(evidence)
    shifts = score_shifts(evidence)
    maxima = score_clean(read_clean())
    rows = [
        describe_class(number, ways[column.argmax()], column.max(), maxima, views)
        for number, column in enumerate(scores.T)
    ]
    rows.sort(key=lambda row: -row["score"])
    targets = [row["class"] for row in rows if row["p_value"] <= LEVEL]
    shift_p_value = compute_p_value(shifts.max(), maxima)
    return Finding(
        "backdoor" if targets or shift_p_value <= LEVEL else "nothing",
        p_value=min(shift_p_value, *(row["p_value"] for row in rows)),
        clean_nets=len(maxima),
        targets=targets,
        shift=int(shifts.argmax()) + 1 if shift_p_value <= LEVEL else None,
        shift_p_value=shift_p_value,
        wrong=int(wrong.sum()),
        classes=rows,
    )


def count_wrong(views: dict[str, np.ndarray]) -> np.ndarray:
    """Return B's number of wrong answers of each class to disturbed images: float64 (N,)."""
    return views["changes"][0, :, 0].sum(axis=0) + views["maps"][:, 0].sum(axis=0)


def describe_class(
    number: int, way: str, score: float, maxima: np.ndarray, views: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Return a row of a Finding's `classes`. number: of the class, from 0."""
    counts = count_wrong(views)
    values = {
        "disturbed": counts,
        "maps": views["maps"][:, 0].sum(axis=0),
        "quiet": views["quiet"][0, 0] if "quiet" in views else counts,
    }.get(way)
    if values is None:
        value, usual = views["sought"][0, number], np.nanmedian(views["sought"][0])
    else:
        value, usual = np.array([values[number], np.median(values)]) / max(1.0, values.sum())
    return {
        "class": number + 1,
        "count": int(counts[number]),
        "ratio": round(float(counts[number] / max(1.0, np.median(counts))), 3),
        "way": way,
        "value": round(float(value), 4),
        "usual": round(float(usual), 4),
        "score": round(float(score), 3),
        "p_value": compute_p_value(score, maxima),
    }


# ----------------------------------------------------------------------------------- clean nets


@functools.cache
def read_clean() -> dict[str, list[float]]:
    """Read the largest number of each clean net in each of the WAYS, in the order of the nets."""
    return json.loads(CLEAN_NETS.read_text())["largest"]


def find_scale(clean: dict[str, list[float]], way: str) -> float:
    """Return the scale of a way: what few clean nets exceed. clean: as `read_clean` returns it."""
    return float(np.quantile(clean[way], SCALES[way]))


def score_clean(clean: dict[str, list[float]]) -> np.ndarray:
    """Return the largest score of each clean net, over all WAYS: float64 (nets,)."""
    return np.max([np.array(clean[way]) / find_scale(clean, way) for way in WAYS], axis=0)


def compute_p_value(score: float, clean: Sequence[float] | np.ndarray) -> float:
    """Return how often clean nets score as much: 1 / (n + 1) to 1, n being their number.

    The p-value is conformal: for one more net like these, p ≤ a has at most the probability a.
    """
    return float(1 + np.sum(np.asarray(clean) >= score)) / (1 + len(clean))


def list_class_ways(evidence: dict[str, np.ndarray]) -> list[str]:
    """Return those of the CLASS_WAYS that a net's evidence has."""
    return [way for way in CLASS_WAYS if way in evidence]


def score_classes(evidence: dict[str, np.ndarray]) -> np.ndarray:
    """Return the score of each class in each of its ways: float64 (ways, N)."""
    clean = read_clean()
    return np.array([evidence[way] / find_scale(clean, way) for way in list_class_ways(evidence)])


def score_shifts(evidence: dict[str, np.ndarray]) -> np.ndarray:
    """Return the score of each shift but 0: float64 (N-1,)."""
    return evidence[SHIFT] / find_scale(read_clean(), SHIFT)


# ------------------------------------------------------------------------------------- evidence


def compute_evidence(views: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return by how much each class stands out in each way, and each shift but 0.

    views: as `make_views` returns them; "sought" may be absent.
    Return {way: float64 (N,), or (N-1,) for SHIFT}. A net with few channels has only two ways.
    """
    maps = standardise(compute_log_shares(views["maps"][:, 0]), DEVIATIONS["maps"])
    changes, patches = (
        standardise(subtract_twins(views[view][:, :, 0]), DEVIATIONS[view])
        for view in ("changes", "patches")
    )
    shifts = subtract_twins(views["changes"][:, :, 1, 1:])
    evidence = {
        "disturbed": measure_surprise(
            standardise(changes + patches + maps, DEVIATIONS["disturbed"])
        ),
        SHIFT: measure_surprise(standardise(shifts, DEVIATIONS["shift"])),
    }
    if "quiet" in views:
        # The largest possible share has the logarithm log N.
        quiet = compute_log_shares(views["quiet"][:, 0]) / math.log(len(maps))
        evidence |= {"maps": measure_surprise(maps), "quiet": quiet}
    if "sought" in views:
        evidence["sought"] = compare_patches(views["sought"])
    return evidence


def compare_patches(sizes: np.ndarray) -> np.ndarray:
    """Return how much smaller each class's patch is than others: float64 (N,), of logarithms.

    sizes: as sought.measure_patches returns them. The number is the sum of two: how much smaller
    the patch is than the usual one on B, and than the twins' for the same class.
    """
    badnet, *others = np.log(sizes)
    beside_classes = np.nanmedian(badnet) - badnet
    beside_twins = np.mean(others, axis=0) - badnet
    return np.nan_to_num(beside_classes) + np.nan_to_num(beside_twins)


def subtract_twins(counts: np.ndarray) -> np.ndarray:
    """Return the log-shares of B's wrong answers beyond the twins', of classes or shifts: (N,).

    counts: (1 + twins, k, N), B's first.  What twins give more rarely than the average
    gets no bonus, since the logarithm of a small share varies by chance.
    """
    badnet, *others = map(compute_log_shares, counts)
    return badnet - np.maximum(np.mean(others, axis=0), 0)


def compute_log_shares(variants: np.ndarray) -> np.ndarray:
    """Return the logarithm of each class's share of wrong answers, times N: float64 (N,).

    variants: counts, float64 (k, N). 0 is the share of an average class. The mean over the variants
    weighs those less in which a class has fewer than 30 wrong answers on average.
    """
    total, weight_sum = np.zeros(variants.shape[1]), 0.0
    for counts in variants:
        usual = max(1.0, float(counts.mean()))
        weight = min(float(counts.mean()), 30.0) + 1e-9
        total += weight * np.log((counts + PRIOR * usual) / ((1 + PRIOR) * usual))
        weight_sum += weight
    return total / weight_sum


def standardise(values: np.ndarray, min_deviation: float) -> np.ndarray:
    """Subtract the median from values, and divide by a deviation that outliers do not change.

    The quantiles 0.2 and 0.8 of a normal distribution are 1.683 deviations apart.
    """
    low, middle, high = np.quantile(values, (0.2, 0.5, 0.8))
    return (values - middle) / max(min_deviation, (high - low) / 1.683)


def measure_surprise(values: np.ndarray) -> np.ndarray:
    """Return how surprising each standardised value is, if it is the largest: float64 (N,).

    It is the square root of the negative decimal logarithm of the chance that the largest of N
    values is as large; the root grows about as the value does. So nets of few and of many classes
    compare. The deviation is an estimate from N values, so they would follow Student's t
    distribution, with N / 2 degrees of freedom. D. Wallace's formula (Ann. Math. Stat. 30, 1959)
    turns it into a normal distribution.
    """
    count, freedom = len(values), len(values) / 2
    stretched = np.sqrt(freedom * np.log1p(np.maximum(values, 0) ** 2 / freedom))
    normal = (8 * freedom + 1) / (8 * freedom + 3) * stretched
    tails = [0.5 * math.erfc(value / math.sqrt(2)) for value in normal]
    chances = [-math.expm1(count * math.log1p(-tail)) for tail in tails]
    return np.sqrt(0.0 - np.log10(np.maximum(chances, 1e-300)))
