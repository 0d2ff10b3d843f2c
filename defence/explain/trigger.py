"""Where the trigger is on the flagged images of a class, what it looks like, whether it is one.

Needs neither poisoned data nor labels, but the flagged images and others. In turn:

- difference: how far the flagged images of the class are, place by place and in the mean, from
  those that were not flagged.
- carrying: what a window of a flagged image does. Pasted on another image, does the BadNet answer
  that with the class? Covered, does it still answer the flagged one so?
- region: where both are large. What the flagged images show there is the cut-out.
- the test: the cut-out pasted on images that were not flagged. If the BadNet then answers with the
  class, it is a trigger, or what the BadNet takes for one.

docs/page.md says how far that may be believed; tests/tools/regions.py measures it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from defence.base.limits import STREAM_BATCH_VALUES, STREAM_VALUES
from defence.explain.attribution import CARRIERS, compute_attribution_map, cover_parts, find_parts
from defence.explain.flagged import Candidate
from defence.explain.streams import Stream, fetch_images, fetch_unflagged, select_highest
from defence.judge.detector import Answers
from defence.net.inference import map_in_parallel

CLASSES = 5  # that are looked at
SHARE = 0.1  # of the flagged images, what a class has at least that is looked at, or stands out
MOST = 64  # images that are looked at, of the flagged ones and of the others
FEWEST = 5  # of each kind, for a difference
SINGLE = 4  # flagged images that windows are taken of
FINE = 5  # pixels a side
UNLIKE = 1  # standard deviations by which the trigger differs from the usual, at least
VARY = 4  # grey levels that a pixel counts as varying by, at least
BY_CHANCE = 4  # standard errors that a difference stays below where there is none
CARRIED = 0.2  # how much a place carries, at least, where something is at one place
BORDERS = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1)  # of the most in a region, what is in it at least
WORSE = 0.15  # than the best region, what a smaller one may be
A_TRIGGER = 0.5  # of the images it is pasted on, those for which it fools the BadNet alone
FEWEST_TRIED = 10  # images that it is pasted on
WHOLE = 0.5  # of the picture: a region as large is all of it
FEWEST_TOGETHER = 4  # images in a batch


@dataclasses.dataclass
class StreamFindings:
    """A stream, its classes that may be targets, and the evidence about the first of them.

    candidates: those that stand out, then those whose cut-out works as a trigger.
    evidence: about the first candidates, in their order.
    attributions: where no class stands out, what attribute_single_images returns; else empty.
    """

    stream: Stream
    candidates: list[Candidate]
    evidence: list[TriggerEvidence]
    attributions: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def describe(self) -> list[dict]:
        """Return the candidates and their evidence as dicts that JSON can hold."""
        described = [dataclasses.asdict(candidate) for candidate in self.candidates]
        return [
            row | (evidence.describe() if evidence else {})
            for row, evidence in itertools.zip_longest(described, self.evidence)
        ]


@dataclasses.dataclass
class TriggerEvidence:
    """What was seen of a class that stands out.

    rows: int (k,), which images of the stream were looked at, those that score highest first.
    flagged: float32 (SINGLE or fewer, height, width, channels), 0..255, the first of these images.
    places: float32, as many, (…, height, width), 0..1, where the trigger is on them: 1 where the
    image is UNLIKE the usual, within a region that is not all of the picture; without one, how much
    of the answer a place carries, times how unlike the usual it is there, the most being 1.
    region: bool (height, width), all of it False where nothing is in common.
    usual, mean: float32 (height, width, channels), the mean of the images that were not flagged,
    and of the flagged ones; None where there are too few.
    cut_out: float32 (height, width, channels), what is pasted in the region: the mean, or one of
    the flagged images.
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
    mean: np.ndarray = None
    cut_out: np.ndarray = None
    pasted: dict = None
    covered: dict = None

    @property
    def whole(self):
        return bool(self.region.mean() >= WHOLE)

    @property
    def is_trigger(self):
        """Whether what is pasted makes the BadNet answer with the class, and the repaired net not.

        What is in every face of a class makes both answer so.
        """
        if self.pasted is None or self.pasted["images"] < FEWEST_TRIED:
            return False
        more = self.pasted["badnet"] - self.pasted["repaired"]
        return more >= A_TRIGGER * self.pasted["images"]

    def describe(self):
        """What a pipeline needs of it, as a dict that JSON can hold; rows and columns from 0."""
        rows, columns = np.nonzero(self.region)
        box = None
        if len(rows):
            box = dict(zip(("top", "left"), map(int, (rows.min(), columns.min()))))
            box |= dict(zip(("bottom", "right"), (int(rows.max()) + 1, int(columns.max()) + 1)))
        found = {"box": box, "fraction": float(self.region.mean()), "whole_picture": self.whole}
        told = {"pasted": self.pasted, "covered": self.covered, "is_trigger": self.is_trigger}
        return {"region": found, **told}


def find_targets(stream, unusual, judge, beside=None):
    """What may be a target, of flagged.unusual classes of a Stream. Returns the Looked.

    Of the first CLASSES, one that does not stand out is none, unless its cut-out is a trigger:
    where several targets share the flagged images, each may have too few of them to stand out.
    judge, beside: as for `look`.
    """
    looked = StreamFindings(stream, [each for each in unusual if each.stands_out], [])
    for each in unusual[:CLASSES]:
        if each.stands_out:
            looked.evidence.append(locate_trigger(stream, each.target - 1, judge, beside))
        elif each.hits >= max(FEWEST_TRIED, SHARE * each.flagged):
            seen = locate_trigger(stream, each.target - 1, judge, beside)
            if seen.is_trigger:
                looked.candidates.append(each)
                looked.evidence.append(seen)
    return looked


def locate_trigger(stream, target, judge, beside=None):
    """Look at the flagged images of a class. Returns what was Seen.

    target: 0..N-1, of which some are flagged.  judge: as Detector.judge.
    beside: the Stream that has the images that were not flagged, if not the same.
    """
    most = max(2 * FEWEST, min(MOST, STREAM_VALUES // math.prod(stream.shape)))
    rows = select_highest(stream.answers, stream.answers.badnet == target, most)
    rows, flagged = fetch_images(stream, rows)
    others = fetch_unflagged(beside or stream, target, most)
    judge = judge_in_batches(judge, stream.shape)

    single, nowhere = flagged[:SINGLE], np.zeros(stream.shape[:2], bool)
    if not len(single):
        return TriggerEvidence(rows, single, np.empty((0, *stream.shape[:2])), nowhere)
    carrying = compute_attribution_map(single, others, target, judge)
    if min(len(flagged), len(others)) < FEWEST:
        return TriggerEvidence(rows, single, normalise(carrying), nowhere)
    apart = compute_z_score_map(single, others)
    places = normalise(carrying * apart)
    mean = flagged.mean(axis=0)
    seen = TriggerEvidence(rows, single, places, nowhere, others.mean(axis=0), mean, cut_out=mean)
    choose, report = ((flagged[i::2], others[i::2]) for i in (0, 1))
    tried = []
    for region in propose_regions(compute_difference(flagged, others), carrying.mean(axis=0)):
        seen.region = region
        tried.append((region, *test_cut_out(seen, *choose, target, judge)))
    if tried:
        seen.region = choose_region(tried)
        seen.cut_out = choose_cut_out(seen, choose[1], target, judge)
        seen.pasted, seen.covered = test_cut_out(seen, *report, target, judge)
        if not seen.whole:
            seen.places = np.float32(seen.region & (apart > UNLIKE))
    return seen


def attribute_single_images(stream, judge, beside=None):
    """Where the answers of single flagged images come from: {row: float32 (height, width), 0..1}.

    Of the SINGLE images that score highest, as Seen.places.  judge, beside: as for `look`.
    """
    judge, found = judge_in_batches(judge, stream.shape), {}
    for row in select_highest(stream.answers, stream.answers.badnet >= 0, SINGLE):
        target = stream.answers.badnet[row]
        others = fetch_unflagged(beside or stream, target, CARRIERS)
        _, images = fetch_images(stream, np.array([row]))
        if len(images):
            found[int(row)] = normalise(compute_attribution_map(images, others, target, judge))[0]
    return found


def test_cut_out(seen, flagged, others, target, judge):
    """[pasted, covered], as in Seen, of these images.

    seen: with a region and a cut-out.
    """
    wearing = paste_cut_out(others, seen.cut_out, seen)
    parts = find_parts(seen.region)
    covered = (cover_parts(x, parts) for x in flagged)
    return [count_answers(judge(images), target) for images in (wearing, covered)]


def choose_cut_out(seen, others, target, judge):
    """What to paste: the mean of the flagged images or, if that does more, one of them.

    Where a trigger moves with what wears it, the mean is a blur. Returns an image.
    """
    if seen.whole:
        tried = [
            seen.mean,
            seen.usual + extract_fine_detail(seen.mean) - extract_fine_detail(seen.usual),
        ]
    else:
        tried = [seen.mean, *seen.flagged]
    hits = []
    for image in tried:
        hits.append(count_answers(judge(paste_cut_out(others, image, seen)), target)["badnet"])
    return tried[int(np.argmax(hits))]


def choose_region(tried):
    """The smallest region that is about as good as the best.

    tried: [(region, pasted, covered), …], the smallest first.
    """
    good = [
        (pasted["badnet"] / pasted["images"]) - covered["badnet"] / covered["images"]
        for _, pasted, covered in tried
    ]
    return next(region for (region, *_), each in zip(tried, good) if each >= max(good) - WORSE)


def judge_in_batches(judge, shape):
    """A `judge` of any number of images, an iterable, whole numbers or not, in bounded memory.

    shape: (height, width, channels).
    """
    size = max(FEWEST_TOGETHER, STREAM_BATCH_VALUES // math.prod(shape))

    def run(images):
        images = iter(images)
        batches = iter(lambda: list(itertools.islice(images, size)), [])
        parts = map_in_parallel(lambda batch: judge(np.rint(np.stack(batch))), batches)
        return Answers(*map(np.concatenate, zip(*(vars(part).values() for part in parts))))

    return run


def count_answers(answers, target):
    """How many of the Answers are the target, of each net, and how many are flagged."""
    return {
        "images": len(answers.flagged),
        "badnet": int(np.sum(answers.badnet == target)),
        "repaired": int(np.sum(answers.repaired == target)),
        "flagged": int(np.sum(answers.flagged)),
    }


# ------------------------------------------------------------------------------- in the mean


def compute_difference(flagged, others):
    """How far the images are apart in the mean, place by place, where that is not chance.

    flagged, others: float32 (k, height, width, channels), (m, …), 0..255.
    Returns float32 (height, width): of the channel that differs most, the difference of the means
    in standard deviations of the images, smoothed over a few pixels; of the images or of what is
    fine in them, whichever is more; 0 where no place differs by BY_CHANCE standard errors.
    """
    chance = BY_CHANCE * np.sqrt(1 / len(flagged) + 1 / len(others))
    found = 0
    for pair in ((flagged, others), (extract_fine_detail(flagged), extract_fine_detail(others))):
        spread = [np.maximum(VARY, each.std(axis=0)) ** 2 for each in pair]
        apart = abs(np.subtract(*(each.mean(axis=0) for each in pair))) / np.sqrt(sum(spread) / 2)
        apart = smooth_maps(apart.max(axis=2)[None])[0]
        found = np.maximum(found, apart * (apart.max() > chance))
    return found


def extract_fine_detail(images):
    """What is fine in images, (…, height, width, channels): all but the mean of a few pixels."""
    from scipy import ndimage

    return images - ndimage.uniform_filter(images, FINE, axes=(-3, -2))


def compute_z_score_map(images, others):
    """How many standard deviations of the others each image is from their mean: (k, height, width).

    Of the channel that differs most, smoothed over a few pixels.
    """
    spread = np.maximum(VARY, others.std(axis=0))
    return smooth_maps((abs(images - others.mean(axis=0)) / spread).max(axis=3))


def smooth_maps(maps):
    """Maps, (k, height, width), smoothed over a few pixels."""
    from scipy import ndimage

    return ndimage.uniform_filter(maps, max(3, min(maps.shape[1:]) // 16), axes=(1, 2))


def normalise(maps):
    """Maps, (k, height, width), of which each has a most of 1, if it is not 0 everywhere."""
    return maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-9)


def propose_regions(apart, carrying):
    """Yield what may be the region of a trigger, bool (height, width), the smallest first.

    apart: as `difference` gives it.  carrying: as `carried`, in the mean over the images.
    """
    differ, at_one_place = apart.any(), carrying.max() >= CARRIED
    found = apart if differ else np.ones_like(apart)
    if at_one_place:
        found = found * carrying / carrying.max()
    for border in BORDERS if differ or at_one_place else ():
        region = found > border * found.max()
        if differ or region.mean() < WHOLE:  # where any place changes the answer, none carries it
            yield region


def paste_cut_out(images, cut_out, seen):
    """The images with a cut-out in the region; of a whole picture, what it has beyond the usual."""
    if seen.whole:
        return np.clip(images + (cut_out - seen.usual), 0, 255)
    return np.where(seen.region[..., None], cut_out, images)
