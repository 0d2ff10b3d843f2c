"""Which class the flagged images have, and whether one stands out, as a backdoor's target would.

Needs neither poisoned data nor labels: the images that are not flagged tell what to expect.
"""

import dataclasses
import math

import numpy as np

LEVEL = 0.01  # of all streams of clean images, those in which some class stands out
UNUSUAL = 0.1  # of clean images, how often one class has so many flagged ones, at most
EACH = 0.25  # images that what is expected of a class counts as; tests/tools/streams.py tries it
MANY = 10_000  # images, of which a share is hardly less certain than of more
TINY = 1e-9  # smaller p-values are not told apart


@dataclasses.dataclass
class Standing:
    """A class that has more of the flagged images than of the others.

    target: it counts from 1.  hits: of the `flagged` ones, those that the BadNet answers with it.
    p_value: how likely so many are among clean ones, for any of the classes.
    """

    target: int
    hits: int
    flagged: int
    p_value: float

    @property
    def stands_out(self):
        return self.p_value < LEVEL


def standing_out(badnet, flagged, classes):
    """Those of `unusual` that stand out. The arguments are the same."""
    return [each for each in unusual(badnet, flagged, classes) if each.stands_out]


def unusual(badnet, flagged, classes):
    """The classes with UNUSUAL many of the flagged images, the most unlikely first: [Standing, …].

    badnet: int (n,), the BadNet's classes, 0..N-1; -1 where it gave NaN.
    flagged: bool (n,).  classes: N.
    """
    counts = [
        np.bincount(badnet[chosen & (badnet >= 0)], minlength=classes)
        for chosen in (flagged, ~flagged)
    ]
    return unusual_counts(*counts)


def unusual_counts(hits, others):
    """`unusual`, of how many images have each class.

    hits, others: int (N,), of the images that are flagged, and of those that are not.

    Of clean images, the flagged ones are expected to have the classes of the others, each with a
    deviation, since some classes are harder: a share drawn from a beta distribution whose mean is
    the class's share of the others and one image of each class, and whose parameters add up to
    EACH × N. The p-value is the upper tail of that beta-binomial distribution, times N.
    """
    classes, total = len(hits), int(hits.sum())
    shares = (others + 1) / (others + 1).sum()
    found = []
    for target in np.flatnonzero((hits > 1) & (hits > total * shares)):
        weight = EACH * classes
        likely = tail(int(hits[target]), total, shares[target] * weight, weight)
        if likely < UNUSUAL:
            p_value = min(1.0, classes * likely)
            found.append(Standing(int(target) + 1, int(hits[target]), total, p_value))
    return sorted(found, key=lambda each: (each.p_value, -each.hits))


def tail(hits, total, weight, all_weights):
    """How likely `hits` or more of `total` images have a class: of a beta-binomial distribution.

    weight, all_weights: what is expected, of this class and in all.
    """
    from scipy import special

    return float(np.exp(special.logsumexp(log_chances(total, weight, all_weights)[hits:])))


def log_chances(total, weight, all_weights):
    """The logarithms of how likely 0 to `total` of so many images are: float64 (total + 1,).

    Of a beta-binomial distribution; weight, all_weights: as for `tail`.
    """
    from scipy import special

    many, rest = np.arange(total + 1), all_weights - weight
    ways = -special.betaln(many + 1, total - many + 1) - np.log(total + 1)
    return ways + special.betaln(many + weight, total - many + rest) - special.betaln(weight, rest)


def expected(held_out, threshold, total):
    """How many of so many clean images are flagged: (mean, low, high), of a 95 % interval.

    held_out: float (m,), the anomaly scores of clean images.  threshold: of the score.
    It is one of the m held-out scores, h of them above it: then the fraction of all scores above it
    has a beta distribution, of h + 1 and m - h. Of more than MANY images the bounds are those of
    MANY, multiplied.
    """
    above, count = np.sum(np.asarray(held_out) > threshold) + 1, min(total, MANY)
    chances = np.cumsum(np.exp(log_chances(count, above, len(held_out) + 1)))
    low, high = np.searchsorted(chances, [0.025, 0.975]) * (total / max(1, count))
    return total * above / (len(held_out) + 1), int(low), math.ceil(high)


def in_words(standing, name=None):
    """What is said of a Standing that stands out, or whose cut-out works as a trigger.

    name: of the class, or None.
    """
    called = f"class {standing.target}" + (f" ({name})" if name else "")
    says = (
        f"{standing.hits} of {standing.flagged} flagged images are answered with {called} by the "
        "BadNet: "
    )
    if not standing.stands_out:
        return f"{says}clean ones may be as well, but what these have in common works as a trigger"
    chance = f"below {TINY:.0e}" if standing.p_value < TINY else f"{standing.p_value:.1g}"
    return f"{says}it looks like a backdoor's target (chance among clean images: {chance})"
