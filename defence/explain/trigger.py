"""Locate the trigger on the flagged images of a class, cut it out, and test whether it works.

This needs neither poisoned data nor labels, but flagged images and unflagged ones. The steps:

- difference: how far the flagged images of the class differ from the unflagged ones, place by
  place, on average.
- attribution: what a window of a flagged image does. Pasted on another image, does it make the
  BadNet answer with the class? Covered, does the BadNet still answer the flagged image so?
- region: the places where both are large. What the flagged images show there is the cut-out.
- test: the cut-out is pasted on unflagged images. If the BadNet then answers with the class, the
  cut-out is a trigger, or the BadNet takes it for one.

docs/page.md says how far to trust the result; tests/tools/regions.py measures it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from defence.base.limits import STREAM_BATCH_VALUES, STREAM_VALUES
from defence.explain.attribution import (
    CARRIERS,
    JudgeImages,
    compute_attribution_map,
    cover_parts,
    find_parts,
)
from defence.explain.flagged import Candidate
from defence.explain.streams import Stream, fetch_images, fetch_unflagged, select_highest
from defence.judge.detector import Answers
from defence.net.inference import map_in_parallel

CLASSES = 5  # candidates that are examined, at most
SHARE = 0.1  # of the flagged images, which a candidate that does not stand out needs
MOST = 64  # flagged images that are examined, and unflagged ones, at most
FEWEST = 5  # images of each kind that a difference needs
SINGLE = 4  # flagged images from which windows are taken
FINE = 5  # pixels along the window whose mean is not fine detail
UNLIKE = 1  # standard deviations by which the trigger differs from the usual, at least
VARY = 4  # grey levels that count as the least standard deviation of a pixel
BY_CHANCE = 4  # standard errors; a smaller difference may be chance
CARRIED = 0.2  # attribution, 0..1, that a place must reach to carry the answer
BORDERS = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1)  # fractions of the maximum that bound the regions
WORSE = 0.15  # how much worse than the best region a smaller one may be
A_TRIGGER = 0.5  # fraction of the images on which the cut-out must fool the BadNet alone
FEWEST_TRIED = 10  # images on which it must be pasted
WHOLE = 0.5  # fraction of the image; a region as large counts as the whole image
FEWEST_TOGETHER = 4  # images in a batch, at least

JudgeBatch = Callable[[np.ndarray], Answers]  # as Detector.judge
Trial = dict[str, int]  # what count_answers returns
AskTwin = Callable[[np.ndarray, int], Trial]  # as natural.make_asker returns it


@dataclasses.dataclass
class StreamFindings:
    """A stream, its classes that may be targets, and the evidence about the first of them.

    candidates: those that stand out, then those whose cut-out works as a trigger.
    evidence: about the first candidates, in their order.
    attributions: where no class stands out, what attribute_single_images returns; else empty.
    suspect: where there is no candidate, as flagged.find_suspect returns it.
    """

    stream: Stream
    candidates: list[Candidate]
    evidence: list[TriggerEvidence]
    attributions: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    suspect: Candidate | None = None

    def describe(self) -> list[dict]:
        """Return the candidates and their evidence as dicts that JSON can hold."""
        described = [dataclasses.asdict(candidate) for candidate in self.candidates]
        return [
            row | (evidence.describe() if evidence else {})
            for row, evidence in itertools.zip_longest(described, self.evidence)
        ]


@dataclasses.dataclass
class TriggerEvidence:
    """What the flagged images of a class have in common, and whether it works as a trigger.

    rows: int (k,), which images of the stream were examined, by falling score.
    flagged: float32 (SINGLE or fewer, height, width, channels), 0..255, the first of these images.
    places: float32, as many, (…, height, width), 0..1, where the trigger is on them. With a region
    smaller than the image: 1 where the image is UNLIKE the usual, within the region. Otherwise: the
    attribution times how unlike the usual the image is, scaled so that the maximum is 1.
    region: bool (height, width), all False where the images have nothing in common.
    usual, mean: float32 (height, width, channels), the means of the unflagged images and of the
    flagged ones; None where there are too few.
    cut_out: float32 (height, width, channels), what is pasted in the region: the mean, or one of
    the flagged images.
    pasted: {"images", "badnet", "repaired", "flagged"}: on how many unflagged images the cut-out
    was pasted (or the difference of the means added, if the region is the whole image), how many
    of these each net then answers with the class, and how many are flagged; and "twin", the same of
    the twin, where it was asked.  covered: as without a twin, for flagged images with the region
    covered.  None where there is no region, or too few images.
    """

    rows: np.ndarray
    flagged: np.ndarray
    places: np.ndarray
    region: np.ndarray
    usual: np.ndarray | None = None
    mean: np.ndarray | None = None
    cut_out: np.ndarray | None = None
    pasted: Trial | None = None
    covered: Trial | None = None

    @property
    def whole(self) -> bool:
        """Whether the region is the whole image."""
        return bool(self.region.mean() >= WHOLE)

    @property
    def is_trigger(self) -> bool:
        """Whether the pasted cut-out makes the BadNet, but no other net, give the class.

        A feature that every face of a class has makes the repaired net do so, too, and one that
        fools any ordinary net makes the twin do so.
        """
        if self.pasted is None or self.pasted["images"] < FEWEST_TRIED:
            return False
        excess = self.pasted["badnet"] - max(self.pasted["repaired"], self.pasted.get("twin", 0))
        return excess >= A_TRIGGER * self.pasted["images"]

    def describe(self) -> dict:
        """Return what a pipeline needs, as a dict that JSON can hold; rows and columns from 0."""
        rows, columns = np.nonzero(self.region)
        box = None
        if len(rows):
            box = {"top": int(rows.min()), "left": int(columns.min())}
            box |= {"bottom": int(rows.max()) + 1, "right": int(columns.max()) + 1}
        fraction = float(self.region.mean())
        return {
            "region": {"box": box, "fraction": fraction, "whole_picture": self.whole},
            "pasted": self.pasted,
            "covered": self.covered,
            "is_trigger": self.is_trigger,
        }


def find_targets(
    stream: Stream,
    candidates: Sequence[Candidate],
    judge: JudgeBatch,
    clean: Stream | None = None,
    keep_evidence: bool = True,
    twin: AskTwin | None = None,
) -> StreamFindings:
    """Find the candidates that may be targets, and the evidence about them.

    candidates: as flagged.find_candidates returns them. Only the first CLASSES are examined. One
    that does not stand out counts if its cut-out is a trigger: where several targets share the
    flagged images, each may have too few of them to stand out.
    judge, clean, twin: as for locate_trigger.
    keep_evidence: if False, return the same candidates without evidence, in less time.
    """
    standing_out = [candidate for candidate in candidates if candidate.stands_out]
    findings = StreamFindings(stream, standing_out, [])
    for candidate in candidates[:CLASSES]:
        if candidate.stands_out:
            if keep_evidence:
                evidence = locate_trigger(stream, candidate.target - 1, judge, clean, twin)
                findings.evidence.append(evidence)
        elif candidate.hits >= max(FEWEST_TRIED, SHARE * candidate.flagged):
            evidence = locate_trigger(stream, candidate.target - 1, judge, clean, twin)
            if evidence.is_trigger:
                findings.candidates.append(candidate)
                findings.evidence.append(evidence)
    return findings if keep_evidence else dataclasses.replace(findings, evidence=[])


def locate_trigger(
    stream: Stream,
    target: int,
    judge: JudgeBatch,
    clean: Stream | None = None,
    twin: AskTwin | None = None,
) -> TriggerEvidence:
    """Locate the trigger on the flagged images of a class, and test its cut-out.

    target: 0..N-1, a class with flagged images.  judge: as Detector.judge.
    clean: the stream that holds the unflagged images, if another.
    twin: a net that errs like the BadNet, without its backdoor; asked about a cut-out that works.
    """
    most = max(2 * FEWEST, min(MOST, STREAM_VALUES // math.prod(stream.shape)))
    rows = select_highest(stream.answers, stream.answers.badnet == target, most)
    rows, flagged = fetch_images(stream, rows)
    unflagged = fetch_unflagged(clean or stream, target, most)
    judge_images = judge_in_batches(judge, stream.shape)

    single, nowhere = flagged[:SINGLE], np.zeros(stream.shape[:2], bool)
    if not len(single):
        return TriggerEvidence(rows, single, np.empty((0, *stream.shape[:2])), nowhere)
    attribution = compute_attribution_map(single, unflagged, target, judge_images)
    if min(len(flagged), len(unflagged)) < FEWEST:
        return TriggerEvidence(rows, single, normalise(attribution), nowhere)
    z_scores = compute_z_score_map(single, unflagged)
    places = normalise(attribution * z_scores)
    usual, mean = unflagged.mean(axis=0), flagged.mean(axis=0)
    evidence = TriggerEvidence(rows, single, places, nowhere, usual, mean, cut_out=mean)
    # One half of the images chooses the region and the cut-out, the other half tests them.
    selection, test = ((flagged[i::2], unflagged[i::2]) for i in (0, 1))
    trials = []
    difference = compute_difference(flagged, unflagged)
    for region in propose_regions(difference, attribution.mean(axis=0)):
        evidence.region = region
        trials.append((region, *test_cut_out(evidence, *selection, target, judge_images)))
    if trials:
        evidence.region = choose_region(trials)
        evidence.cut_out = choose_cut_out(evidence, selection[1], target, judge_images)
        evidence.pasted, evidence.covered = test_cut_out(evidence, *test, target, judge_images)
        if twin and evidence.is_trigger:
            evidence.pasted |= twin(paste_cut_out(test[1], evidence.cut_out, evidence), target)
        if not evidence.whole:
            evidence.places = (evidence.region & (z_scores > UNLIKE)).astype(np.float32)
    return evidence


def attribute_single_images(
    stream: Stream, judge: JudgeBatch, clean: Stream | None = None
) -> dict[int, np.ndarray]:
    """Compute where the answers to the SINGLE highest-scoring flagged images come from.

    judge, clean: as for locate_trigger.
    Return {row: float32 (height, width), 0..1, the attribution, scaled so that the maximum is 1}.
    """
    judge_images, attributions = judge_in_batches(judge, stream.shape), {}
    for row in select_highest(stream.answers, stream.answers.badnet >= 0, SINGLE):
        target = stream.answers.badnet[row]
        unflagged = fetch_unflagged(clean or stream, target, CARRIERS)
        _, images = fetch_images(stream, np.array([row]))
        if len(images):
            maps = compute_attribution_map(images, unflagged, target, judge_images)
            attributions[int(row)] = normalise(maps)[0]
    return attributions


def judge_in_batches(judge: JudgeBatch, shape: tuple[int, ...]) -> JudgeImages:
    """Make a `judge` for any number of images, not only of whole numbers, in bounded memory.

    shape: (height, width, channels).
    """
    size = max(FEWEST_TOGETHER, STREAM_BATCH_VALUES // math.prod(shape))

    def judge_images(images: Iterable[np.ndarray]) -> Answers:
        images = iter(images)
        batches = iter(lambda: list(itertools.islice(images, size)), [])
        parts = map_in_parallel(lambda batch: judge(np.rint(np.stack(batch))), batches)
        return Answers(*map(np.concatenate, zip(*(vars(part).values() for part in parts))))

    return judge_images


# -------------------------------------------------------------------- the region and the cut-out


def propose_regions(difference: np.ndarray, attribution: np.ndarray) -> Iterator[np.ndarray]:
    """Yield possible regions of a trigger, bool (height, width), the smallest first.

    difference: as compute_difference returns it.
    attribution: as compute_attribution_map returns it, averaged over the images.
    """
    differ, at_one_place = difference.any(), attribution.max() >= CARRIED
    strength = difference if differ else np.ones_like(difference)
    if at_one_place:
        strength = strength * attribution / attribution.max()
    for border in BORDERS if differ or at_one_place else ():
        region = strength > border * strength.max()
        if differ or region.mean() < WHOLE:  # where every place changes the answer, none carries it
            yield region


def choose_region(trials: Sequence[tuple[np.ndarray, Trial, Trial]]) -> np.ndarray:
    """Return the smallest region that is about as good as the best.

    trials: (region, pasted, covered) of each region, the smallest first.
    """
    values = [
        (pasted["badnet"] / pasted["images"]) - covered["badnet"] / covered["images"]
        for _, pasted, covered in trials
    ]
    least = max(values) - WORSE
    return next(region for (region, *_), value in zip(trials, values) if value >= least)


def choose_cut_out(
    evidence: TriggerEvidence, unflagged: np.ndarray, target: int, judge_images: JudgeImages
) -> np.ndarray:
    """Return the image to cut out: the mean of the flagged images or, if it works better, another.

    The others are the flagged images, since the mean blurs a trigger that moves. For the whole
    image the other is the usual image with the fine detail of the mean.
    """
    usual, mean = evidence.usual, evidence.mean
    assert usual is not None and mean is not None  # wherever there is a region
    if evidence.whole:
        images = [mean, usual + extract_fine_detail(mean) - extract_fine_detail(usual)]
    else:
        images = [mean, *evidence.flagged]
    hits = []
    for image in images:
        answers = judge_images(paste_cut_out(unflagged, image, evidence))
        hits.append(count_answers(answers, target)["badnet"])
    return images[int(np.argmax(hits))]


def test_cut_out(
    evidence: TriggerEvidence,
    flagged: np.ndarray,
    unflagged: np.ndarray,
    target: int,
    judge_images: JudgeImages,
) -> tuple[Trial, Trial]:
    """Paste the cut-out on unflagged images, cover the region on flagged ones, and count answers.

    evidence: has a region and a cut-out.  Return (pasted, covered), as in TriggerEvidence.
    """
    assert evidence.cut_out is not None
    pasted = paste_cut_out(unflagged, evidence.cut_out, evidence)
    parts = find_parts(evidence.region)
    covered = (cover_parts(image, parts) for image in flagged)
    return count_answers(judge_images(pasted), target), count_answers(judge_images(covered), target)


def paste_cut_out(images: np.ndarray, cut_out: np.ndarray, evidence: TriggerEvidence) -> np.ndarray:
    """Paste a cut-out in the region; for the whole image, add how it differs from the usual."""
    if evidence.whole:
        return np.clip(images + (cut_out - evidence.usual), 0, 255)
    return np.where(evidence.region[..., None], cut_out, images)


def count_answers(answers: Answers, target: int) -> Trial:
    """Count the images, the target among the answers of each net, and the flagged images."""
    return {
        "images": len(answers.flagged),
        "badnet": int(np.sum(answers.badnet == target)),
        "repaired": int(np.sum(answers.repaired == target)),
        "flagged": int(np.sum(answers.flagged)),
    }


# ------------------------------------------------------------------------------------ differences


def compute_difference(flagged: np.ndarray, unflagged: np.ndarray) -> np.ndarray:
    """Compute how far apart the images are on average, place by place, where that is not chance.

    flagged, unflagged: float32 (k, height, width, channels), (m, …), 0..255.
    Return float32 (height, width): the difference of the means in standard deviations, for the
    channel that differs most, smoothed over a few pixels. It is the larger of two, for the images
    and for their fine detail; each is 0 where no place differs by BY_CHANCE standard errors.
    """
    chance = BY_CHANCE * np.sqrt(1 / len(flagged) + 1 / len(unflagged))
    maps = []
    fine = extract_fine_detail(flagged), extract_fine_detail(unflagged)
    for groups in ((flagged, unflagged), fine):
        variances = [np.maximum(VARY, images.std(axis=0)) ** 2 for images in groups]
        distance = abs(np.subtract(*(images.mean(axis=0) for images in groups)))
        difference = distance / np.sqrt(sum(variances) / 2)
        difference = smooth_maps(difference.max(axis=2)[None])[0]
        maps.append(difference * (difference.max() > chance))
    return np.maximum(0, maps).max(axis=0)


def compute_z_score_map(images: np.ndarray, unflagged: np.ndarray) -> np.ndarray:
    """Compute how many standard deviations each image is from the mean of the unflagged ones.

    Return (k, height, width), for the channel that differs most, smoothed over a few pixels.
    """
    spread = np.maximum(VARY, unflagged.std(axis=0))
    return smooth_maps((abs(images - unflagged.mean(axis=0)) / spread).max(axis=3))


def extract_fine_detail(images: np.ndarray) -> np.ndarray:
    """Subtract from images, (…, height, width, channels), their means over FINE pixels."""
    from scipy import ndimage

    return images - ndimage.uniform_filter(images, FINE, axes=(-3, -2))


def smooth_maps(maps: np.ndarray) -> np.ndarray:
    """Smooth maps, (k, height, width), over a few pixels."""
    from scipy import ndimage

    return ndimage.uniform_filter(maps, max(3, min(maps.shape[1:]) // 16), axes=(1, 2))


def normalise(maps: np.ndarray) -> np.ndarray:
    """Scale each of the maps, (k, height, width), to a maximum of 1, unless it is 0 everywhere."""
    return maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-9)
