"""Images that were judged, and how to get some of them again."""

import contextlib
import dataclasses

import numpy as np

from defence.cli import InputError
from defence.detector import Answers

UNREAD = 50  # pictures that could not be read, told of


@dataclasses.dataclass
class Stream:
    """Images that were judged.

    path: of the dataset, or None.  shape: (height, width, channels).  classes: N.
    answers: detector.Answers of all of them.
    fetch: of int (k,), ascending: these images again, float32 (k, height, width, channels), 0..255;
    raises InputError or OSError where one cannot be read any more.
    named: of an int, what an image is called.
    """

    path: object
    shape: tuple
    classes: int
    answers: Answers
    fetch: object
    named: object


def of_dataset(data, answers, classes):
    """The Stream of a Dataset, which stays open, and detector.Answers of it."""

    def fetch(rows):
        return data.take(np.isin(np.arange(len(data)), rows))

    return Stream(data.path, data.shape, classes, answers, fetch, "image {}".format)


def of_pictures(rows, shape, classes, read):
    """The Stream of pictures that were judged.

    rows: what detector.rows tells of each, and "path".  shape, classes: as in Stream.
    read: of a path: the picture as an input of the nets, (height, width, channels).
    """
    badnet, repaired = (
        np.array([(row[f"{net}_class"] or 0) - 1 for row in rows], np.int64)
        for net in ("badnet", "repaired")
    )
    score = np.array([row["score"] for row in rows], np.float32)
    flagged = np.array([row["class"] == classes + 1 for row in rows], bool)

    def fetch(chosen):
        images = [read(rows[i]["path"]) for i in chosen]
        return np.array(images, np.float32).reshape(-1, *shape)

    answers = Answers(badnet, repaired, score, flagged)
    return Stream(None, shape, classes, answers, fetch, lambda i: rows[i]["path"])


def fetch(stream, rows):
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


def highest(answers, chosen, most):
    """The flagged images of those chosen, bool (n,), that score highest: int (k,), k up to most.

    most: None for all.
    """
    rows = np.flatnonzero(answers.flagged & chosen)
    return rows[np.argsort(-answers.score[rows], kind="stable")][:most]


def unflagged(stream, target, most):
    """Images that are not flagged nor answered with the target, as many, spread over the stream."""
    rows = np.flatnonzero(~stream.answers.flagged & (stream.answers.badnet != target))
    count = min(most, len(rows))
    return fetch(stream, rows[np.arange(count) * len(rows) // max(1, count)])[1]
