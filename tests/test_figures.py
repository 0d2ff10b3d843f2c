"""The figures: each formula equals numbers computed by hand, and scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics

from defence.explain import tables
from defence.judge import figures
from defence.judge.detector import Answers

# Ten clean images of classes 0 to 2 …
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
OF_B = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2])  # 9 right
OF_G = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 0])  # 8 right, 3 unlike B
CLEAN = Answers(OF_B, OF_G, np.array([1, 2, 3, 7, 0, 1, 6, 2, 3, 9]) / 10, OF_B != OF_G)
# … and five poisoned images with target 0.
TRUE = np.array([1, 1, 1, 2, 2])
P_OF_B = np.array([0, 0, 0, 0, 2])  # the attack works on 4
P_OF_G = np.array([1, 0, 1, 1, 2])
SCORES = np.array([9, 3, 8, 7, 1]) / 10
POISONED = Answers(P_OF_B, P_OF_G, SCORES, P_OF_B != P_OF_G)


def take_values(figures):
    return {name: figure["value"] for name, figure in figures.items()}


def test_figures_computed_by_hand():
    clean = figures.compute_clean_figures(CLEAN, LABELS)
    assert take_values(clean) == {
        "clean_accuracy_badnet": 0.9,
        "clean_accuracy_repaired": 0.8,
        "clean_accuracy_together": 0.7,  # two right answers of B are flagged
        "false_positive_rate": 0.3,
    }
    poisoned = figures.compute_poisoned_figures(POISONED, np.zeros(5), TRUE, CLEAN.score, clean)
    assert take_values(poisoned) == {
        "attack_success_rate_badnet": 0.8,
        "attack_success_rate_repaired": 0.2,
        "detection_rate": 0.6,
        "detection_rate_of_successes": 0.75,
        "detection_rate_at_0.01": 0,  # above 0.9, the largest clean score
        "detection_rate_at_0.05": 0,
        "robust_accuracy": 0.6,
        # 0.9 is above 9 of the clean scores and ties with 1, 0.3 above 5 with 2 ties, and so on
        "auroc": pytest.approx((9.5 + 6 + 9 + 8.5 + 2) / 50),
        "defense_effectiveness_rating": pytest.approx((0.6 - 0.1 + 1) / 2),
    }
    assert set(poisoned) == set(tables.POISONED) and set(clean) == set(tables.CLEAN)
    unknown = figures.compute_poisoned_figures(POISONED, np.zeros(5), None, CLEAN.score, clean)
    assert "robust_accuracy" not in unknown


def test_figures_are_those_of_scikit_learn():
    clean = take_values(figures.compute_clean_figures(CLEAN, LABELS))
    assert clean["clean_accuracy_badnet"] == metrics.accuracy_score(LABELS, OF_B)
    assert clean["clean_accuracy_repaired"] == metrics.accuracy_score(LABELS, OF_G)
    verdicts = np.where(OF_B == OF_G, OF_B, 3)
    assert clean["clean_accuracy_together"] == metrics.accuracy_score(LABELS, verdicts)
    poisoned = take_values(
        figures.compute_poisoned_figures(
            POISONED, np.zeros(5), TRUE, CLEAN.score, figures.compute_clean_figures(CLEAN, LABELS)
        )
    )
    truth = np.repeat([0, 1], [10, 5])
    flagged = np.concatenate([CLEAN.flagged, POISONED.flagged])
    ((tn, fp), (fn, tp)) = metrics.confusion_matrix(truth, flagged)
    assert clean["false_positive_rate"] == fp / (fp + tn)
    assert poisoned["detection_rate"] == tp / (tp + fn) == metrics.recall_score(truth, flagged)
    assert poisoned["robust_accuracy"] == metrics.accuracy_score(TRUE, P_OF_G)


def random_scores(seed, decimals):
    rng = np.random.default_rng(seed)
    clean, poisoned = rng.beta(1, 4, 137), rng.beta(2, 2, 61)
    return clean.round(decimals), poisoned.round(decimals)


@pytest.mark.parametrize("decimals", [1, 9])
@pytest.mark.parametrize("seed", [0, 1])
def test_auroc_and_thresholds_are_those_of_scikit_learn(seed, decimals):
    clean, poisoned = random_scores(seed, decimals)
    truth = np.repeat([0, 1], [len(clean), len(poisoned)])
    scores = np.concatenate([clean, poisoned])
    ours = figures.estimate_auroc(clean, poisoned)
    assert ours["value"] == pytest.approx(metrics.roc_auc_score(truth, scores), abs=1e-12)
    assert ours["low"] < ours["value"] < ours["high"]
    assert ours == figures.estimate_auroc(clean, poisoned)
    fpr, tpr, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
    for rate in (0, 0.01, 0.05, 0.3, 1):
        limit = figures.find_threshold(clean, rate)
        assert np.mean(clean > limit) <= rate
        lower = clean[clean < limit]
        assert len(lower) == 0 or np.mean(clean > lower.max()) > rate
        if rate < 1:
            assert np.mean(poisoned > limit) <= np.max(tpr[fpr <= rate])
            assert np.mean(poisoned >= limit) >= np.max(tpr[fpr <= rate])


@pytest.mark.parametrize(("distance", "truth"), [(1, 0.76025), (2.5, 0.96145)])
def test_the_interval_of_auroc_covers_the_truth_about_95_times_in_100(distance, truth):
    """Of normal scores, `distance` standard deviations apart, the truth is Φ(distance / √2)."""
    rng = np.random.default_rng(3)
    intervals = [
        figures.estimate_auroc(rng.normal(0, 1, 60), rng.normal(distance, 1, 20))
        for _ in range(200)
    ]
    assert 180 <= sum(figure["low"] <= truth <= figure["high"] for figure in intervals) <= 199


@pytest.mark.parametrize("count", [20, 40])
def test_an_auroc_of_one_or_zero_has_an_interval(count):
    """It is Newcombe's, where all poisoned score higher: (1 − A) m n = z² A (1 + (m − 1) …)."""
    clean, poisoned = np.arange(count), np.arange(count) + 100
    best, worst = figures.estimate_auroc(clean, poisoned), figures.estimate_auroc(poisoned, clean)
    assert (best["value"], best["high"], worst["value"], worst["low"]) == (1, 1, 0, 0)
    a, z = best["low"], 1.959964
    spread = 1 + (count - 1) * ((1 - a) / (2 - a) + a / (1 + a))
    assert (1 - a) * count**2 == pytest.approx(z**2 * a * spread, rel=1e-4)
    assert 0.85 < a < 0.96 and worst["high"] == pytest.approx(1 - a, abs=1e-6)


def test_the_interval_of_a_detection_rate_is_of_both_sets():
    """It covers the truth about 95 times in 100; Wilson's, from one set, does not."""
    rng = np.random.default_rng(5)
    truth = 0.5  # of poisoned scores are above the score that 5 % of clean scores exceed
    hits = wilsons = 0
    for _ in range(100):
        clean, poisoned = rng.normal(0, 1, 100), rng.normal(1.6449, 1, 400)
        ours = figures.estimate_detection_rate(clean, poisoned, 0.05)
        wilson = figures.estimate_proportion(poisoned > figures.find_threshold(clean, 0.05))
        assert ours["low"] <= ours["value"] <= ours["high"] and ours["hits"] == wilson["hits"]
        hits += ours["low"] <= truth <= ours["high"]
        wilsons += wilson["low"] <= truth <= wilson["high"]
    assert wilsons < 60 and hits >= 88
    certain = figures.estimate_detection_rate(rng.normal(0, 1, 100), np.full(40, 9), 0.05)
    assert certain["value"] == certain["high"] == 1 and 0.85 < certain["low"] < 0.99


def test_wilson_interval_computed_by_hand():
    """For 9 of 10 with z = 1.95996 the centre is 0.78899, half the width 0.19313."""
    ours = figures.estimate_proportion(np.arange(10) < 9)
    assert (ours["value"], ours["hits"], ours["of"]) == (0.9, 9, 10)
    assert ours["low"] == pytest.approx(0.59586, abs=2e-5)
    assert ours["high"] == pytest.approx(0.98212, abs=2e-5)
    empty = figures.estimate_proportion(np.zeros(0, bool))
    assert empty == {"value": None, "low": None, "high": None, "hits": 0, "of": 0}
    assert figures.estimate_proportion(np.zeros(5, bool))["low"] == 0


@pytest.mark.parametrize(
    ("rate", "limit"), [(0, 9), (0.09, 9), (0.1, 8), (0.25, 7), (0.3, 6), (1, 0)]
)
def test_threshold_computed_by_hand(rate, limit):
    assert figures.find_threshold(np.array([3, 1, 4, 0, 5, 9, 2, 6, 8, 7.0]), rate) == limit


@pytest.mark.parametrize("rate", [0.07, 0.29, 0.57, 0.58, 0.01])
def test_a_threshold_is_exact_where_rate_times_images_is_rounded(rate):
    """0.29 × 100 is 28.999999999999996, and 0.07 × 100 is 7.000000000000001."""
    scores = np.random.default_rng(0).permutation(100)
    assert np.sum(scores > figures.find_threshold(scores, rate)) == round(100 * rate)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: rng.exponential(1, n),
        lambda rng, n: rng.geometric(0.1, n),  # many equal scores
        lambda rng, n: np.minimum(rng.exponential(1, n), 2),  # many of the largest score
    ],
)
@pytest.mark.parametrize(("images", "rate"), [(99, 0.01), (100, 0.01), (60, 0.05), (150, 0.05)])
def test_new_clean_images_exceed_the_threshold_at_most_at_its_rate(draw, images, rate):
    """The score that this fraction of the held-out images exceeds, up to twice as many exceed."""
    rng, trials = np.random.default_rng(4), 4000
    exceed = [
        draw(rng, 50) > figures.choose_threshold(draw(rng, images), rate) for _ in range(trials)
    ]
    error = np.std(np.mean(exceed, axis=1)) / np.sqrt(trials)
    assert np.mean(exceed) <= rate + 3 * error


@pytest.mark.parametrize("images", [1, 2, 60, 99, 100, 150, 1155])
def test_the_threshold_is_the_lowest_that_keeps_the_rate(images):
    """Rates in hundredths times a hundred are often just below or above a whole number."""
    scores = np.random.default_rng(1).permutation(images)
    for hundredths in range(1, 101):
        threshold = figures.choose_threshold(scores, hundredths / 100)
        allowed = hundredths * (images + 1) // 100 - 1
        needed = figures.count_needed(hundredths / 100)
        assert (threshold is None) == (allowed < 0) == (images < needed)
        if threshold is not None:
            assert np.sum(scores > threshold) == min(allowed, images - 1)
    lowest = figures.find_lowest_rate(images)
    assert figures.choose_threshold(scores, lowest) == images - 1
    assert figures.choose_threshold(scores, lowest - 1e-4) is None


def test_how_many_held_out_images_a_rate_needs():
    rates = (0.01, 0.05, 0.07, 0.001, 0.3, 0.5, 1, np.float64(0.01))
    assert [figures.count_needed(rate) for rate in rates] == [99, 19, 14, 999, 3, 1, 0, 99]


@pytest.mark.parametrize(("images", "rate"), [(1, 0.5), (60, 0.0164), (99, 0.01), (1155, 0.01)])
def test_the_expected_rate_is_that_of_the_lowest_usual_rate(images, rate):
    scores = np.sort(np.random.default_rng(2).exponential(1, images))
    expected = figures.expect_false_positives(scores)
    above = int(np.sum(scores > figures.choose_threshold(scores, rate)))
    assert expected["fpr"] == rate and expected["low"] > 0
    assert expected["value"] == pytest.approx((above + 1) / (images + 1))
    assert expected["low"] < expected["value"] <= rate < expected["high"] < 1


def test_labels_name_the_rule_that_flags():
    clean = figures.compute_clean_figures(CLEAN, LABELS)
    poisoned = figures.compute_poisoned_figures(POISONED, np.zeros(5), TRUE, CLEAN.score, clean)
    for threshold, rule in ((None, "B and G disagree"), (0.38183, "score > 0.382")):
        labels = [label for label, _ in tables.label_figures(clean | poisoned, threshold)]
        assert f"false-positive rate ({rule})" in labels and f"detection rate ({rule})" in labels
        assert all(len(label) <= 38 and "{" not in label for label in labels)
        results = {"file": "x.h5", "images": 5, "seconds": 1, "figures": clean}
        results = {"rule": "x", "threshold": threshold, "clean": results, "poisoned": []}
        assert f"false-positive rate ({rule}) " in "\n".join(tables.format_evaluation(results))


def test_the_rating_counts_neither_a_rise_of_attack_success_nor_of_accuracy():
    def rate(*shares):
        names = ("attack_success_rate", "clean_accuracy")
        keys = [f"{name}_{net}" for name in names for net in ("badnet", "repaired")]
        return figures.rate_defense({k: {"value": v} for k, v in zip(keys, shares)})

    assert rate(1, 0, 0.9, 0.9) == {"value": 1}
    assert rate(1, 0.2, 0.9, 0.85)["value"] == pytest.approx(0.875)
    assert rate(0.5, 0.9, 0.8, 0.9)["value"] == 0.5
