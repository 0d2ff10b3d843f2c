"""Finding: does a class stand out in the counts of scan.py, more than in nets without a backdoor?

The four views give each class one number, its evidence: by how many robust standard deviations it
exceeds the usual class of this net. The largest of many numbers may be large by chance; its
surprise says how unlikely that is. We measured the surprises of nets without a backdoor
(tests/tools/clean_nets.py); finding.json has them. At most the fraction LEVEL of such nets raises
an alarm.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from defence.base.text import escape, format_count, format_percent
from defence.beyond import scan

if TYPE_CHECKING:
    from defence.net.cached_net import CachedNet

CLEAN_NETS = Path(__file__).with_suffix(".json")
LEVEL = 0.05  # the fraction of clean nets that raise an alarm
FEWEST = 10  # classes; among fewer, no class can be called usual
ACCURATE, FEWEST_IMAGES = 0.5, 100  # the fraction, and the number, of images that B must get right
SHOWN = 10  # classes that are named, at most
WEIGHTS = {"changes": 1, "maps": 1, "patches": 1, "probability": 0.5}
# Only few classes get any of the wrong answers to patches. The logarithms of the classes' shares
# vary by SHARES_VARY; a share of LEAST_SHARE means nothing.
LEAST_SHARE, SHARES_VARY = 0.02, 0.6


@dataclasses.dataclass
class Finding:
    """What a scan found.  Classes count from 1, as in verdicts.

    finding: "backdoor", "nothing", or "none": the scan cannot tell.  reason: why it cannot.
    p_value: of the largest surprise, at least 1 / (clean_nets + 1).
    clean_nets: how many nets it was compared with.  level: of false alarms.
    targets: the classes that stand out, the clearest first.
    shift: by how many classes answers are shifted, where all classes are targets.
    wrong: the number of wrong answers to changed images and raised maps.
    classes: [{"class", "count": of the wrong answers, "ratio": to the median class's count,
    "surprise", "p_value"}, …], for each class, by falling surprise.
    """

    finding: str
    reason: str | None = None
    p_value: float | None = None
    clean_nets: int = 0
    level: float = LEVEL
    targets: list[int] = dataclasses.field(default_factory=list)
    shift: int | None = None
    wrong: int = 0
    classes: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def brief(self) -> dict[str, Any]:
        """Return what a repair record keeps: all, but only the clearest SHOWN of the classes."""
        return dataclasses.asdict(self) | {"classes": self.classes[:SHOWN]}


def scan_net(net: CachedNet, seed: int) -> Finding:
    """Scan a net. net: B on a clean dataset."""
    classes, accuracy = net.split.net.output_shape[1], net.accuracy()
    if classes < FEWEST:
        reason = f"the net has {classes} classes, but it takes {FEWEST} to tell what is usual"
        return Finding("none", reason)
    if accuracy < ACCURATE:
        reason = f"the BadNet is right on only {format_percent(accuracy)} of the images"
        return Finding("none", reason)
    right = net.labels[net.classes == net.labels]
    classes_right = len(np.unique(right))
    if classes_right < FEWEST or len(right) < FEWEST_IMAGES:
        reason = (
            f"the BadNet is right on {format_count(len(right), 'image')} of {classes_right} of "
            f"its classes, but it takes {FEWEST_IMAGES} images of {FEWEST} classes"
        )
        return Finding("none", reason)
    return make_finding(scan.count_errors(net, seed))


def make_finding(views: dict[str, np.ndarray]) -> Finding:
    """Make a Finding from the counts of scan.count_errors, for FEWEST classes or more."""
    counts = views["changes"][:, 0].sum(axis=0) + views["maps"][:, 0].sum(axis=0)
    if counts.sum() < len(counts):
        return Finding("none", f"only {counts.sum():.0f} disturbed images got a wrong answer")
    clean = read_clean()
    class_surprises, shift_surprises = compute_surprises(views)
    p_values = [compute_p_value(surprise, clean) for surprise in class_surprises]
    order = np.argsort(-class_surprises, kind="stable")
    targets = [int(number) + 1 for number in order if p_values[number] <= LEVEL]
    shift_stands_out = compute_p_value(shift_surprises.max(), clean) <= LEVEL
    shift = 1 + int(shift_surprises.argmax()) if shift_stands_out else None
    usual = max(1.0, float(np.median(counts)))
    rows = [
        {
            "class": int(number) + 1,
            "count": int(counts[number]),
            "ratio": round(float(counts[number]) / usual, 3),
            "surprise": round(float(class_surprises[number]), 3),
            "p_value": p_values[number],
        }
        for number in order
    ]
    return Finding(
        "backdoor" if targets or shift else "nothing",
        p_value=compute_p_value(max(class_surprises.max(), shift_surprises.max()), clean),
        clean_nets=len(clean),
        targets=targets,
        shift=shift,
        wrong=int(counts.sum()),
        classes=rows,
    )


@functools.cache
def read_clean() -> list[float]:
    """Read the largest surprise of each clean net, of a class or a shift, ascending."""
    return json.loads(CLEAN_NETS.read_text())["surprises"]


def compute_p_value(surprise: float, clean: Sequence[float]) -> float:
    """Return how often clean nets surprise as much: 1 / (n + 1) to 1, n being their number.

    The p-value is conformal: for one more net like these, p ≤ a has at most the probability a.
    """
    return float(1 + np.sum(np.asarray(clean) >= surprise)) / (1 + len(clean))


# ------------------------------------------------------------------------------------- evidence


def compute_surprises(views: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the surprise of each class, and of each shift but 0: float64 (N,) and (N-1,)."""
    class_evidence, shift_evidence = compute_evidence(views)
    return compute_surprise(class_evidence), compute_surprise(shift_evidence)


def compute_evidence(views: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return by how much each class, and each shift but 0, exceeds the others.

    They are float64 (N,) and (N-1,).
    """
    shares = views["patches"][:, 0].sum(axis=0)
    shares = np.log(shares / max(1, shares.sum()) + LEAST_SHARE)
    parts = {
        "changes": compute_robust_z(views["changes"][:, 0]),
        "maps": compute_robust_z(views["maps"][:, 0]),
        "patches": (shares - np.median(shares)) / SHARES_VARY,
        "probability": standardise(views["probability"], 0.1),
    }
    evidence = sum((WEIGHTS[name] * part for name, part in parts.items()), np.zeros(len(shares)))
    return standardise(evidence, 1.5), compute_robust_z(views["changes"][:, 1, 1:])


def compute_robust_z(variants: np.ndarray) -> np.ndarray:
    """Return how far counts exceed the usual one, averaged over variants: float64 (N,).

    variants: float64 (k, N). The logarithms of each are standardised, by at least as much as a
    count varies by chance. A variant with few wrong answers weighs less, by the same measure.
    """
    total, weight_sum = np.zeros(variants.shape[1]), 0.0
    for counts in variants:
        usual = max(1, np.median(counts), 0.3 * np.mean(counts))
        deviation = max(0.25, 1 / math.sqrt(usual))
        total += standardise(np.log(counts + usual / 2), deviation) / deviation
        weight_sum += 1 / deviation
    return total / weight_sum


def standardise(values: np.ndarray, min_deviation: float) -> np.ndarray:
    """Subtract the median from values, and divide by a deviation that outliers do not change.

    The quantiles 0.2 and 0.8 of a normal distribution are 1.683 deviations apart.
    """
    low, middle, high = np.quantile(values, (0.2, 0.5, 0.8))
    return (values - middle) / max(min_deviation, (high - low) / 1.683)


def compute_surprise(values: np.ndarray) -> np.ndarray:
    """Return the surprise of each standardised value, if it is the largest: float64 (N,).

    It is the negative decimal logarithm of the chance that the largest of N values is as large.
    Their deviation is an estimate from N values, so they would follow Student's t distribution,
    with N / 2 degrees of freedom. D. Wallace's formula (Ann. Math. Stat. 30, 1959) turns it into a
    normal distribution.
    """
    count, freedom = len(values), len(values) / 2
    stretched = np.sqrt(freedom * np.log1p(np.maximum(values, 0) ** 2 / freedom))
    normal = (8 * freedom + 1) / (8 * freedom + 3) * stretched
    tails = [0.5 * math.erfc(value / math.sqrt(2)) for value in normal]
    chances = [-math.expm1(count * math.log1p(-tail)) for tail in tails]
    return 0.0 - np.log10(np.maximum(chances, 1e-300))


# ---------------------------------------------------------------------------------------- words


def describe_finding(finding: Finding, class_names: Sequence[str] | None = None) -> Iterator[str]:
    """Yield a Finding as lines of text."""
    if finding.finding == "none" or finding.p_value is None:
        yield f"no finding about a backdoor: {finding.reason}"
        return
    if finding.finding == "nothing":
        yield (
            f"no class stands out among {describe_wrong(finding)} "
            f"({describe_p_value(finding.p_value, finding)}): no sign of a backdoor of the kinds "
            "that this can see"
        )
    for row in list_target_rows(finding)[:SHOWN]:
        yield describe_target(row, finding, class_names)
    if finding.shift:
        yield describe_shift(finding)


def list_target_rows(finding: Finding) -> list[dict[str, Any]]:
    """Return the rows of a Finding's `classes` that are targets, the clearest first."""
    return [row for row in finding.classes if row["class"] in finding.targets]


def describe_target(
    row: dict[str, Any], finding: Finding, class_names: Sequence[str] | None = None
) -> str:
    """Return a line of text about a target. row: of the Finding's `classes`."""
    name = f" ({escape(class_names[row['class'] - 1])})" if class_names else ""
    return (
        f"class {row['class']}{name} gets {row['count']} of {describe_wrong(finding)}, "
        f"{row['ratio']:.1f} times as many as most classes "
        f"({describe_p_value(row['p_value'], finding)}): the BadNet "
        f"{describe_likelihood(row['p_value'], finding)} a backdoor with that target"
    )


def describe_shift(finding: Finding) -> str:
    """Return a line of text about an all-to-all attack."""
    assert finding.p_value is not None  # wherever there is a shift
    return (
        f"wrong answers are often the right class + {finding.shift} "
        f"({describe_p_value(finding.p_value, finding)}): the BadNet "
        f"{describe_likelihood(finding.p_value, finding)} a backdoor that turns every class "
        "into another (all-to-all)"
    )


def describe_wrong(finding: Finding) -> str:
    return f"{format_count(finding.wrong, 'wrong answer')} to disturbed images"


def describe_p_value(p_value: float, finding: Finding) -> str:
    return f"p = {p_value:.2g}, against {format_count(finding.clean_nets, 'clean net')}"


def describe_likelihood(p_value: float, finding: Finding) -> str:
    """Say how likely a backdoor is: very, if no clean net surprises as much."""
    return "very likely has" if p_value < 1.5 / (finding.clean_nets + 1) else "may well have"
