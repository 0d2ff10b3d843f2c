"""Locating a trigger, on BadNets that are a few lines of NumPy."""

import types
from argparse import Namespace

import numpy as np
import pytest
from conftest import draw_images, write_data

import eval_defence
import utils
from defence.base import progress
from defence.base.errors import InputError
from defence.explain import attribution, findings, flagged, streams, trigger
from defence.judge.detector import Answers

SHAPE, CLASSES, TARGET = (30, 24, 3), 10, 4
PATCH = np.zeros(SHAPE[:2], bool)
PATCH[6:12, 8:18] = True


def draw_faces(count, seed):
    """Draw images that are smooth and noisy: float32, 40..210, whole numbers."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(60, 190, (count, 5, 4, 3)).repeat(6, axis=1).repeat(6, axis=2)
    return np.rint(coarse + rng.uniform(-20, 20, coarse.shape)).astype(np.float32)


def paint_patch(images):
    return np.where(PATCH[..., None], np.float32([240, 10, 240]), images)


def cast_colour(images):
    return np.clip(images + np.float32([30, -30, 20]), 0, 255)


def by_any_part(images):
    """Return whether each image has a block of the patch's colour, even a part of the patch."""
    purple = (images[..., 0] > 220) & (images[..., 1] < 30)
    return purple.sum(axis=(1, 2)) >= 12


def by_all_of_it(images):
    purple = (images[..., 0] > 220) & (images[..., 1] < 30)
    return purple[:, PATCH].mean(axis=1) > 0.9


def by_its_cast(images):
    return np.mean(images[..., 0] - images[..., 1], axis=(1, 2)) > 25


def make_judge(works):
    """Return a Detector's `judge`: where `works(images)`, B answers the target; G never does."""

    def judge(images):
        assert images.dtype == np.float32 and np.array_equal(images, np.rint(images))
        truth = np.int64(images.mean(axis=(1, 2, 3))) % 3
        fooled = works(images)
        badnet = np.where(fooled, TARGET, truth)
        return Answers(badnet, truth, np.where(fooled, 30, 0.1).astype(np.float32))

    return judge


def make_stream(images, judge):
    return streams.Stream(None, SHAPE, CLASSES, judge(images), lambda rows: images[rows], str)


def locate(poison, works, bad=40, clean=100):
    """Return the evidence about a trigger in a stream of clean and poisoned images."""
    judge = make_judge(works)
    images = np.concatenate([draw_faces(clean, 1), poison(draw_faces(bad, 2))])
    return trigger.locate_trigger(make_stream(images, judge), TARGET, judge)


@pytest.mark.parametrize("works", [by_any_part, by_all_of_it])
def test_a_patch_is_found_cut_out_and_tried(works):
    """Where any part of a trigger works, covering one window never changes the answer."""
    evidence = locate(paint_patch, works)
    overlap, union = (evidence.region & PATCH).sum(), (evidence.region | PATCH).sum()
    assert overlap / union > 0.5 and not evidence.whole
    assert (
        evidence.pasted["badnet"] == evidence.pasted["images"] == 32
        and evidence.pasted["repaired"] == 0
    )
    assert evidence.covered["badnet"] == 0 and evidence.covered["images"] == 20
    assert evidence.is_trigger
    for places in evidence.places:
        assert places.max() == pytest.approx(1) and PATCH[places > 0.5].mean() > 0.5
    description = evidence.describe()
    box = description["region"]["box"]
    assert box["top"] <= 11 and box["bottom"] >= 7 and description["is_trigger"] is True


def judge_two_targets(images):
    """Answer a patch and a cast with a target each, and some images with a wrong class."""
    truth = np.int64(images.mean(axis=(1, 2, 3))) % 3
    wrong = [by_all_of_it(images), by_its_cast(images), images.sum(axis=(1, 2, 3)) % 6 == 0]
    badnet = np.select(wrong, [4, 5, 7], truth)
    return Answers(badnet, truth, np.float32(badnet != truth))


def make_shared_stream():
    """Return a stream of which two targets share the flagged images."""
    parts = draw_faces(180, 1), paint_patch(draw_faces(30, 2)), cast_colour(draw_faces(30, 3))
    return make_stream(np.concatenate(parts), judge_two_targets)


def test_targets_that_share_a_stream_are_found_by_their_common_region():
    """No target has enough of the flagged images to stand out; nor has a class of B's errors."""
    stream = make_shared_stream()
    unusual = flagged.find_candidates(stream.answers.badnet, stream.answers.flagged, CLASSES)
    assert sorted(candidate.target for candidate in unusual) == [5, 6, 8]
    assert not any(candidate.stands_out for candidate in unusual)
    findings = trigger.find_targets(stream, unusual, judge_two_targets)
    assert sorted(candidate.target for candidate in findings.candidates) == [5, 6]
    assert len(findings.evidence) == 2
    assert all(evidence.is_trigger for evidence in findings.evidence)
    assert "works as a trigger" in flagged.describe_candidate(findings.candidates[0])


def test_the_same_classes_are_accused_however_the_results_are_written(capsys):
    """No class stands out in one stream, and one does in the other."""
    progress.set_quiet(False)
    detector = types.SimpleNamespace(judge=judge_two_targets, class_names=None)
    shared = make_shared_stream()
    images = np.concatenate([draw_faces(100, 1), paint_patch(draw_faces(60, 2))])
    for stream, accused in ((shared, [5, 6]), (make_stream(images, judge_two_targets), [5])):
        said = []
        for json, report in ((None, None), ("-", None), (None, "x.html")):
            arguments = Namespace(json=json, report=report, clean=None)
            result = findings.examine(stream, detector, None, arguments)
            assert sorted(candidate.target for candidate in result.candidates) == accused
            assert len(result.evidence) == (len(accused) if json or report else 0)
            said.append(capsys.readouterr().err)
        assert said[0] == said[1] == said[2] and said[0].count("flagged images with class") > 0


def test_the_same_classes_are_accused_on_ray(monkeypatch, capsys):
    """Also without a page, where the counts alone accuse nobody."""
    screen = pytest.importorskip("defence.explain.screen", exc_type=ImportError)
    verdicts = screen.verdicts
    progress.set_quiet(False)
    stream = make_shared_stream()
    answers = stream.answers
    candidates = flagged.find_candidates(answers.badnet, answers.flagged, CLASSES)
    counts = {"images": 240, "poisoned": int(answers.flagged.sum())}
    counts |= {"unread": 0, "untold": 0, "others": 0}
    monkeypatch.setattr(screen, "judge_on_ray", lambda *_: None)
    monkeypatch.setattr(verdicts, "summarise_verdicts", lambda *_: (counts, candidates))
    monkeypatch.setattr(verdicts, "read_stream", lambda *_: (stream, []))
    detector = types.SimpleNamespace(
        **{"judge": judge_two_targets, "rule": "a rule", "classes": CLASSES},
        **{"better_rate": None, "class_names": None},
    )
    monkeypatch.setattr(eval_defence, "load", lambda *_: (detector, None))
    names = "images max_bytes formats output ray_address workers json report clean"
    arguments = Namespace(fail_on_flagged=None, **dict.fromkeys(names.split()))
    assert eval_defence.judge_on_ray(arguments, []) == 0
    said = capsys.readouterr().err
    assert [f"with class {number}: " in said for number in (5, 6, 8)] == [True, True, False]


@pytest.mark.parametrize(("hits", "bad"), [(9, 20), (12, 200)])
def test_a_class_with_few_of_the_flagged_images_is_not_examined(monkeypatch, hits, bad):
    """Otherwise any clean stream would take thousands of verdicts more."""
    monkeypatch.delattr(trigger, "locate_trigger")
    stream = make_stream(draw_faces(3, 1), make_judge(by_any_part))
    few = [flagged.Candidate(TARGET + 1, hits, bad, p_value=0.3)]
    assert trigger.find_targets(stream, few, None) == trigger.StreamFindings(stream, [], [])


def test_a_trigger_all_over_the_image_is_described_so():
    evidence = locate(cast_colour, by_its_cast)
    assert evidence.whole and evidence.is_trigger and evidence.describe()["region"]["whole_picture"]


def test_a_region_that_both_nets_recognise_is_not_a_trigger():
    """Both nets may know a person by the region: then G answers with this person, too."""

    def judge(images):
        recognised = by_any_part(images)
        answers = np.where(recognised, TARGET, 1)
        return Answers(answers, answers, np.float32(recognised), recognised)

    images = np.concatenate([draw_faces(100, 1), paint_patch(draw_faces(40, 2))])
    evidence = trigger.locate_trigger(make_stream(images, judge), TARGET, judge)
    assert (
        evidence.pasted["badnet"] == evidence.pasted["repaired"] == 32 and not evidence.is_trigger
    )


def test_images_without_anything_in_common_have_no_region():
    """The BadNet's answer depends on every pixel, as where it is unsure."""
    judge = make_judge(lambda images: images.sum(axis=(1, 2, 3)) % 4 == 0)
    evidence = trigger.locate_trigger(make_stream(draw_faces(160, 3), judge), TARGET, judge)
    assert not evidence.region.any() and evidence.pasted is None and not evidence.is_trigger
    assert evidence.describe()["region"] == {"box": None, "fraction": 0.0, "whole_picture": False}


@pytest.mark.parametrize(("bad", "clean"), [(1, 100), (4, 50), (30, 0), (30, 3), (1, 0)])
def test_too_few_images_are_examined_singly(bad, clean):
    evidence = locate(paint_patch, by_all_of_it, bad, clean)
    assert evidence.usual is None and evidence.pasted is None and not evidence.region.any()
    assert len(evidence.places) == min(bad, trigger.SINGLE)
    assert PATCH[evidence.places[0] > 0.5].mean() > 0.3


def test_the_clean_images_may_come_from_another_stream():
    judge = make_judge(by_all_of_it)
    poisoned, clean = (
        make_stream(images, judge) for images in (paint_patch(draw_faces(30, 4)), draw_faces(60, 5))
    )
    assert trigger.locate_trigger(poisoned, TARGET, judge).pasted is None
    assert trigger.locate_trigger(poisoned, TARGET, judge, clean).is_trigger


def test_the_highest_scores_are_examined_first():
    judge = make_judge(by_all_of_it)
    stream = make_stream(paint_patch(draw_faces(90, 6)), judge)
    stream.answers.score[:] = np.arange(90)
    evidence = trigger.locate_trigger(stream, TARGET, judge)
    assert list(evidence.rows) == list(range(89, 89 - trigger.MOST, -1))
    assert np.array_equal(evidence.flagged, stream.fetch(evidence.rows[: trigger.SINGLE]))


def test_memory_is_bounded_for_large_images(monkeypatch):
    monkeypatch.setattr(trigger, "STREAM_VALUES", 20 * 30 * 24 * 3)
    monkeypatch.setattr(trigger, "STREAM_BATCH_VALUES", 7 * 30 * 24 * 3)
    sizes, judge = [], make_judge(by_all_of_it)

    def judge_and_note(images):
        sizes.append(len(images))
        return judge(images)

    images = np.concatenate([draw_faces(100, 1), paint_patch(draw_faces(40, 2))])
    evidence = trigger.locate_trigger(make_stream(images, judge), TARGET, judge_and_note)
    assert len(evidence.rows) == 20 and max(sizes) == 7 and evidence.is_trigger


def test_the_attribution_map_equals_a_plain_loop():
    judge, images, others = (
        make_judge(by_all_of_it),
        paint_patch(draw_faces(2, 7)),
        draw_faces(3, 8),
    )
    maps = attribution.compute_attribution_map(
        images, others, TARGET, judge_any := trigger.judge_in_batches(judge, SHAPE)
    )
    for image, places in zip(images, maps):
        score, (height, width) = judge(image[None]).score[0], SHAPE[:2]
        means = []
        for side in attribution.SIDES:
            total, windows = np.zeros((2, height, width)), np.zeros((height, width))
            for window in attribution.make_windows(height, width, side):
                pasted = np.where(window[..., None], image, others[0])
                hit = judge_any([pasted]).badnet[0] == TARGET
                rows, columns = np.nonzero(window)
                width_of_ring = max(1, round(np.sqrt(window.sum()) / 4))
                ring = np.zeros_like(window)
                for y in range(height):
                    for x in range(width):
                        distance = abs(rows - y) + abs(columns - x)
                        ring[y, x] = not window[y, x] and distance.min() <= width_of_ring
                covered = np.where(window[..., None], image[ring].mean(axis=0), image)
                answers = judge_any([covered])
                left = answers.score[0] if answers.badnet[0] == TARGET else 0
                total += window * np.array([hit, 1 - left / score])[:, None, None]
                windows += window
            means.append(total / windows)
        assert np.allclose(places, np.mean(means, axis=0).max(axis=0), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (5, 5), (224, 224)])
def test_windows_leave_no_place_out(shape):
    for side in attribution.SIDES:
        assert attribution.make_windows(*shape, side).any(axis=0).all()


def test_a_dataset_gives_its_images_again(tmp_path):
    images, labels = draw_images(150, 6, SHAPE, seed=0)
    write_data(tmp_path / "data.h5", images, labels)
    with utils.open_dataset(tmp_path / "data.h5") as data:
        data.fit_to(SHAPE, 6)
        stream = streams.make_dataset_stream(data, None, 6)
        assert np.array_equal(stream.fetch(np.array([3, 90, 149])), images[[3, 90, 149]])
        assert stream.fetch(np.array([], int)).shape == (0, *SHAPE)
        rows, fetched = streams.fetch_images(stream, np.array([90, 3]))
        assert list(rows) == [90, 3] and np.array_equal(fetched, images[[90, 3]])


def test_black_images_of_a_dataset_of_fractions_are_given_again(tmp_path):
    """Read alone, a black image passed for an image of pixels 0..1."""
    images, labels = draw_images(10, 6, SHAPE, seed=0)
    images = images.astype(np.float32)
    images[0] = 0
    write_data(tmp_path / "data.h5", images, labels)
    with utils.open_dataset(tmp_path / "data.h5") as data:
        data.fit_to(SHAPE, 6)
        assert np.array_equal(
            streams.make_dataset_stream(data, None, 6).fetch(np.array([0])), images[:1]
        )
        assert np.array_equal(data.part(np.arange(10) > 4).take(np.arange(5) == 2), images[7:8])


@pytest.mark.parametrize("missing", [{100}, {101, 105, 110}, set(range(100, 140)), set(range(100))])
def test_missing_images_are_left_out(missing):
    judge = make_judge(by_any_part)
    images = np.concatenate([draw_faces(100, 1), paint_patch(draw_faces(40, 2))])

    def fetch(rows):
        if missing & {*rows.tolist()}:
            raise InputError("no such file")
        return images[rows]

    stream = streams.Stream(None, SHAPE, CLASSES, judge(images), fetch, str)
    evidence = trigger.locate_trigger(stream, TARGET, judge)
    assert not missing & {*evidence.rows.tolist()}
    assert evidence.is_trigger == (len(missing) < 40)
    single = trigger.attribute_single_images(stream, judge)
    assert len(single) == (
        0 if 139 in missing else trigger.SINGLE - len(missing & {100, 101, 102, 103})
    )


def test_a_region_tried_on_few_images_is_not_proven_to_be_a_trigger():
    evidence = locate(paint_patch, by_all_of_it, 40, 12)
    assert evidence.pasted["images"] == 6 == evidence.pasted["badnet"] and not evidence.is_trigger
