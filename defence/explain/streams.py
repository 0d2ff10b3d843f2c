"""Images that were judged, and how to get some of them again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from defence.base.errors import InputError
from defence.judge.detector import Answers
from defence.load.datasets import Dataset

UNREAD = 50  # images that could not be read and are listed on a page, at most


@dataclasses.dataclass
class Stream:
    """Images that were judged.

    path: of the dataset, or None.  shape: (height, width, channels).  classes: N.
    answers: to all of them.
    fetch: takes int (k,), ascending, and returns these images again, float32 (k, height, width,
    channels), 0..255; raises InputError or OSError where one cannot be read any more.
    name: takes the number of an image and returns its name.
    """

    path: Path | None
    shape: tuple[int, ...]
    classes: int
    answers: Answers
    fetch: Callable[[np.ndarray], np.ndarray]
    name: Callable[[int], str]


def make_dataset_stream(data: Dataset, answers: Answers, classes: int) -> Stream:
    """Make the stream of a dataset, which stays open, and the answers to its images."""

    def fetch(rows: np.ndarray) -> np.ndarray:
        return data.take(np.isin(np.arange(len(data)), rows))

    return Stream(data.path, data.shape, classes, answers, fetch, "image {}".format)


def make_image_stream(
    names: Sequence[str],
    answers: Answers,
    classes: int,
    shape: tuple[int, ...],
    read: Callable[[str], np.ndarray],
) -> Stream:
    """Make the stream of image files that were judged.

    names: of the files, in the order of the answers.
    read: takes a name and returns the image as an input of the nets, (height, width, channels).
    """

    def fetch(rows: np.ndarray) -> np.ndarray:
        images = [read(names[row]) for row in rows]
        return np.array(images, np.float32).reshape(-1, *shape)

    return Stream(None, shape, classes, answers, fetch, lambda row: names[row])


def fetch_images(stream, rows):
    """Images of a Stream in any order, those that can still be read: (rows, images).

    rows: int (k,).
    """
    order = np.argsort(rows)
    try:
        return rows, stream.fetch(rows[order])[np.argsort(order)]
    except (InputError, OSError):  # a picture was moved since it was judged
        kept, images = [], []
        for row in rows:
            with contextlib.suppress(InputError, OSError):
                images.append(stream.fetch(np.array([row]))[0])
                kept.append(row)
        return np.array(kept, int), np.array(images, np.float32).reshape(-1, *stream.shape)


def select_highest(answers, chosen, most):
    """The flagged images of those chosen, bool (n,), that score highest: int (k,), k up to most.

    most: None for all.
    """
    rows = np.flatnonzero(answers.flagged & chosen)
    return rows[np.argsort(-answers.score[rows], kind="stable")][:most]


def fetch_unflagged(stream, target, most):
    """Images that are not flagged nor answered with the target, as many, spread over the stream."""
    rows = np.flatnonzero(~stream.answers.flagged & (stream.answers.badnet != target))
    count = min(most, len(rows))
    return fetch_images(stream, rows[np.arange(count) * len(rows) // max(1, count)])[1]
