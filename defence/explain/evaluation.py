"""Judge whole datasets, and compute the figures of the defence on them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from defence.base.progress import track, warn
from defence.judge import figures
from defence.judge.detector import Answers, describe_answers
from defence.load.folder import get_name
from defence.net.inference import map_in_parallel

if TYPE_CHECKING:
    from defence.judge.detector import Detector
    from defence.load.datasets import Dataset

Judged = tuple[Answers, float]  # the answers, and the seconds that judging took


def judge_dataset(detector: Detector, data: Dataset) -> Judged:
    """Judge every image of a dataset, and measure the time."""
    start = time.monotonic()
    batches = map_in_parallel(detector.judge, (x for x, _ in data.batches()))
    parts = list(track(batches, data.path.name, data.batch_count))
    return Answers.concatenate(parts), time.monotonic() - start


def evaluate(datasets: Sequence[Dataset], judged: Sequence[Judged]) -> dict:
    """Compute the figures of the first dataset, which is clean, and of the poisoned ones, for JSON.

    judged: what judge_dataset returned for each dataset.
    """
    results: list[dict] = [
        {"file": str(data.path), "images": len(data), "seconds": max(0.001, round(seconds, 3))}
        for data, (_, seconds) in zip(datasets, judged)
    ]
    (clean, _), *poisoned = judged
    clean_figures = figures.compute_clean_figures(clean, datasets[0].labels)
    results[0]["figures"] = clean_figures
    for result, data, (answers, _) in zip(results[1:], datasets[1:], poisoned):
        result["figures"] = figures.compute_poisoned_figures(
            answers, data.labels, data.true_labels, clean.score, clean_figures
        )
    return {"clean": results[0], "poisoned": results[1:]}


def list_rows(
    datasets: Sequence[Dataset],
    judged: Sequence[Judged],
    classes: int,
    class_names: list[str] | None,
) -> Iterator[dict]:
    """Yield the row of each image. `index` and `label` count from 0, classes from 1."""
    for data, (answers, _) in zip(datasets, judged):
        pairs = zip(describe_answers(answers, classes, class_names), data.labels)
        for index, (row, label) in enumerate(pairs):
            yield {"dataset": str(data.path), "index": index, **row, "label": int(label)}


def warn_of_mistakes(datasets: Sequence[Dataset], detector: Detector) -> None:
    """Warn where clean and poisoned datasets seem swapped, or G was repaired with a dataset."""
    clean, *poisoned = datasets
    if looks_poisoned(clean):
        warn(f"{clean.path}: counts as clean, but looks poisoned; give it with --poisoned")
    for data in poisoned:
        if not looks_poisoned(data):
            warn(
                f"{data.path}: counts as poisoned, but its labels vary, as a clean dataset's do; "
                + ("all images go into the folder of" if data.class_names else "'label' must be")
                + " the attack's target"
            )
    repair_data = detector.repaired_with or {}
    for data in datasets:
        same_name = get_name(data.path) == repair_data.get("file")
        if same_name and data.hash() == repair_data.get("sha256"):
            warn(f"{data.path}: G was repaired with this dataset, so its figures flatter G")


def looks_poisoned(data: Dataset) -> bool:
    """Return whether a dataset has true labels besides its labels, or one label for all images."""
    one_label = len(data) > 1 and len(np.unique(data.labels)) == 1
    return data.true_labels is not None or one_label
