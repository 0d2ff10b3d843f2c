"""Find classes that stand out among the flagged images, as an attack's target would.

This needs neither poisoned data nor labels: the unflagged images tell what to expect.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from defence.base.text import number_class

LEVEL = 0.01  # at most this fraction of clean streams has a class that stands out
CANDIDATE_LEVEL = 0.1  # a class of a clean stream is a candidate at most this often
WEIGHT = 0.25  # images that the prior of a class is worth; tests/tools/streams.py tests it
MANY = 10_000  # images; a share among more is hardly more certain
TINY = 1e-9  # smaller p-values are printed alike


@dataclasses.dataclass
class Candidate:
    """A class that has more of the flagged images than its share, so that it may be a target.

    target: the class, counted from 1.  hits: how many of the `flagged` images the BadNet answers
    with it.  p_value: the chance that a clean stream has a class with as many hits.
    """

    target: int
    hits: int
    flagged: int
    p_value: float

    @property
    def stands_out(self) -> bool:
        return self.p_value < LEVEL


def find_candidates(badnet: np.ndarray, flagged: np.ndarray, classes: int) -> list[Candidate]:
    """Return the classes with unusually many of the flagged images, the least likely first.

    badnet: int (n,), the BadNet's classes, 0..N-1; -1 where it gave NaN.
    flagged: bool (n,).  classes: N.
    """
    hits, unflagged = (
        np.bincount(badnet[mask & (badnet >= 0)], minlength=classes) for mask in (flagged, ~flagged)
    )
    return find_candidates_in_counts(hits, unflagged)


def find_candidates_in_counts(hits: np.ndarray, unflagged: np.ndarray) -> list[Candidate]:
    """Return what find_candidates does, from the number of images with each class.

    hits, unflagged: int (N,), the numbers of flagged and of unflagged images.

    In a clean stream, flagged and unflagged images have roughly the same classes, but some classes
    are harder. So the number of flagged images with a class follows a beta-binomial distribution.
    Its mean is the share of the class among the unflagged images, counting one more image for each
    class; its two parameters add up to WEIGHT × N. The p-value is the upper tail, times N.
    """
    classes, total = len(hits), int(hits.sum())
    shares = (unflagged + 1) / (unflagged + 1).sum()
    targets = np.flatnonzero((hits > 1) & (hits > total * shares))
    if len(targets):
        from scipy import stats  # here, because a single image should not wait for it
    candidates = []
    for target in targets:
        parameters = WEIGHT * classes * shares[target], WEIGHT * classes * (1 - shares[target])
        counts = np.arange(hits[target], total + 1)
        tail = float(stats.betabinom.pmf(counts, total, *parameters).sum())
        if tail < CANDIDATE_LEVEL:
            p_value = min(1.0, classes * tail)
            candidates.append(Candidate(int(target) + 1, int(hits[target]), total, p_value))
    return sorted(candidates, key=lambda candidate: (candidate.p_value, -candidate.hits))


def find_suspect(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the class of most of the flagged images, where it does not stand out; else None.

    candidates: as find_candidates returns them. Few flagged images tell no more about a target.
    """
    for candidate in candidates:
        if 2 * candidate.hits > candidate.flagged and not candidate.stands_out:
            return candidate
    return None


def predict_flagged(
    held_out: Sequence[float], threshold: float, total: int
) -> tuple[float, int, int]:
    """Predict how many of `total` clean images are flagged: (mean, low, high), a 95 % interval.

    held_out: the anomaly scores of m clean images.  threshold: one of these scores.
    If h held-out scores are above the threshold, the fraction of clean scores above it has the beta
    distribution with parameters h + 1 and m - h. Above MANY images the bounds are scaled up.
    """
    from scipy import stats

    above, count = int(np.sum(np.asarray(held_out) > threshold)) + 1, min(total, MANY)
    below = len(held_out) + 1 - above
    chances = stats.betabinom.pmf(np.arange(count + 1), count, above, below)
    low, high = np.searchsorted(np.cumsum(chances), [0.025, 0.975]) * (total / max(1, count))
    return total * above / (len(held_out) + 1), int(low), math.ceil(high)


def describe_candidate(candidate: Candidate, name: str | None = None) -> str:
    """Say why a class may be the target. name: the class's."""
    label = number_class(candidate.target, name)
    answers = f"{candidate.hits} of {candidate.flagged} flagged images"
    fact = f"the BadNet answers {answers} with class {label}"
    if not candidate.stands_out:
        return f"{fact}: clean images may do so too, but these share what works as a trigger"
    return f"{fact}: it looks like a backdoor's target ({describe_chance(candidate)})"


def describe_suspect(candidate: Candidate, name: str | None = None) -> str:
    """Say why a class that does not stand out may be the target. name: the class's."""
    label = number_class(candidate.target, name)
    answers = f"{candidate.hits} of {candidate.flagged} flagged images"
    return (
        f"class {label} may be a backdoor's target, but {answers} do not suffice to tell "
        f"({describe_chance(candidate)}; a target stands out below {LEVEL:g}): judge more images"
    )


def describe_chance(candidate: Candidate) -> str:
    """Say how often a clean stream has a class with as many of the flagged images."""
    tiny = candidate.p_value < TINY
    chance = f"below {TINY:.0e}" if tiny else f"{candidate.p_value:.1g}"
    return f"chance in a clean stream: {chance}"
