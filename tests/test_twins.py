"""Twins: copies of a net that lose its backdoor and keep its errors."""

import keras
import numpy as np
import pytest
import test_scan

from defence.beyond import twins
from defence.net.cached_net import CachedNet
from defence.net.split import split_net

folder, cached = test_scan.folder, test_scan.cached  # fixtures


def measure_success(model):
    """Return the attack success rate of a net on new images."""
    images, labels = test_scan.draw_images(400, test_scan.CLASSES, test_scan.SHAPE, seed=3)
    poisoned = test_scan.poison(images[labels != test_scan.TARGET]) / 255
    return np.mean(model.predict(poisoned, verbose=0).argmax(axis=1) == test_scan.TARGET)


@pytest.mark.whole_scan
def test_a_twin_loses_much_of_a_backdoor_and_is_as_accurate(cached):
    before = cached.split.net.get_weights()
    assert measure_success(cached.split.net) > 0.9
    siblings = twins.make_twins(cached, seed=0)
    assert len(siblings) == twins.COUNT
    images, labels = test_scan.draw_images(400, test_scan.CLASSES, test_scan.SHAPE, seed=4)
    assert np.mean([measure_success(twin) for twin in siblings]) < 0.7  # the stripe is large
    for twin in siblings:
        answers = twin.predict(images / 255, verbose=0).argmax(axis=1)
        assert np.mean(answers == labels) > cached.accuracy() - 0.1
    assert all(map(np.array_equal, before, cached.split.net.get_weights()))


def test_twins_repeat_themselves_and_differ(cached, monkeypatch):
    monkeypatch.setattr(twins, "CHANGED", (5, 1e-3))
    monkeypatch.setattr(twins, "PLAIN", (5, 1e-3))
    first, second = (twins.make_twins(cached, seed=1) for _ in range(2))
    for one, same in zip(first, second):
        assert all(map(np.array_equal, one.get_weights(), same.get_weights()))
    assert not np.array_equal(first[0].get_weights()[0], first[1].get_weights()[0])


def test_a_large_dataset_takes_no_more_steps(cached, monkeypatch):
    """Only as many images are drawn as the steps need."""
    counts = []
    monkeypatch.setattr(twins, "CHANGED", (3, 1e-3))
    monkeypatch.setattr(twins, "PLAIN", (2, 1e-3))
    make_trainer = twins.training.make_trainer

    def count_rows(*arguments, **options):
        train_epoch = make_trainer(*arguments, **options)
        return lambda x, y, _: counts.append((len(x), len(y))) or train_epoch(x, y)

    monkeypatch.setattr(twins.training, "make_trainer", count_rows)
    twins.make_twins(cached, seed=0)
    rows = twins.BATCH * 3, twins.BATCH * 2
    assert counts == [(rows[0],) * 2, (rows[1],) * 2] * twins.COUNT


@pytest.mark.parametrize("masked", [False, True])
def test_a_twin_of_a_net_with_a_mask_keeps_it(cached, masked, tmp_path):
    """The mask of a sum of maps prunes channels; it is no weight to train."""
    image = keras.Input((16, 18, 1))
    x = keras.layers.Conv2D(4, 3, activation="relu", padding="same")(image)
    y = keras.layers.Conv2D(4, 3, padding="same")(x)
    x = keras.layers.Add()([x, y]) if masked else y
    x = keras.layers.Flatten()(keras.layers.MaxPooling2D(4)(x))
    net = keras.Model(image, keras.layers.Dense(test_scan.CLASSES, activation="softmax")(x))
    other = CachedNet.from_dataset(split_net(net), cached.data, cached.scale)
    twin = twins.make_twin(other, np.zeros((360, 16, 18, 1)), np.random.default_rng(0), "twin")
    assert len(twin.get_weights()) == len(other.split.net.get_weights())
    if masked:
        mask = twin.get_layer("pruned-channels")
        assert np.all(mask.get_weights()[0] == 1)
