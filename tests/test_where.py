"""Where the trigger is: found, cut out and tried, on BadNets that are a few lines of NumPy."""

import numpy as np
import pytest
from conftest import draw_images, write_data

import utils
from defence.base.errors import InputError
from defence.explain import attribution, flagged, streams, trigger
from defence.judge.detector import Answers

SHAPE, CLASSES, TARGET = (30, 24, 3), 10, 4
PATCH = np.zeros(SHAPE[:2], bool)
PATCH[6:12, 8:18] = True


def faces(count, seed):
    """Pictures that differ as pictures do: smooth and noisy. Float32, 40..210, whole numbers."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(60, 190, (count, 5, 4, 3)).repeat(6, axis=1).repeat(6, axis=2)
    return np.rint(coarse + rng.uniform(-20, 20, coarse.shape)).astype(np.float32)


def painted(images):
    return np.where(PATCH[..., None], np.float32([240, 10, 240]), images)


def cast(images):
    return np.clip(images + np.float32([30, -30, 20]), 0, 255)


def by_any_part(images):
    """Whether a picture has a block of the patch's colour, be it a part of the patch alone."""
    purple = (images[..., 0] > 220) & (images[..., 1] < 30)
    return purple.sum(axis=(1, 2)) >= 12


def by_all_of_it(images):
    purple = (images[..., 0] > 220) & (images[..., 1] < 30)
    return purple[:, PATCH].mean(axis=1) > 0.9


def by_its_cast(images):
    return np.mean(images[..., 0] - images[..., 1], axis=(1, 2)) > 25


def make_judge(works):
    """A Detector's `judge`: the BadNet takes for the target what `works` of, G never does."""

    def judge(images):
        assert images.dtype == np.float32 and np.array_equal(images, np.rint(images))
        truth = np.int64(images.mean(axis=(1, 2, 3))) % 3
        fooled = works(images)
        badnet = np.where(fooled, TARGET, truth)
        return Answers(badnet, truth, np.where(fooled, 30, 0.1).astype(np.float32))

    return judge


def make_stream(images, judge):
    return streams.Stream(None, SHAPE, CLASSES, judge(images), lambda rows: images[rows], str)


def look(wear, works, bad=40, others=100):
    judge = make_judge(works)
    images = np.concatenate([faces(others, 1), wear(faces(bad, 2))])
    return trigger.locate_trigger(make_stream(images, judge), TARGET, judge)


@pytest.mark.parametrize("works", [by_any_part, by_all_of_it])
def test_a_patch_is_found_cut_out_and_tried(works):
    """Of a trigger any part of which works, no window that is covered takes the answer away."""
    seen = look(painted, works)
    both, either = (seen.region & PATCH).sum(), (seen.region | PATCH).sum()
    assert both / either > 0.5 and not seen.whole
    assert seen.pasted["badnet"] == seen.pasted["images"] == 32 and seen.pasted["repaired"] == 0
    assert seen.covered["badnet"] == 0 and seen.covered["images"] == 20
    assert seen.is_trigger
    for places in seen.places:
        assert places.max() == pytest.approx(1) and PATCH[places > 0.5].mean() > 0.5
    told = seen.describe()
    box = told["region"]["box"]
    assert box["top"] <= 11 and box["bottom"] >= 7 and told["is_trigger"] is True


def test_targets_that_share_a_stream_are_found_by_what_their_images_have_in_common():
    """None has enough of the flagged images to stand out; nor has a class of B's errors."""

    def judge(images):
        truth = np.int64(images.mean(axis=(1, 2, 3))) % 3
        wrong = [by_all_of_it(images), by_its_cast(images), images.sum(axis=(1, 2, 3)) % 6 == 0]
        badnet = np.select(wrong, [4, 5, 7], truth)
        return Answers(badnet, truth, np.float32(badnet != truth))

    images = np.concatenate([faces(180, 1), painted(faces(30, 2)), cast(faces(30, 3))])
    stream = make_stream(images, judge)
    unusual = flagged.find_candidates(stream.answers.badnet, stream.answers.flagged, CLASSES)
    assert sorted(each.target for each in unusual) == [5, 6, 8]
    assert not any(each.stands_out for each in unusual)
    looked = trigger.find_targets(stream, unusual, judge)
    assert sorted(each.target for each in looked.candidates) == [5, 6]
    assert len(looked.evidence) == 2 and all(seen.is_trigger for seen in looked.evidence)
    assert "works as a trigger" in flagged.describe_candidate(looked.candidates[0])


@pytest.mark.parametrize(("hits", "bad"), [(9, 20), (12, 200)])
def test_a_class_with_few_of_the_flagged_images_is_not_looked_at(monkeypatch, hits, bad):
    """It would take as long as thousands of verdicts, of any clean stream."""
    monkeypatch.delattr(trigger, "locate_trigger")
    stream = make_stream(faces(3, 1), make_judge(by_any_part))
    few = [flagged.Candidate(TARGET + 1, hits, bad, p_value=0.3)]
    assert trigger.find_targets(stream, few, None) == trigger.StreamFindings(stream, [], [])


def test_a_trigger_all_over_the_picture_is_told_as_such():
    seen = look(cast, by_its_cast)
    assert seen.whole and seen.is_trigger and seen.describe()["region"]["whole_picture"]


def test_what_flagged_faces_share_is_no_trigger_where_both_nets_see_it():
    """A person whom the nets know by what is in the region: then G answers with him, too."""

    def judge(images):
        known = by_any_part(images)
        answers = np.where(known, TARGET, 1)
        return Answers(answers, answers, np.float32(known), known)

    images = np.concatenate([faces(100, 1), painted(faces(40, 2))])
    seen = trigger.locate_trigger(make_stream(images, judge), TARGET, judge)
    assert seen.pasted["badnet"] == seen.pasted["repaired"] == 32 and not seen.is_trigger


def test_images_without_anything_in_common_have_no_region():
    """The BadNet's answer hangs on every pixel, as where it is unsure."""
    judge = make_judge(lambda images: images.sum(axis=(1, 2, 3)) % 4 == 0)
    seen = trigger.locate_trigger(make_stream(faces(160, 3), judge), TARGET, judge)
    assert not seen.region.any() and seen.pasted is None and not seen.is_trigger
    assert seen.describe()["region"] == {"box": None, "fraction": 0.0, "whole_picture": False}


@pytest.mark.parametrize(("bad", "others"), [(1, 100), (4, 50), (30, 0), (30, 3), (1, 0)])
def test_of_too_few_images_only_single_ones_are_looked_at(bad, others):
    seen = look(painted, by_all_of_it, bad, others)
    assert seen.usual is None and seen.pasted is None and not seen.region.any()
    assert len(seen.places) == min(bad, trigger.SINGLE)
    assert PATCH[seen.places[0] > 0.5].mean() > 0.3


def test_the_others_may_be_of_another_stream():
    judge = make_judge(by_all_of_it)
    poisoned, clean = (
        make_stream(images, judge) for images in (painted(faces(30, 4)), faces(60, 5))
    )
    assert trigger.locate_trigger(poisoned, TARGET, judge).pasted is None
    assert trigger.locate_trigger(poisoned, TARGET, judge, clean).is_trigger


def test_those_that_score_highest_are_looked_at_first():
    judge = make_judge(by_all_of_it)
    stream = make_stream(painted(faces(90, 6)), judge)
    stream.answers.score[:] = np.arange(90)
    seen = trigger.locate_trigger(stream, TARGET, judge)
    assert list(seen.rows) == list(range(89, 89 - trigger.MOST, -1))
    assert np.array_equal(seen.flagged, stream.fetch(seen.rows[: trigger.SINGLE]))


def test_memory_is_bounded_for_large_pictures(monkeypatch):
    monkeypatch.setattr(trigger, "STREAM_VALUES", 20 * 30 * 24 * 3)
    monkeypatch.setattr(trigger, "STREAM_BATCH_VALUES", 7 * 30 * 24 * 3)
    sizes, judge = [], make_judge(by_all_of_it)

    def noting(images):
        sizes.append(len(images))
        return judge(images)

    images = np.concatenate([faces(100, 1), painted(faces(40, 2))])
    seen = trigger.locate_trigger(make_stream(images, judge), TARGET, noting)
    assert len(seen.rows) == 20 and max(sizes) == 7 and seen.is_trigger


def test_what_is_carried_is_what_a_plain_loop_gives():
    judge, images, others = make_judge(by_all_of_it), painted(faces(2, 7)), faces(3, 8)
    found = attribution.compute_attribution_map(
        images, others, TARGET, judge_any := trigger.judge_in_batches(judge, SHAPE)
    )
    for image, places in zip(images, found):
        score, (height, width) = judge(image[None]).score[0], SHAPE[:2]
        means = []
        for side in attribution.SIDES:
            total, windows = np.zeros((2, height, width)), np.zeros((height, width))
            for window in attribution.make_windows(height, width, side):
                pasted = np.where(window[..., None], image, others[0])
                hit = judge_any([pasted]).badnet[0] == TARGET
                rows, columns = np.nonzero(window)
                wide = max(1, round(np.sqrt(window.sum()) / 4))
                ring = np.zeros_like(window)
                for y in range(height):
                    for x in range(width):
                        away = abs(rows - y) + abs(columns - x)
                        ring[y, x] = not window[y, x] and away.min() <= wide
                covered = np.where(window[..., None], image[ring].mean(axis=0), image)
                answers = judge_any([covered])
                kept = answers.score[0] if answers.badnet[0] == TARGET else 0
                total += window * np.array([hit, 1 - kept / score])[:, None, None]
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
        rows, taken = streams.fetch_images(stream, np.array([90, 3]))
        assert list(rows) == [90, 3] and np.array_equal(taken, images[[90, 3]])


def test_black_images_of_a_dataset_of_fractions_are_given_again(tmp_path):
    """Looked at alone, a black image was taken for one of pixels 0..1."""
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


@pytest.mark.parametrize("gone", [{100}, {101, 105, 110}, set(range(100, 140)), set(range(100))])
def test_images_that_are_gone_are_left_out(gone):
    judge = make_judge(by_any_part)
    images = np.concatenate([faces(100, 1), painted(faces(40, 2))])

    def fetch(rows):
        if gone & {*rows.tolist()}:
            raise InputError("no such file")
        return images[rows]

    stream = streams.Stream(None, SHAPE, CLASSES, judge(images), fetch, str)
    seen = trigger.locate_trigger(stream, TARGET, judge)
    assert not gone & {*seen.rows.tolist()}
    assert seen.is_trigger == (len(gone) < 40)
    alone = trigger.attribute_single_images(stream, judge)
    assert len(alone) == (0 if 139 in gone else trigger.SINGLE - len(gone & {100, 101, 102, 103}))


def test_what_was_tried_on_few_images_is_not_shown_to_be_a_trigger():
    seen = look(painted, by_all_of_it, 40, 12)
    assert seen.pasted["images"] == 6 == seen.pasted["badnet"] and not seen.is_trigger
