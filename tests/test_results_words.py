"""docs/results.md says of the report's method what tests/results/results.csv has."""

import csv

import numpy as np
import pytest
from conftest import ROOT

WAYS = ("brief", "from-start")
COLUMNS = {  # of results.csv
    "badnet_accuracy": "clean_accuracy_badnet",
    "accuracy": "report_clean_accuracy_repaired",
    "pruned": "attack_success_rate_pruned",
    "success": "report_attack_success_rate_repaired",
    "channels": "report_channels_pruned",
    "needed": "needed_channels_pruned",
    "auroc": "report_auroc",
}


def read_figures():
    """Return the figures of the triggers of DeepID nets, but the dormant one: {name: (n,)}."""
    with open(ROOT / "tests" / "results" / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["trigger"] and row["channels"] == "60"]
    rows = [row for row in rows if row["net"] != "sunglasses-dormant"]
    figures = {name: np.float64([row[column] for row in rows]) for name, column in COLUMNS.items()}
    return figures | {way: np.array([row["net"].endswith(way) for row in rows]) for way in WAYS}


def write_sentences():
    """Yield the sentences of "Where the report's method fails, and why" that have figures."""
    f = read_figures()
    count, change = len(f["auroc"]), 100 * (f["success"] - f["pruned"])
    brief, start = (change[f[way]] for way in WAYS)
    yield f"about the {count + 1} triggers of DeepID nets"
    yield (
        f"For each of the other {count} triggers, G answers {100 * f['success'].min():.1f} % or "
        "more of the poisoned images with the target; "
        f"for {np.sum(f['success'] > 0.5)} of the {count}, more than half."
    )
    yield (
        f"G's clean accuracy is {100 * f['accuracy'].min():.1f} % or more, and at most "
        f"{100 * np.max(f['badnet_accuracy'] - f['accuracy']):.1f} points below B's."
    )
    yield f"It ends after {f['channels'].min():.0f} to {f['channels'].max():.0f} of 60 channels"
    yield (
        f"it prunes at most {f['needed'].max():.0f}, and for {np.sum(f['needed'] == 0)} of the "
        f"{count} triggers none"
    )
    yield f"leaves an ASR of 63 % or more for {np.sum(f['pruned'] >= 0.63)} of the {count}."
    yield (
        f"by {-brief.max():.1f} to {-brief.min():.0f} points, for {np.sum(brief < -40)} of "
        f"{len(brief)} triggers by more than 40."
    )
    yield (
        f"For {np.sum(start >= -10)} of the {len(start)} triggers from the start, the ASR falls by "
        f"10 points at most; for {np.sum(start > 0)} of these it rises, by up to {start.max():.0f}."
    )
    yield f"For {np.sum(f['auroc'] < 0.5)} of the {count} triggers, AUROC is below a half"


@pytest.mark.parametrize("sentence", list(write_sentences()))
def test_the_document_says_what_was_measured(sentence):
    text = " ".join((ROOT / "docs" / "results.md").read_text().split())
    assert sentence in text
