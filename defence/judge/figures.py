"""Figures that tell whether a repair worked, each with its 95 % interval.

The words are the field's; docs/figures.md gives every formula. Classes count from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fractions import Fraction

    from defence.judge.detector import Answers

CONFIDENCE = 0.95
RESAMPLES = 1000  # of the bootstrap
RATES = (0.01, 0.05)  # false-positive rates at which the detection rate is given
USUAL_RATE = 0.01  # of clean images to flag, where the held-out ones are enough for it


def compute_clean_figures(answers: Answers, labels: np.ndarray) -> dict[str, dict]:
    """Return the figures of clean images, {name: as `estimate_proportion` returns it}.

    labels: int (n,), 0..N-1.
    """
    unflagged = ~answers.flagged
    return {
        "clean_accuracy_badnet": estimate_proportion(answers.badnet == labels),
        "clean_accuracy_repaired": estimate_proportion(answers.repaired == labels),
        "clean_accuracy_together": estimate_proportion(unflagged & (answers.badnet == labels)),
        "false_positive_rate": estimate_proportion(answers.flagged),
    }


def compute_poisoned_figures(
    answers: Answers,
    targets: np.ndarray,
    true_labels: np.ndarray | None,
    clean_scores: np.ndarray,
    clean: dict[str, dict],
) -> dict[str, dict]:
    """Return the figures of poisoned images, {name: {"value", "low", "high", …}}.

    targets: int (n,), the attacker's classes.
    true_labels: int (n,), or None where unknown: then there is no robust accuracy.
    clean_scores: float (m,), the anomaly scores of the clean images.
    clean: the figures of the clean images, from `compute_clean_figures`.
    """
    successes = answers.badnet == targets
    figures = {
        "attack_success_rate_badnet": estimate_proportion(successes),
        "attack_success_rate_repaired": estimate_proportion(answers.repaired == targets),
        "detection_rate": estimate_proportion(answers.flagged),
        "detection_rate_of_successes": estimate_proportion(answers.flagged[successes]),
    }
    for rate in RATES:
        figures[f"detection_rate_at_{rate}"] = estimate_detection_rate(
            clean_scores, answers.score, rate
        )
    if true_labels is not None:
        figures["robust_accuracy"] = estimate_proportion(answers.repaired == true_labels)
    figures["auroc"] = estimate_auroc(clean_scores, answers.score)
    figures["defense_effectiveness_rating"] = rate_defense(clean | figures)
    return figures


def estimate_proportion(hits: np.ndarray) -> dict[str, Any]:
    """Return the fraction of True in bool (n,), with its Wilson interval.

    It is {"value", "low", "high", "hits", "of"}; the first three, 0..1, are None where n is 0.
    Source: E. B. Wilson, Probable Inference, JASA 1927.
    """
    from scipy import stats

    n, count = len(hits), int(np.sum(hits))
    if not n:
        return {"value": None, "low": None, "high": None, "hits": 0, "of": 0}
    low, high = stats.binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    return {"value": count / n, "low": float(low), "high": float(high), "hits": count, "of": n}


def find_threshold(scores: Any, rate: float) -> float:
    """Return the lowest score that at most this fraction of the scores exceeds.

    scores: float (n,).  rate: 0..1.
    This measures: the rate is that of these very images, as the field reports detection rates. Of
    new images more exceed the score; `choose_threshold` keeps their rate.
    """
    ascending = np.sort(scores)
    # The largest k with k / n ≤ rate, both rounded alike: rate × n may come out below a whole k.
    fractions = np.arange(len(ascending) + 1) / len(ascending)
    above = int(np.searchsorted(fractions, rate, side="right")) - 1
    return float(ascending[::-1][min(above, len(ascending) - 1)])


def choose_threshold(held_out: Any, rate: float) -> float | None:
    """Return the lowest score that a new clean image exceeds with at most this probability.

    held_out: float (m,), the scores of clean images that the repair did not see.
    rate: above 0, at most 1.  Return None where m is below `count_needed`.
    If the new image is as likely as each of the m to have the highest of the m + 1 scores, the
    second highest and so on, it exceeds a score that h of the m exceed with the probability
    (h + 1) / (m + 1), or less where scores are equal. The bound is of the average over held-out
    sets; for one set the rate may be higher or lower.
    Source: V. Vovk, A. Gammerman, G. Shafer, Algorithmic learning in a random world, 2005.
    """
    ascending = np.sort(held_out)
    above = math.floor(_read_decimal(rate) * (len(ascending) + 1)) - 1
    if above < 0:
        return None
    return float(ascending[::-1][min(above, len(ascending) - 1)])


def count_needed(rate: float) -> int:
    """Return how many held-out images a rate, above 0, needs: m with rate × (m + 1) ≥ 1."""
    return math.ceil(1 / _read_decimal(rate)) - 1


def find_lowest_rate(images: int) -> float:
    """Return the lowest rate that this number of held-out images allows, to four decimals."""
    return math.ceil(1e4 / (images + 1)) / 1e4


def expect_false_positives(held_out: Sequence[float]) -> dict[str, float]:
    """Return the false-positive rate to expect of new clean images with --fpr.

    held_out: the scores of m clean images that the repair did not see.
    It is {"fpr", "value", "low", "high"}, 0..1. "fpr" is USUAL_RATE, or the lowest rate that the
    images allow if that is higher. Where h of the scores are above its threshold, the fraction of
    clean images above it has the beta distribution with parameters h + 1 and m - h: "value" is its
    mean, "low" and "high" are the ends of the interval. Equal scores make the fraction lower.
    """
    from scipy import stats

    rate = max(USUAL_RATE, find_lowest_rate(len(held_out)))
    above = int(np.sum(np.asarray(held_out) > choose_threshold(held_out, rate)))
    chance = stats.beta(above + 1, len(held_out) - above)
    low, high = chance.interval(CONFIDENCE)
    return {"fpr": rate, "value": float(chance.mean()), "low": float(low), "high": float(high)}


def _read_decimal(rate: float) -> Fraction:
    """Return a rate as it was written: 0.07 as 7 / 100, since 0.07 × 100 is not 7 in floats."""
    from fractions import Fraction  # here, because a single image should not wait for it

    return Fraction(repr(float(rate)))


def estimate_detection_rate(clean: np.ndarray, poisoned: np.ndarray, rate: float) -> dict[str, Any]:
    """Return the fraction of poisoned images that score above a threshold set by the clean ones.

    clean, poisoned: float (m,), (n,), anomaly scores.  rate: 0..1, of clean images to flag.
    The keys are those of `estimate_proportion`. The interval includes the chance in both sets. The
    clean scores are resampled RESAMPLES times. For each threshold that this gives, a rate is drawn
    from Jeffreys' posterior, Beta(hits + ½, misses + ½), of the poisoned images. Resampling these,
    too, would give no interval where all or none are flagged.
    Source: L. D. Brown, T. T. Cai, A. DasGupta, Statistical Science 2001.
    """
    figure = estimate_proportion(poisoned > find_threshold(clean, rate))
    if figure["of"]:
        rng = np.random.default_rng(0)
        ascending, n = np.sort(poisoned), len(poisoned)
        limits = [find_threshold(rng.choice(clean, len(clean)), rate) for _ in range(RESAMPLES)]
        hits = n - np.searchsorted(ascending, limits, side="right")
        rates = rng.beta(hits + 0.5, n - hits + 0.5)
        low, high = np.quantile(rates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        figure["low"] = min(float(low), figure["value"])
        figure["high"] = max(float(high), figure["value"])
    return figure


def estimate_auroc(clean: np.ndarray, poisoned: np.ndarray) -> dict[str, Any]:
    """Return the probability that a poisoned image scores higher than a clean one.

    clean, poisoned: float (m,), (n,), anomaly scores; ties count half.
    It is {"value", "low", "high"}, 0..1, or None each where a set is empty. The interval's ends are
    the areas from which the value is exactly z standard errors away; so it also holds where no
    pair, or every pair, is in the wrong order.
    Source: J. A. Hanley, B. J. McNeil, Radiology 1982: the Mann-Whitney statistic over m × n;
    R. G. Newcombe, Statistics in Medicine 2006, part 2, method 5: the interval.
    """
    from scipy import optimize, stats

    m, n = len(clean), len(poisoned)
    if not (m and n):
        return {"value": None, "low": None, "high": None}
    u = stats.mannwhitneyu(poisoned, clean, method="asymptotic").statistic
    value, z, mean = float(u / (m * n)), stats.norm.ppf((1 + CONFIDENCE) / 2), (m + n) / 2 - 1

    def compute_excess(area: float) -> float:
        spread = 1 + mean * ((1 - area) / (2 - area) + area / (1 + area))
        return (value - area) ** 2 - z**2 * area * (1 - area) * spread / (m * n)

    inside = min(max(value, 1e-9), 1 - 1e-9)  # 0 and 1 are roots without meaning
    low = optimize.brentq(compute_excess, 0, inside) if value > 0 else 0.0
    high = optimize.brentq(compute_excess, inside, 1) if value < 1 else 1.0
    return {"value": value, "low": float(low), "high": float(high)}


def rate_defense(figures: dict[str, dict]) -> dict[str, float]:
    """Return the defense effectiveness rating, 0..1: the fall of attack success, less its cost.

    figures: of clean and of poisoned images.
    Source: M. Zhu, S. Wei, L. Shen, Y. Fan, B. Wu, Enhancing Fine-Tuning Based Backdoor Defense
    with Sharpness-Aware Minimization, ICCV 2023.
    """

    def compute_fall(name: str) -> float:
        before, after = (figures[f"{name}_{net}"]["value"] for net in ("badnet", "repaired"))
        return max(0, before - after)

    fall, cost = compute_fall("attack_success_rate"), compute_fall("clean_accuracy")
    return {"value": (fall - cost + 1) / 2}
