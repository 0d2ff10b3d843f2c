"""Judge whole datasets, and compute the figures of the defence on them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from defence.base.progress import track, warn
from defence.judge import figures
from defence.judge.detector import Answers, Detector, describe_answers
from defence.load.datasets import Dataset
from defence.load.folder import hash_dataset
from defence.net.inference import map_in_parallel

Judged = tuple[Answers, float]  # and the seconds that it took


def judge_dataset(detector: Detector, data: Dataset) -> Judged:
    """Judge every image of a dataset."""
    start = time.monotonic()
    batches = map_in_parallel(detector.judge, (x for x, _ in data.batches()))
    parts = list(track(batches, data.path.name, data.batch_count))
    return Answers.concatenate(parts), time.monotonic() - start


def evaluate(datasets: Sequence[Dataset], judged: Sequence[Judged]) -> dict:
    """Compute the figures of a clean dataset, the first, and of poisoned ones, for JSON.

    judged: what judge_dataset returned for each of them.
    """
    results: list[dict] = [
        {"file": str(data.path), "images": len(data), "seconds": max(0.001, round(seconds, 3))}
        for data, (_, seconds) in zip(datasets, judged)
    ]
    (clean, _), *others = judged
    clean_figures = figures.compute_clean_figures(clean, datasets[0].labels)
    results[0]["figures"] = clean_figures
    for result, data, (answers, _) in zip(results[1:], datasets[1:], others):
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
    """Warn of datasets that look mistaken: clean for poisoned, poisoned for clean, or known to G."""
    clean, *poisoned = datasets
    if looks_poisoned(clean):
        warn(f"{clean.path}: is judged as clean, but looks poisoned; see --poisoned")
    for data in poisoned:
        if not looks_poisoned(data):
            warn(
                f"{data.path}: is judged as poisoned, but its labels differ, as those of clean "
                "images do"
            )
    known = detector.repaired_with or {}
    for data in datasets:
        same_name = data.path.name == known.get("file")
        if same_name and hash_dataset(data.path) == known.get("sha256"):
            warn(f"{data.path}: G was repaired with this dataset, so its figures flatter G")


def looks_poisoned(data: Dataset) -> bool:
    """Whether a dataset has its images' true labels as well, or one label for all its images."""
    return data.true_labels is not None or len(data) > 1 == len(np.unique(data.labels))
