"""Where the trigger is on the flagged images of a class, what it looks like, whether it is one.

Needs neither poisoned data nor labels, but the flagged images and others. In turn:

- difference: how far the flagged images of the class are, place by place and in the mean, from
  those that were not flagged.
- carrying: what a window of a flagged image does. Pasted on another image, does the BadNet answer
  that with the class? Covered, does it still answer the flagged one so?
- region: where both are large. What the flagged images show there in the mean is the cut-out.
- the test: the cut-out pasted on images that were not flagged. If the BadNet then answers with the
  class, it is a trigger, or what the BadNet takes for one.

docs/figures.md says how far that may be believed; tests/tools/regions.py measures it.
"""

import dataclasses

import numpy as np

from defence.detector import Answers
from defence.inference import parallel_map

CLASSES = 3  # that are looked at, of those that stand out
FLAGGED, OTHERS = 32, 64  # images that are looked at
FEWEST = 5  # of each kind, for a difference
SINGLE = 4  # flagged images that windows are taken of
CARRIERS = 1  # images that each window is pasted on
SIDES = (2.5, 4, 6)  # windows along a side of the picture, if they stood side by side
LARGE, FEW = 10_000, 2  # of pictures with more pixels, the first so many of the SIDES
VARY = 4  # grey levels that a pixel counts as varying by, at least
BY_CHANCE = 4  # standard errors that a difference stays below where there is none
CARRIED = 0.2  # how much a place carries, at least, where something is at one place
BORDERS = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1)  # of the most in a region, what is in it at least
WORSE = 0.15  # than the best region, what a smaller one may be
WHOLE = 0.5  # of the picture: a region as large is all of it
BATCH_VALUES = 2**19  # images judged together: 2 MB as float32


@dataclasses.dataclass
class Stream:
    """Images that were judged.

    path: of the dataset, or None.  shape: (height, width, channels).  classes: N.
    answers: detector.Answers of all of them.
    fetch: of int (k,), ascending: these images again, float32 (k, height, width, channels), 0..255.
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
        if not len(rows):
            return np.empty((0, *data.shape), np.float32)
        chosen = np.isin(np.arange(len(data)), rows)
        return np.concatenate([x for x, _ in data.part(chosen).batches()])

    return Stream(data.path, data.shape, classes, answers, fetch, "image {}".format)


@dataclasses.dataclass
class Looked:
    """A Stream, the flagged.Standing classes of it, and what was Seen of the first of them."""

    stream: Stream
    standing: list
    seen: list


@dataclasses.dataclass
class Seen:
    """What was seen of a class that stands out.

    rows: int (k,), which images of the stream were looked at, those that score highest first.
    flagged: float32 (k, height, width, channels), 0..255, the images.
    places: float32 (SINGLE or fewer, height, width), 0..1, where the trigger is on the first of
    them: how much of the answer each place carries, times how unlike the usual it is there; of each
    image the most is 1, if it is not 0.
    region: bool (height, width), all of it False where nothing is in common.
    usual, cut_out: float32 (height, width, channels), the mean of the images that were not flagged,
    and of the flagged ones; None where there are too few.
    pasted: {"images", "badnet", "repaired", "flagged"}: on how many images that were not flagged
    the cut-out was pasted, or the means' difference added if the region is the whole picture; and
    how many each net then answers with the class, or are flagged.  covered: the same of the
    flagged ones, the region covered.  None where there is no region, or too few images.
    """

    rows: np.ndarray
    flagged: np.ndarray
    places: np.ndarray
    region: np.ndarray
    usual: np.ndarray = None
    cut_out: np.ndarray = None
    pasted: dict = None
    covered: dict = None

    @property
    def whole(self):
        return bool(self.region.mean() >= WHOLE)

    def described(self):
        """What a pipeline needs of it, as a dict that JSON can hold; rows and columns from 0."""
        rows, columns = np.nonzero(self.region)
        box = None
        if len(rows):
            box = dict(zip(("top", "left"), map(int, (rows.min(), columns.min()))))
            box |= dict(zip(("bottom", "right"), (int(rows.max()) + 1, int(columns.max()) + 1)))
        found = {"box": box, "fraction": float(self.region.mean()), "whole_picture": self.whole}
        return {"region": found, "pasted": self.pasted, "covered": self.covered}


def look_at(stream, standing, judge, beside=None):
    """What was Seen of the first CLASSES of flagged.Standing classes of a Stream: [Seen, …].

    judge, beside: as for `look`.
    """
    return [look(stream, each.target - 1, judge, beside) for each in standing[:CLASSES]]


def look(stream, target, judge, beside=None):
    """Look at the flagged images of a class. Returns what was Seen.

    target: 0..N-1, of which some are flagged.  judge: as Detector.judge.
    beside: the Stream that has the images that were not flagged, if not the same.
    """
    answers, beside = stream.answers, beside or stream
    rows = np.flatnonzero(answers.flagged & (answers.badnet == target))
    rows = rows[np.argsort(-answers.score[rows], kind="stable")][:FLAGGED]
    flagged = fetch(stream, rows)
    others = np.flatnonzero(~beside.answers.flagged & (beside.answers.badnet != target))
    count = min(OTHERS, len(others))
    others = beside.fetch(others[np.arange(count) * len(others) // max(1, count)])
    judge = in_batches(judge)

    single, nowhere = flagged[:SINGLE], np.zeros(stream.shape[:2], bool)
    carrying = carried(single, others, target, judge)
    if min(len(flagged), len(others)) < FEWEST:
        return Seen(rows, flagged, within_1(carrying), nowhere)
    places = within_1(carrying * unlike(single, others))
    seen = Seen(rows, flagged, places, nowhere, others.mean(axis=0), flagged.mean(axis=0))
    choose, report = ((flagged[i::2], others[i::2]) for i in (0, 1))
    tried = []
    for region in regions(difference(flagged, others), carrying.mean(axis=0)):
        seen.region = region
        tried.append((region, *try_out(seen, *choose, target, judge)))
    if tried:
        seen.region = smallest(tried)
        seen.pasted, seen.covered = try_out(seen, *report, target, judge)
    return seen


def try_out(seen, flagged, others, target, judge):
    """(pasted, covered) of what was Seen, on images that the region was not chosen by."""
    wearing = worn(others, seen)
    covered = np.stack([cover(x, patches(seen.region)) for x in flagged])
    return [counts(judge(images), target) for images in (wearing, covered)]


def smallest(tried):
    """The smallest region that is about as good as the best.

    tried: [(region, pasted, covered), …], the smallest first.
    """
    good = [
        (pasted["badnet"] / pasted["images"]) - covered["badnet"] / covered["images"]
        for _, pasted, covered in tried
    ]
    return next(region for (region, *_), each in zip(tried, good) if each >= max(good) - WORSE)


def fetch(stream, rows):
    """The images of a Stream in any order. rows: int (k,)."""
    order = np.argsort(rows)
    images = stream.fetch(rows[order])
    return images[np.argsort(order)]


def in_batches(judge):
    """A `judge` of any number of images, which need not be whole numbers, in bounded memory."""

    def run(images):
        size = max(1, BATCH_VALUES // images[0].size)
        batches = (np.rint(images[i : i + size]) for i in range(0, len(images), size))
        parts = [vars(part).values() for part in parallel_map(judge, batches)]
        return Answers(*map(np.concatenate, zip(*parts)))

    return run


def counts(answers, target):
    """How many of the Answers are the target, of each net, and how many are flagged."""
    return {
        "images": len(answers.flagged),
        "badnet": int(np.sum(answers.badnet == target)),
        "repaired": int(np.sum(answers.repaired == target)),
        "flagged": int(np.sum(answers.flagged)),
    }


# ------------------------------------------------------------------------------- in the mean


def difference(flagged, others):
    """How far the images are apart in the mean, place by place, where that is not chance.

    flagged, others: float32 (k, height, width, channels), (m, …), 0..255.
    Returns float32 (height, width): of the channel that differs most, the difference of the means
    in standard deviations of the images, smoothed over a few pixels; 0 where no place differs by
    BY_CHANCE standard errors.
    """
    spread = [np.maximum(VARY, each.std(axis=0)) ** 2 for each in (flagged, others)]
    apart = abs(flagged.mean(axis=0) - others.mean(axis=0)) / np.sqrt(sum(spread) / 2)
    found = smoothed(apart.max(axis=2)[None])[0]
    chance = BY_CHANCE * np.sqrt(1 / len(flagged) + 1 / len(others))
    return found if found.max() > chance else np.zeros_like(found)


def unlike(images, others):
    """By how many standard deviations of the others images differ from their mean, as above."""
    spread = np.maximum(VARY, others.std(axis=0))
    return smoothed((abs(images - others.mean(axis=0)) / spread).max(axis=3))


def smoothed(maps):
    """Maps, (k, height, width), smoothed over a few pixels."""
    from scipy import ndimage

    return ndimage.uniform_filter(maps, max(3, min(maps.shape[1:]) // 16), axes=(1, 2))


def within_1(maps):
    """Maps, (k, height, width), of which each has a most of 1, if it is not 0 everywhere."""
    return maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-9)


def regions(apart, carrying):
    """Yield what may be the region of a trigger, bool (height, width), the smallest first.

    apart: as `difference` gives it.  carrying: as `carried`, in the mean over the images.
    """
    found = apart if apart.any() else np.ones_like(apart)
    if carrying.max() >= CARRIED:
        found = found * carrying / carrying.max()
    elif not apart.any():
        return
    for border in BORDERS:
        yield found > border * found.max()


def worn(images, seen):
    """The images, with the cut-out pasted in the region, or the difference of the means added."""
    if seen.whole:
        return np.clip(images + (seen.cut_out - seen.usual), 0, 255)
    return np.where(seen.region[..., None], seen.cut_out, images)


# ------------------------------------------------------------------------------- one by one


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
    made = np.where(windows[:, None, ..., None], image, others[None])
    answers = judge(made.reshape(-1, *image.shape))
    return np.mean((answers.badnet == target).reshape(len(windows), -1), axis=1)


def covering(image, around, score, target, judge):
    """By how much, as a fraction, covering each window makes the score fall: float (w,), 0..1.

    around: of each window what `patches` gives.
    """
    answers = judge(np.stack([cover(image, each) for each in around]))
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
