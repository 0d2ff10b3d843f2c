"""Finding: does a class stand out in what scan.py counted, more than in nets without a backdoor?

For each class the four ways of looking give one number, its evidence: by how many robust standard
deviations it exceeds what is usual among the classes of this net. How large the largest of so many
can be by chance, its surprise, was measured on nets without a backdoor (tests/tools/clean_nets.py);
their surprises stand in finding.json. So few of such nets as LEVEL says raise an alarm.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path

import numpy as np

from defence.base.text import escape, format_count, format_percent
from defence.beyond import scan

CLEAN_NETS = Path(__file__).with_suffix(".json")
LEVEL = 0.05  # of false alarms
FEWEST = 10  # classes; among fewer none can be called usual
ACCURATE, FEWEST_IMAGES = 0.5, 100  # what B must be right on: a fraction, and how many
SHOWN = 10  # classes that are named, at most
WEIGHTS = {"changed": 1, "disturbed": 1, "sought": 1, "believed": 0.5}
# Among the wrong answers that were sought, a share that means nothing, and how much the logarithms
# of shares vary; only few classes get any.
LEAST_SHARE, SHARES_VARY = 0.02, 0.6


@dataclasses.dataclass
class Finding:
    """What a scan found.  Classes count from 1, as in verdicts.

    finding: "backdoor", "nothing", or "none": it could not be told.  reason: why not, or None.
    p_value: of the largest surprise, at least 1 / (clean_nets + 1), or None.
    clean_nets: how many it was compared with.  level: of false alarms.
    targets: [class, …] that stand out, the clearest first.
    shift: by how many classes answers are shifted where all classes are targets, or None.
    wrong: how many wrong answers there were to changed and disturbed pictures.
    classes: [{"class", "count": of the wrong answers, "ratio": to the median class's count,
    "surprise", "p_value"}, …], for each class, by falling surprise.
    """

    finding: str
    reason: str = None
    p_value: float = None
    clean_nets: int = 0
    level: float = LEVEL
    targets: list = dataclasses.field(default_factory=list)
    shift: int = None
    wrong: int = 0
    classes: list = dataclasses.field(default_factory=list)

    def brief(self):
        """What a repair record keeps: all but the classes that nobody looks at."""
        return dataclasses.asdict(self) | {"classes": self.classes[:SHOWN]}


def scan_net(net, seed):
    """Scan a net. net: the CachedNet of B on a clean dataset.  seed: int.  Returns a Finding."""
    classes, accuracy = net.split.net.output_shape[1], net.accuracy()
    if classes < FEWEST:
        few = f"the net has {classes} classes, and among fewer than {FEWEST} none is usual"
        return Finding("none", few)
    if accuracy < ACCURATE:
        return Finding(
            "none", f"the BadNet is right on only {format_percent(accuracy)} of the images"
        )
    right = net.labels[net.classes == net.labels]
    covered = len(np.unique(right))
    if covered < FEWEST or len(right) < FEWEST_IMAGES:
        given = f"the BadNet is right on {format_count(len(right), 'image')} of {covered} of its classes"
        return Finding("none", f"{given}; {FEWEST_IMAGES} of {FEWEST} classes are needed")
    return make_finding(scan.count_errors(net, seed))


def make_finding(views):
    """Make a Finding of what was counted. views: as `scan.scan` gives them, of FEWEST classes."""
    counts = sum(views[way][:, 0].sum(axis=0) for way in ("changed", "disturbed"))
    if counts.sum() < len(counts):
        return Finding("none", f"only {counts.sum():.0f} disturbed pictures got a wrong answer")
    clean = read_clean()
    of_classes, of_shifts = compute_surprises(views)
    p_values = [compute_p_value(each, clean) for each in of_classes]
    order = np.argsort(-of_classes, kind="stable")
    targets = [int(each) + 1 for each in order if p_values[each] <= LEVEL]
    shift = (
        1 + int(of_shifts.argmax()) if compute_p_value(of_shifts.max(), clean) <= LEVEL else None
    )
    usual = max(1.0, float(np.median(counts)))
    rows = [
        {
            "class": int(each) + 1,
            "count": int(counts[each]),
            "ratio": round(float(counts[each]) / usual, 3),
            "surprise": round(float(of_classes[each]), 3),
            "p_value": p_values[each],
        }
        for each in order
    ]
    return Finding(
        "backdoor" if targets or shift else "nothing",
        p_value=compute_p_value(max(of_classes.max(), of_shifts.max()), clean),
        clean_nets=len(clean),
        targets=targets,
        shift=shift,
        wrong=int(counts.sum()),
        classes=rows,
    )


@functools.cache
def read_clean():
    """The largest surprise of each clean net, of a class or a shift, ascending: [float, …]."""
    return json.loads(CLEAN_NETS.read_text())["surprises"]


def compute_p_value(surprise, clean):
    """How often clean nets surprise as much: 1 / (n + 1) to 1, n being their number.

    Conformal: for one more net like these it is below any level no more often than the level says.
    """
    return float(1 + np.sum(np.asarray(clean) >= surprise)) / (1 + len(clean))


# ------------------------------------------------------------------------------------- evidence


def compute_surprises(views):
    """How surprising each class, and each shift but 0, is: float64 (N,) and (N-1,)."""
    return tuple(map(compute_surprise, compute_evidence(views)))


def compute_evidence(views):
    """By how much each class, and each shift but 0, exceeds the others: float64 (N,) and (N-1,)."""
    shares = views["sought"][:, 0].sum(axis=0)
    shares = np.log(shares / max(1, shares.sum()) + LEAST_SHARE)
    parts = {
        "changed": compute_robust_z(views["changed"][:, 0]),
        "disturbed": compute_robust_z(views["disturbed"][:, 0]),
        "sought": (shares - np.median(shares)) / SHARES_VARY,
        "believed": standardise(views["believed"], 0.1),
    }
    of_classes = sum(WEIGHTS[name] * part for name, part in parts.items())
    return standardise(of_classes, 1.5), compute_robust_z(views["changed"][:, 1, 1:])


def compute_robust_z(variants):
    """How far counts stand out from what is usual, in the mean over variants: float64 (N,).

    variants: float64 (k, N). Of each the logarithms are standardised; by no less than how far a
    count varies by chance, and so far a variant with few wrong answers also counts less.
    """
    total = weights = 0
    for counts in variants:
        usual = max(1, np.median(counts), 0.3 * np.mean(counts))
        least = max(0.25, 1 / math.sqrt(usual))
        total = total + standardise(np.log(counts + usual / 2), least) / least
        weights += 1 / least
    return total / weights


def standardise(values, least):
    """Values less their median, over a standard deviation that outliers do not change.

    least: what the deviation is at least.  Of a normal distribution the fifth and the four fifths
    are 1.683 deviations apart.
    """
    low, middle, high = np.quantile(values, (0.2, 0.5, 0.8))
    return (values - middle) / max(least, (high - low) / 1.683)


def compute_surprise(values):
    """The surprise of each of some standardised values, if it is the largest: float64 (N,).

    The negative decimal logarithm of the chance that the largest of N is as large. Their deviation
    is itself of N values, so it is Student's t that they would follow, of N / 2 degrees of freedom;
    D. Wallace's formula (Ann. Math. Stat. 30, 1959) turns it into a normal distribution.
    """
    count, freedom = len(values), len(values) / 2
    stretched = np.sqrt(freedom * np.log1p(np.maximum(values, 0) ** 2 / freedom))
    normal = (8 * freedom + 1) / (8 * freedom + 3) * stretched
    beyond = [0.5 * math.erfc(each / math.sqrt(2)) for each in normal]
    chances = [-math.expm1(count * math.log1p(-each)) for each in beyond]
    return 0.0 - np.log10(np.maximum(chances, 1e-300))


# ---------------------------------------------------------------------------------------- words


def describe_finding(found, class_names=None):
    """Yield a Finding as lines of text. found: a Finding.  called: the classes' names, or None."""
    if found.finding == "none":
        yield f"no finding about a backdoor: {found.reason}"
        return
    wrong = f"{format_count(found.wrong, 'wrong answer')} to disturbed pictures"
    if found.finding == "nothing":
        yield (
            f"no class stands out among {wrong} ({describe_p_value(found.p_value, found)}): no sign of a "
            "backdoor of the kinds that this can see"
        )
    for row in [row for row in found.classes if row["class"] in found.targets][:SHOWN]:
        name = f" ({escape(class_names[row['class'] - 1])})" if class_names else ""
        yield (
            f"class {row['class']}{name} gets {row['count']} of {wrong}, {row['ratio']:.1f} times "
            f"as many as most classes ({describe_p_value(row['p_value'], found)}): the BadNet "
            f"{describe_likelihood(row['p_value'], found)} a backdoor with that target"
        )
    if found.shift:
        yield (
            f"wrong answers are often the right class + {found.shift} "
            f"({describe_p_value(found.p_value, found)}): the BadNet {describe_likelihood(found.p_value, found)} a "
            "backdoor that takes every class for another (all-to-all)"
        )


def describe_p_value(p_value, found):
    return f"p = {p_value:.2g}, against {format_count(found.clean_nets, 'clean net')}"


def describe_likelihood(p_value, found):
    """Whether no clean net surprises as much, in words."""
    return "very likely has" if p_value < 1.5 / (found.clean_nets + 1) else "may well have"
