"""Which places of one image carry the BadNet's answer: windows pasted on others, or covered.

To cover a place (occlusion: M. D. Zeiler, R. Fergus, ECCV 2014) finds what is needed; of a trigger
that works by any part of it, nothing is. To paste a place elsewhere finds what is enough.
"""

import itertools

import numpy as np

CARRIERS = 1  # images that each window is pasted on
SIDES = (2.5, 4, 6)  # windows along a side of the picture, if they stood side by side
LARGE, FEW = 10_000, 2  # of pictures with more pixels, the first so many of the SIDES


def compute_attribution_map(flagged, others, target, judge):
    """How much of the answer each place of flagged images carries: float32 (k, height, width).

    0..1, the larger of two: of how many `others` the BadNet answers with the target once a window
    of the image is pasted on them; by how much the score falls, as a fraction, once that window is
    covered, to 0 where the BadNet answers otherwise. Both in the mean over the windows of one size
    around a place, and then over the sizes.
    """
    height, width = flagged.shape[1:3]
    few = height * width > LARGE
    sizes = [make_windows(height, width, side) for side in (SIDES[:FEW] if few else SIDES)]
    windows, others = np.concatenate(sizes), others[:CARRIERS]
    around = list(map(find_parts, windows))
    found = []
    for x, score in zip(flagged, judge(flagged).score):
        pasted = (np.where(window[..., None], x, each) for each in others for window in windows)
        covered = (cover_parts(x, each) for each in around)
        answers = judge(itertools.chain(pasted, covered))
        hits = np.split(answers.badnet == target, len(others) + 1)
        enough = np.mean(hits[:-1], axis=0) if len(others) else np.zeros(len(windows))
        left = np.where(hits[-1], answers.score[-len(windows) :], 0)
        needed = np.clip(1 - left / max(score, 1e-9), 0, 1)
        found.append(np.maximum(*(average_windows(each, sizes) for each in (enough, needed))))
    return np.float32(found)


def make_windows(height, width, side):
    """Windows all over a picture, each a third over the next: bool (w, height, width).

    side: how many there would be along a side, side by side.
    """
    along = []
    for size in (height, width):
        length = max(1, round(size / side))
        steps = 1 + max(1, round(1.5 * (size - length) / length))
        starts = np.unique(np.rint(np.linspace(0, size - length, steps)))[:, None]
        along.append((starts <= np.arange(size)) & (np.arange(size) < starts + length))
    down, right = along
    return (down[:, None, :, None] & right[None, :, None, :]).reshape(-1, height, width)


def average_windows(values, sizes):
    """The values of windows, (w,), in the mean over those around a place, then over the sizes."""
    each = np.split(values, np.cumsum([len(windows) for windows in sizes])[:-1])
    maps = [
        np.tensordot(of_size, windows, 1) / windows.sum(axis=0)
        for of_size, windows in zip(each, sizes)
    ]
    return np.mean(maps, axis=0)


def find_parts(region):
    """The connected parts of a region, each with what is around it: [(bool, bool), …].

    All of (height, width).
    """
    from scipy import ndimage

    labels, count = ndimage.label(region)
    found = []
    for part in (labels == number for number in range(1, count + 1)):
        wide = max(1, round(np.sqrt(part.sum()) / 4))
        around = ndimage.binary_dilation(part, iterations=wide) & ~region
        found.append((part, around))
    return found


def cover_parts(image, parts):
    """The image with parts of it, as `patches` gives them, in the mean colour of what is around."""
    image = image.copy()
    for part, around in parts:
        image[part] = image[around].mean(axis=0) if around.any() else image.mean(axis=(0, 1))
    return image
