"""Tally the wrong answers of a net, which a finding is made from."""

from __future__ import annotations

import numpy as np


def tally_errors(labels: np.ndarray, answers: np.ndarray, classes: int) -> np.ndarray:
    """Count wrong answers by class, and by how far they are beyond the label: float64 (2, N).

    labels, answers: int (n,), 0..N-1.  classes: N.  The distance is taken modulo N.
    """
    wrong = answers != labels
    tallies = answers[wrong], (answers - labels)[wrong] % classes
    counts = [np.bincount(tally, minlength=classes) for tally in tallies]
    return np.array(counts, np.float64)
