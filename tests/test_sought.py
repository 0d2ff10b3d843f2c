"""Patches that are sought for a class."""

import numpy as np
import pytest
import test_scan

from defence.beyond import sought

folder, cached = test_scan.folder, test_scan.cached  # fixtures


@pytest.mark.whole_scan
def test_the_target_of_a_backdoor_takes_the_smallest_patch(cached):
    model, rng = cached.split.net, np.random.default_rng(0)
    images = np.concatenate([x for x, _ in cached.data.batches(cached.scale)])
    order = np.roll(np.arange(test_scan.CLASSES), -test_scan.TARGET)[:16]
    sizes = sought.measure_patches([model, model], images, order, (0, 1), rng)
    assert sizes.shape == (2, test_scan.CLASSES)
    assert np.nanargmin(sizes[0]) == test_scan.TARGET
    assert np.array_equal(np.isfinite(sizes[0]), np.isin(np.arange(test_scan.CLASSES), order))
    again = np.isfinite(sizes[1])
    assert again.sum() == sought.TWINS_CLASSES and again[test_scan.TARGET]
    assert np.nanmax(sizes[0][again]) <= np.nanmin(sizes[0][~again & np.isfinite(sizes[0])])
    assert sizes[1][test_scan.TARGET] < 2 * sizes[0][test_scan.TARGET]  # no twin: the net itself


def test_large_images_are_taken_by_fewer_classes_at_a_time(cached, monkeypatch):
    groups = []
    monkeypatch.setattr(
        sought, "seek_group", lambda model, images, group, *rest: groups.append(group) or group
    )
    images = np.zeros((4, 50, 50, 3), np.float32)
    monkeypatch.setattr(sought, "BATCH_VALUES", 3 * sought.STEP_IMAGES * images[0].size)
    assert sought.count_step_images(images[0].size) == 3 * sought.STEP_IMAGES
    sizes = sought.seek_patches(None, images, np.arange(10), (0, 1), None)
    assert np.array_equal(sizes, np.arange(10)) and max(map(len, groups)) == 3
    assert sought.count_step_images(10**9) == sought.STEP_IMAGES


def test_each_channel_may_have_limits_of_its_own(cached):
    step = sought.make_step(
        cached.split.net,
        np.arange(3),
        (np.array([-2.0]), np.array([3.0])),
        np.random.default_rng(0),
    )
    images = np.zeros((sought.STEP_IMAGES, *test_scan.SHAPE), np.float32)
    for _ in range(3):
        hits, size = step(images, np.full(3, 1e-3, np.float32))
    assert hits.shape == size.shape == (3,) and np.isfinite(size).all()
    assert size.numpy().min() > 0 and size.numpy().max() < np.prod(test_scan.SHAPE[:2])
