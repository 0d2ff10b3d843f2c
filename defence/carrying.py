"""Which places of one image carry the BadNet's answer: windows pasted on others, or covered.

To cover a place (occlusion: M. D. Zeiler, R. Fergus, ECCV 2014) finds what is needed; of a trigger
that works by any part of it, nothing is. To paste a place elsewhere finds what is enough.
"""

import numpy as np

CARRIERS = 1  # images that each window is pasted on
SIDES = (2.5, 4, 6)  # windows along a side of the picture, if they stood side by side
LARGE, FEW = 10_000, 2  # of pictures with more pixels, the first so many of the SIDES


def carried(flagged, others, target, judge):
    """How much of the answer each place of flagged images carries: float32 (k, height, width).

    0..1, the larger of two: of how many `others` the BadNet answers with the target once a window
    of the image is pasted on them; by how much the score falls, as a fraction, once that window is
    covered, to 0 where the BadNet answers otherwise. Both in the mean over the windows of one size
    around a place, and then over the sizes.
    """
    height, width = flagged.shape[1:3]
    few = height * width > LARGE
    sizes = [make_windows(height, width, side) for side in (SIDES[:FEW] if few else SIDES)]
    around = [list(map(patches, windows)) for windows in sizes]
    found = []
    for x, score in zip(flagged, judge(flagged).score):
        pasted = [pasting(x, each, others[:CARRIERS], target, judge) for each in sizes]
        covered = [covering(x, each, score, target, judge) for each in around]
        maps = ([painted(*each) for each in zip(values, sizes)] for values in (pasted, covered))
        found.append(np.maximum(*(np.mean(each, axis=0) for each in maps)))
    return np.float32(found)


def make_windows(height, width, side):
    """Windows all over a picture, each half over the next: bool (w, height, width).

    side: how many there would be along a side, side by side.
    """
    along = []
    for size in (height, width):
        length = max(1, round(size / side))
        steps = 1 + max(1, round(2 * (size - length) / length))
        starts = np.unique(np.rint(np.linspace(0, size - length, steps)))[:, None]
        along.append((starts <= np.arange(size)) & (np.arange(size) < starts + length))
    down, right = along
    return (down[:, None, :, None] & right[None, :, None, :]).reshape(-1, height, width)


def painted(values, windows):
    """The mean of the values of all windows over each place: (height, width)."""
    return np.tensordot(values, windows, 1) / windows.sum(axis=0)


def pasting(image, windows, others, target, judge):
    """Of how many of the others each window, pasted on them, makes the target: float (w,), 0..1."""
    if not len(others):
        return np.zeros(len(windows))
    answers = judge(
        np.where(window[..., None], image, other) for window in windows for other in others
    )
    return np.mean((answers.badnet == target).reshape(len(windows), -1), axis=1)


def covering(image, around, score, target, judge):
    """By how much, as a fraction, covering each window makes the score fall: float (w,), 0..1.

    around: of each window what `patches` gives.
    """
    answers = judge(cover(image, each) for each in around)
    left = np.where(answers.badnet == target, answers.score, 0)
    return np.clip(1 - left / max(score, 1e-9), 0, 1)


def patches(region):
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


def cover(image, parts):
    """The image with parts of it, as `patches` gives them, in the mean colour of what is around."""
    image = image.copy()
    for part, around in parts:
        image[part] = image[around].mean(axis=0) if around.any() else image.mean(axis=(0, 1))
    return image
