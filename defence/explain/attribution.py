"""Compute which places of an image carry the BadNet's answer, by pasting and covering windows.

Covering a place (occlusion: M. D. Zeiler, R. Fergus, ECCV 2014) shows what the answer needs; where
any part of a trigger works, it needs no single place. Pasting a place on another image shows what
is enough for the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from defence.base.progress import follow

if TYPE_CHECKING:
    from defence.judge.detector import Answers

CARRIERS = 1  # images on which each window is pasted
SIDES = (2.5, 4, 6)  # windows along a side of the image, if they stood side by side
LARGE, FEW = 10_000, 2  # an image of more than LARGE pixels uses only the first FEW of the SIDES

JudgeImages = Callable[[Iterable[np.ndarray]], "Answers"]  # any number of images, one by one
Parts = list[tuple[np.ndarray, np.ndarray]]  # what find_parts returns


def compute_attribution_map(
    flagged: np.ndarray, unflagged: np.ndarray, target: int, judge: JudgeImages
) -> np.ndarray:
    """Return how much of the answer each place of the flagged images carries, 0..1.

    flagged, unflagged: float32 (k, height, width, channels), (m, …).  target: 0..N-1.
    Return float32 (k, height, width), the larger of two fractions. Pasting: the fraction of
    unflagged images that the BadNet answers with the target once a window of the flagged image
    is pasted on them. Covering: the fraction by which the score falls once that window is covered,
    1 where the BadNet then gives another answer. Both are averaged over the windows of one size
    around the place, and then over the sizes.
    """
    height, width = flagged.shape[1:3]
    sides = SIDES[:FEW] if height * width > LARGE else SIDES
    sizes = [make_windows(height, width, side) for side in sides]
    windows, carriers = np.concatenate(sizes), unflagged[:CARRIERS]
    parts_of_windows = [find_parts(window) for window in windows]
    maps, count = [], len(windows) * (len(carriers) + 1)  # images that are judged for each
    with follow("examine flagged images", count * len(flagged)) as advance:
        for image, score in zip(flagged, judge(flagged).score):
            pasted = (
                np.where(window[..., None], image, carrier)
                for carrier in carriers
                for window in windows
            )
            covered = (cover_parts(image, parts) for parts in parts_of_windows)
            answers = judge(_count_images(itertools.chain(pasted, covered), advance))
            *pasted_hits, covered_hits = np.split(answers.badnet == target, len(carriers) + 1)
            enough = np.mean(pasted_hits, axis=0) if len(carriers) else np.zeros(len(windows))
            remaining = np.where(covered_hits, answers.score[-len(windows) :], 0)
            needed = np.clip(1 - remaining / max(score, 1e-9), 0, 1)
            maps.append(np.maximum(average_windows(enough, sizes), average_windows(needed, sizes)))
    return np.asarray(maps, np.float32)


def _count_images(
    images: Iterable[np.ndarray], advance: Callable[[int], None]
) -> Iterator[np.ndarray]:
    for image in images:
        yield image
        advance(1)


def make_windows(height: int, width: int, side: float) -> np.ndarray:
    """Return windows all over an image, each a third over the next: bool (w, height, width).

    side: the number of windows along a side, if they stood side by side.
    """
    spans = []
    for size in (height, width):
        length = max(1, round(size / side))
        steps = 1 + max(1, round(1.5 * (size - length) / length))
        starts = np.unique(np.rint(np.linspace(0, size - length, steps)))[:, None]
        spans.append((starts <= np.arange(size)) & (np.arange(size) < starts + length))
    rows, columns = spans
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(-1, height, width)


def average_windows(values: np.ndarray, sizes: Sequence[np.ndarray]) -> np.ndarray:
    """Average the windows' values, (w,), over the windows around a place, then over the sizes."""
    groups = np.split(values, np.cumsum([len(windows) for windows in sizes])[:-1])
    maps = [
        np.tensordot(group, windows, 1) / windows.sum(axis=0)
        for group, windows in zip(groups, sizes)
    ]
    return np.mean(maps, axis=0)


def find_parts(region: np.ndarray) -> Parts:
    """Return each connected part of a region and its surroundings, all bool (height, width)."""
    from scipy import ndimage

    labels, count = ndimage.label(region)
    parts = []
    for part in (labels == number for number in range(1, count + 1)):
        width = max(1, round(np.sqrt(part.sum()) / 4))
        surroundings = ndimage.binary_dilation(part, iterations=width) & ~region
        parts.append((part, surroundings))
    return parts


def cover_parts(image: np.ndarray, parts: Parts) -> np.ndarray:
    """Return the image with each part in the mean colour of its surroundings."""
    image = image.copy()
    for part, surroundings in parts:
        image[part] = (
            image[surroundings].mean(axis=0) if surroundings.any() else image.mean(axis=(0, 1))
        )
    return image
