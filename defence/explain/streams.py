"""A stream: images that were judged, their answers, and a way to fetch some of the images again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from defence.base.errors import InputError

if TYPE_CHECKING:
    from defence.judge.detector import Answers
    from defence.load.datasets import Dataset

UNREAD = 50  # unread images that a page lists, at most


@dataclasses.dataclass
class Stream:
    """Images that were judged.

    path: the dataset's, or None.  shape: (height, width, channels).  classes: N.
    answers: to all the images.
    fetch: takes int (k,), ascending, and returns these images again, float32 (k, height, width,
    channels), 0..255; raises InputError or OSError where an image can no longer be read.
    name: takes the number of an image and returns its name.
    """

    path: Path | None
    shape: tuple[int, ...]
    classes: int
    answers: Answers
    fetch: Callable[[np.ndarray], np.ndarray]
    name: Callable[[int], str]


def make_dataset_stream(data: Dataset, answers: Answers, classes: int) -> Stream:
    """Make the stream of a dataset and the answers to its images. The dataset must stay open."""

    def fetch(rows: np.ndarray) -> np.ndarray:
        return data.take(np.isin(np.arange(len(data)), rows))

    return Stream(data.path, data.shape, classes, answers, fetch, "image {}".format)


def make_image_stream(
    names: Sequence[str],
    answers: Answers,
    classes: int,
    shape: tuple[int, ...],
    read: Callable[[Any], np.ndarray],
) -> Stream:
    """Make the stream of image files that were judged.

    names: the files', in the order of the answers.
    read: takes a name and returns the image as an input of the nets, (height, width, channels).
    """

    def fetch(rows: np.ndarray) -> np.ndarray:
        images = [read(names[row]) for row in rows]
        return np.array(images, np.float32).reshape(-1, *shape)

    return Stream(None, shape, classes, answers, fetch, lambda row: names[row])


def fetch_images(stream: Stream, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fetch images of a stream, in the order of `rows`, int (k,), without those that are gone.

    Return (rows, images), where images are float32 (j, height, width, channels).
    """
    order = np.argsort(rows)
    try:
        return rows, stream.fetch(rows[order])[np.argsort(order)]
    except (InputError, OSError):  # an image was moved since it was judged
        present, images = [], []
        for row in rows:
            with contextlib.suppress(InputError, OSError):
                images.append(stream.fetch(np.array([row]))[0])
                present.append(row)
        return np.array(present, int), np.array(images, np.float32).reshape(-1, *stream.shape)


def select_highest(answers: Answers, mask: np.ndarray, most: int | None) -> np.ndarray:
    """Return which flagged images of a mask, bool (n,), score highest: int (k,), descending.

    most: the largest k; None for all of them.
    """
    rows = np.flatnonzero(answers.flagged & mask)
    return rows[np.argsort(-answers.score[rows], kind="stable")][:most]


def fetch_unflagged(stream: Stream, target: int, most: int) -> np.ndarray:
    """Fetch up to `most` images, spread over the stream, that are neither flagged nor the target's.

    target: the class, 0..N-1, that the BadNet must not answer.
    """
    rows = np.flatnonzero(~stream.answers.flagged & (stream.answers.badnet != target))
    count = min(most, len(rows))
    return fetch_images(stream, rows[np.arange(count) * len(rows) // max(1, count)])[1]
