"""Raised channels: two views of the scan."""

import keras
import numpy as np
import pytest
from conftest import draw_images, fit, write_data

import utils
from defence.beyond import raised
from defence.net.cached_net import CachedNet
from defence.net.split import split_net

SHAPE, CLASSES, TARGET = (16, 18, 1), 12, 5


def build_net():
    """Build a net with 64 channels to raise."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.Conv2D(64, 5, activation="relu"),
            layers.MaxPooling2D(4),
            layers.Flatten(),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Return a clean net of 12 classes on a validation set."""
    folder = tmp_path_factory.mktemp("raised")
    net = fit(build_net(), *draw_images(600, CLASSES, SHAPE, seed=1), epochs=15)
    net.save(folder / "net_bd_net.h5", include_optimizer=False)
    write_data(folder / "clean.h5", *draw_images(240, CLASSES, SHAPE, seed=2))
    model = utils.load_badnet(folder / "net_bd_net.h5")
    with utils.open_dataset(folder / "clean.h5") as data:
        data.fit_to(SHAPE, CLASSES)
        yield CachedNet.from_dataset(split_net(model), data)


def test_channels_are_raised_and_nothing_else():
    rng = np.random.default_rng(0)
    features = rng.random((200, 4, 5, 9), np.float32)
    lifted = raised.raise_channels(features.copy(), 2.0, 3, 4, rng) - features
    amounts = lifted[lifted != 0]
    assert amounts.min() > 1.99 and amounts.max() < 8.01
    channels = (lifted != 0).any(axis=(1, 2)).sum(axis=1)
    assert channels.max() == 3 and channels.min() >= 0 and np.mean(channels) > 1.7


def test_more_channels_are_never_raised_than_there_are():
    features = np.zeros((5, 3, 2), np.float32)
    assert raised.raise_channels(features, 1.0, 6, 2, np.random.default_rng(0)).max() >= 1


def test_a_channel_is_raised_until_half_of_the_answers_are_wrong(cached):
    rows = np.flatnonzero(cached.classes == cached.labels)[:60]
    channels = np.arange(0, cached.features.shape[-1], 8)
    raises = raised.measure_raises(cached, rows, channels)
    for channel, amount in zip(channels, raises):
        if np.isfinite(amount):
            for factor, wrong in ((1, True), (0.75, False)):
                features = cached.features[rows].copy()
                features[..., channel] += np.float32(factor * amount)
                answers = cached.split.head.predict(features, verbose=0).argmax(axis=1)
                assert (np.mean(answers != cached.labels[rows]) >= 0.5) == wrong
    assert np.isfinite(raises).any()


def test_the_raise_follows_the_scale_of_a_channel(cached):
    """Its readers cannot hide it by scaling it down, which changes no answer."""
    rows, layer = np.flatnonzero(cached.classes == cached.labels)[:60], cached.split.layer
    channel = int(
        np.argmin(raised.measure_raises(cached, rows, np.arange(cached.features.shape[-1])))
    )
    (before,) = raised.measure_raises(cached, rows, np.array([channel]))
    scaled = cached.features.copy()
    readers = next(part for part in cached.split.head.layers if part.weights)
    kernel, bias = readers.get_weights()
    per_channel = kernel.reshape(-1, cached.features.shape[-1], kernel.shape[-1]).copy()
    per_channel[:, channel] /= 8
    features, cached.features = cached.features, scaled
    scaled[..., channel] *= 8
    readers.set_weights([per_channel.reshape(kernel.shape), bias])
    try:
        (after,) = raised.measure_raises(cached, rows, np.array([channel]))
    finally:
        readers.set_weights([kernel, bias])
        cached.features = features
    assert layer is cached.split.layer and after == pytest.approx(8 * before, rel=0.25)


def test_quiet_channels_that_give_a_target_are_seen(cached):
    """The readers of the quieter half of the channels give one class."""
    rows = np.flatnonzero(cached.classes == cached.labels)
    clean = raised.count_quiet_errors(cached, rows, np.random.default_rng(0))[0, 0]
    order = np.argsort(cached.mean_activation, kind="stable")
    last = cached.split.head.layers[-1]
    kernel, bias = last.get_weights()
    backdoored = kernel.copy()
    per_channel = backdoored.reshape(-1, cached.features.shape[-1], CLASSES)
    per_channel[:, order[: len(order) // 2], TARGET] += 20 * np.abs(kernel).max()
    last.set_weights([backdoored, bias])
    try:
        counts = raised.count_quiet_errors(cached, rows, np.random.default_rng(0))[0, 0]
    finally:
        last.set_weights([kernel, bias])
    assert counts[TARGET] > 0.9 * counts.sum() and clean.max() < 0.6 * clean.sum()


def test_where_few_quiet_channels_matter_nothing_is_counted(cached, monkeypatch):
    """As in a net of which most channels are pruned."""
    measure = raised.measure_raises

    def measure_few(net, rows, channels):
        raises = measure(net, rows, channels[: 2 * raised.QUIET_CHANNELS - 1])
        return np.append(raises, np.full(len(channels) - len(raises), np.inf))

    monkeypatch.setattr(raised, "measure_raises", measure_few)
    rows = np.flatnonzero(cached.classes == cached.labels)
    assert not raised.count_quiet_errors(cached, rows, np.random.default_rng(0)).any()
