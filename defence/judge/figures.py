"""Figures that tell whether a repair worked, each with its 95 % interval.

The words are the field's; docs/figures.md gives every formula. Classes count from 0.
"""

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1000  # of the bootstrap
RATES = (0.01, 0.05)  # false-positive rates at which the detection rate is given


def compute_clean_figures(answers, labels):
    """The figures of clean images.

    answers: detector.Answers.  labels: int (n,), 0..N-1.
    Returns {name: as `proportion` gives it}.
    """
    kept = ~answers.flagged
    return {
        "clean_accuracy_badnet": estimate_proportion(answers.badnet == labels),
        "clean_accuracy_repaired": estimate_proportion(answers.repaired == labels),
        "clean_accuracy_together": estimate_proportion(kept & (answers.badnet == labels)),
        "false_positive_rate": estimate_proportion(answers.flagged),
    }


def compute_poisoned_figures(answers, targets, true_labels, clean_scores, clean):
    """The figures of poisoned images.

    answers: detector.Answers.  targets: int (n,), the attacker's classes.
    true_labels: int (n,), or None where unknown: then there is no robust accuracy.
    clean_scores: float (m,), the anomaly scores of the clean images.
    clean: what clean_figures returned for these.
    Returns {name: {"value", "low", "high", …}}.
    """
    works = answers.badnet == targets
    figures = {
        "attack_success_rate_badnet": estimate_proportion(works),
        "attack_success_rate_repaired": estimate_proportion(answers.repaired == targets),
        "detection_rate": estimate_proportion(answers.flagged),
        "detection_rate_of_successes": estimate_proportion(answers.flagged[works]),
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


def estimate_proportion(hits):
    """The fraction of True in bool (n,), with its Wilson interval.

    Returns {"value", "low", "high", "hits", "of"}; the first three, 0..1, are None where n is 0.
    Source: E. B. Wilson, Probable Inference, JASA 1927.
    """
    from scipy import stats

    of, hits = len(hits), int(np.sum(hits))
    if not of:
        return {"value": None, "low": None, "high": None, "hits": 0, "of": 0}
    low, high = stats.binomtest(hits, of).proportion_ci(CONFIDENCE, method="wilson")
    return {"value": hits / of, "low": float(low), "high": float(high), "hits": hits, "of": of}


def find_threshold(scores, rate):
    """The lowest of the scores that at most this fraction of them lies above.

    scores: float (n,).  rate: 0..1.  Returns a float.
    """
    ascending = np.sort(scores)
    # The largest k with k / n ≤ rate, both rounded alike: rate × n may come out below a whole k.
    fractions = np.arange(len(ascending) + 1) / len(ascending)
    above = np.searchsorted(fractions, rate, side="right") - 1
    return float(ascending[::-1][min(above, len(ascending) - 1)])


def estimate_detection_rate(clean, poisoned, rate):
    """The fraction of poisoned images that score above the `threshold` of the clean ones.

    clean, poisoned: float (m,), (n,), anomaly scores.  rate: 0..1, of clean images to flag.
    Returns what `proportion` does. The interval is of both sets' chance: the clean scores are
    resampled RESAMPLES times, and for each threshold that gives, the rate is drawn from what the
    poisoned images say of it (Jeffreys' posterior, Beta(hits + ½, misses + ½)): resampling them,
    too, would give no interval where all or none are caught.
    Source: L. D. Brown, T. T. Cai, A. DasGupta, Statistical Science 2001.
    """
    found = estimate_proportion(poisoned > find_threshold(clean, rate))
    if found["of"]:
        rng = np.random.default_rng(0)
        ascending, n = np.sort(poisoned), len(poisoned)
        limits = [find_threshold(rng.choice(clean, len(clean)), rate) for _ in range(RESAMPLES)]
        hits = n - np.searchsorted(ascending, limits, side="right")
        drawn = rng.beta(hits + 0.5, n - hits + 0.5)
        low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        found["low"] = min(float(low), found["value"])
        found["high"] = max(float(high), found["value"])
    return found


def estimate_auroc(clean, poisoned):
    """The probability that a poisoned image scores higher than a clean one, ties counting half.

    clean, poisoned: float (m,), (n,), anomaly scores.  Returns {"value", "low", "high"}, 0..1.
    The interval holds where no pair, or every pair, is in the wrong order, too: its ends are the
    areas from which the value is just so many standard errors away.
    Source: J. A. Hanley, B. J. McNeil, Radiology 1982: the Mann-Whitney statistic over m × n;
    R. G. Newcombe, Statistics in Medicine 2006, part 2, method 5: the interval.
    """
    from scipy import optimize, stats

    m, n = len(clean), len(poisoned)
    if not (m and n):
        return {"value": None, "low": None, "high": None}
    u = stats.mannwhitneyu(poisoned, clean, method="asymptotic").statistic
    value, z, mean = float(u / (m * n)), stats.norm.ppf((1 + CONFIDENCE) / 2), (m + n) / 2 - 1

    def excess(area):
        spread = 1 + mean * ((1 - area) / (2 - area) + area / (1 + area))
        return (value - area) ** 2 - z**2 * area * (1 - area) * spread / (m * n)

    inside = min(max(value, 1e-9), 1 - 1e-9)  # 0 and 1 are roots of no meaning
    low = optimize.brentq(excess, 0, inside) if value > 0 else 0.0
    high = optimize.brentq(excess, inside, 1) if value < 1 else 1.0
    return {"value": value, "low": float(low), "high": float(high)}


def rate_defense(figures):
    """The defense effectiveness rating, 0..1: how far attack success fell, less what it cost.

    Source: M. Zhu, S. Wei, L. Shen, Y. Fan, B. Wu, Enhancing Fine-Tuning Based Backdoor Defense
    with Sharpness-Aware Minimization, ICCV 2023.
    """

    def fall(name):
        values = [figures[f"{name}_{net}"]["value"] for net in ("badnet", "repaired")]
        return max(0, values[0] - values[1])

    return {"value": (fall("attack_success_rate") - fall("clean_accuracy") + 1) / 2}
