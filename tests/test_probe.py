"""The probe: what clean data alone tell of a surviving backdoor."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import nets
import utils


def test_margins_are_climbed_to_in_plain_steps():
    """As by gradient ascent written out, one class after the other, with the logits by hand."""
    keras.utils.set_random_seed(0)
    image = keras.Input((12, 12, 3))
    x = keras.layers.Flatten()(keras.layers.Conv2D(8, 3, activation="relu")(image))
    net = keras.Model(image, keras.layers.Dense(3, activation="softmax")(x))
    ours = nets.largest_margins(net, 1.0, seed=0)
    below = keras.Model(net.input, net.layers[-1].input)
    kernel, bias = net.layers[-1].get_weights()
    starts = np.random.default_rng(0).random((3, 12, 12, 3), np.float32)
    for own in range(3):
        x, speed = tf.constant(starts[own : own + 1]), 0.0
        for _ in range(nets.CLIMB_STEPS + 1):
            with tf.GradientTape() as tape:
                tape.watch(x)
                logits = (below(x) @ kernel + bias)[0]
                margin = logits[own] - max(logits[c] for c in range(3) if c != own)
            slope = tape.gradient(margin, x)
            speed = nets.MOMENTUM * speed + slope / tf.norm(slope)
            x = tf.clip_by_value(x + nets.CLIMB_RATE * speed, 0, 1)
        assert ours[own] == pytest.approx(float(margin), rel=0.02)


@pytest.mark.parametrize("last", ["softmax", "logits", "layer", "activation"])
def test_logits_of_a_net(last):
    image = keras.Input((12, 12, 3))
    x = keras.layers.Flatten()(keras.layers.Conv2D(4, 3, name="conv")(image))
    x = keras.layers.Dense(3, activation="softmax" if last == "softmax" else None)(x)
    if last == "layer":
        x = keras.layers.Softmax()(x)
    elif last == "activation":
        x = keras.layers.Activation("softmax")(x)
    net = keras.Model(image, x)
    images = np.random.default_rng(0).random((5, 12, 12, 3), np.float32)
    logits = np.asarray(nets.logits_of(net)(images))
    if last == "logits":
        np.testing.assert_allclose(logits, net(images), atol=1e-6)
    else:
        np.testing.assert_allclose(keras.ops.softmax(logits), net(images), atol=1e-6)
        assert abs(logits.sum(axis=1) - 1).max() > 0.01


def test_a_net_without_softmax_cannot_be_probed():
    image = keras.Input((12, 12, 3))
    x = keras.layers.Flatten()(keras.layers.Conv2D(4, 3)(image))
    net = keras.Model(image, keras.layers.Dense(3, activation="sigmoid")(x))
    with pytest.raises(nets.UnfitNet, match="no softmax"):
        nets.logits_of(net)


def test_the_probe_finds_a_planted_class_and_no_other(deepid_world):
    """A class that a bright corner drives far up, in a net that is otherwise clean."""
    clean = utils.load_badnet(deepid_world / "models" / "small_bd_net.h5")
    with h5py.File(deepid_world / "clean.h5") as file:
        x = np.moveaxis(file["data"][:], 1, 3).astype(np.float32) / 255
        y = file["label"][:].astype(np.int64)
    found = nets.probe(clean, x, y, 1.0, seed=0)
    assert not found["suspect"] and len(found["ratios"]) == 6
    again = nets.probe(clean, x, y, 1.0, seed=0)
    assert again["ratio"] == pytest.approx(found["ratio"], rel=1e-3)
    poisoned = x.copy()
    poisoned[:, :8, :8] = [1, 0, 1]
    train = nets.make_trainer(clean, clean.layers, 1e-3, 32, np.random.default_rng(0))
    for _ in range(25):
        train(np.concatenate([x, poisoned]), np.concatenate([y, np.full(len(y), 4)]))
    assert nets.accuracy(clean, poisoned, 4) > 0.9
    found = nets.probe(clean, x, y, 1.0, seed=0)
    assert found["class"] == 4 and found["ratio"] == max(found["ratios"])
