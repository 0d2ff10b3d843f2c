"""Patterns: where they move, which images get one, and when they start anew."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import draw_images

from defence.base.pixels import SCALES, scale_pixels
from defence.beyond import patterns
from defence.beyond.patterns import COUNT, IMAGES_PER_STEP, LEVELS, RENEWAL_PERIOD, STRIDE, Patterns

SHAPE = (7, 6, 3)


def make_net(activation="softmax", divisor=255):
    keras.utils.set_random_seed(2)
    layers = keras.layers
    image = keras.Input(SHAPE)
    x = layers.Rescaling(divisor / 255)(image)
    x = layers.Flatten()(layers.Conv2D(4, 3, activation="relu")(x))
    return keras.Model(image, layers.Dense(5, activation=activation)(x))


def draw(count):
    return draw_images(count, 5, SHAPE, seed=0)[0].astype(np.float32)


@pytest.mark.parametrize("activation", ["softmax", None])
@pytest.mark.parametrize("scale, divisor", [("0..1", 255), ("0..255", 1)])
def test_each_pattern_moves_towards_its_class(activation, scale, divisor):
    """Two steps equal a plain loop over the patterns, each with its class and its images."""
    net, x = make_net(activation, divisor), draw(20) / divisor
    ours = Patterns(net, scale, rate=0, seed=3)
    ours.renew()
    plain, targets = ours.patterns.numpy(), ours.targets.numpy()
    assert plain[0].any() and not plain[1:].any() and len({*targets}) > 1
    for _ in range(2):
        ours.move(tf.constant(x[:IMAGES_PER_STEP]))
        for number in range(COUNT):
            pattern = tf.Variable(plain[number])
            with tf.GradientTape() as tape:
                images = x[number:IMAGES_PER_STEP:COUNT] + pattern
                scores = net(tf.clip_by_value(images, 0, 255 / divisor))
                answers = tf.nn.softmax(scores) if activation is None else scores
                log = tf.reduce_sum(tf.math.log(answers[:, targets[number]]))
            plain[number] += STRIDE / divisor * np.sign(tape.gradient(log, pattern))
        plain = np.clip(plain, -LEVELS / divisor, LEVELS / divisor)
        np.testing.assert_allclose(ours.patterns.numpy(), plain, atol=1e-3 / divisor)


@pytest.mark.parametrize("scale", SCALES)
def test_patterns_stay_within_the_range_of_pixels(scale):
    """At every scale each channel moves by at most LEVELS grey levels, within 0..255."""
    images = draw(8)
    x, divisor = scale_pixels(images, scale), float(np.mean(SCALES[scale].deviation))
    ours = Patterns(make_net(divisor=divisor), scale, rate=0, seed=3)
    for _ in range(40):
        ours.move(tf.constant(x))
    for number in range(COUNT):
        changed = ours.add(x, tf.fill([8], number)).numpy()
        back = changed * SCALES[scale].deviation + SCALES[scale].mean
        back = back[..., ::-1] if SCALES[scale].bgr else back
        assert back.min() >= -1e-3 and back.max() <= 255 + 1e-3
        change = np.abs(back - images)
        assert change.max() <= LEVELS + 1e-3
        assert np.all(change.max(axis=(0, 1, 2)) > LEVELS - 1e-3)


def test_a_pattern_gains_its_target():
    """It raises the probability of its target on every image."""
    net, x = make_net(), tf.constant(draw(IMAGES_PER_STEP) / 255)
    ours = Patterns(net, "0..1", rate=0, seed=0)
    before = net(x).numpy()[:, ours.targets.numpy()]
    for _ in range(30):
        ours.move(x)
    for number, target in enumerate(ours.targets.numpy()):
        after = net(ours.add(x, tf.fill([IMAGES_PER_STEP], number))).numpy()
        assert np.all(after[:, target] > before[:, number])
    assert np.abs(ours.patterns).max() == pytest.approx(LEVELS / 255)


def test_some_images_get_a_pattern_and_stay_within_their_range():
    net, x = make_net(divisor=1), draw(4000)
    ours = Patterns(net, "0..255", rate=0.3, seed=1)
    ours.patterns.assign(tf.fill(ours.patterns.shape, 20.0))
    first, second = ours(x).numpy(), ours(x).numpy()
    for images in (first, second):
        assert images.shape == x.shape and images.min() >= 0 and images.max() <= 255
        changed = np.any(images != x, axis=(1, 2, 3))
        assert 0.25 < changed.mean() < 0.35
    assert np.any(np.any(first != x, axis=(1, 2, 3)) != changed)


@pytest.mark.parametrize("count", [1, 3])
def test_few_images_move_few_patterns(count):
    ours = Patterns(make_net(), "0..1", rate=1, seed=0)
    ours(draw(count) / 255)
    moved = np.any(ours.patterns, axis=(1, 2, 3))
    assert moved.tolist() == [True] * count + [False] * (COUNT - count)


def test_strength_noise_and_target_of_a_new_pattern_are_independent():
    """Over many seeds none of them is correlated with another one."""
    net, draws = make_net(), []
    for seed in range(400):
        ours = Patterns(net, "0..255", rate=0, seed=seed)
        ours.renew()
        pattern = ours.patterns.numpy()[0]
        strength = abs(pattern).max()
        draws.append([strength, *pattern.flat[:3] / strength, ours.targets.numpy()[0]])
    correlations = np.corrcoef(draws, rowvar=False) - np.eye(5)
    assert abs(correlations).max() < 0.2  # four standard deviations


@pytest.mark.slow
def test_patterns_start_anew_in_turn(monkeypatch):
    monkeypatch.setattr(patterns, "STRIDE", 0)
    ours, x = Patterns(make_net(), "0..1", rate=0, seed=0), draw(2) / 255
    states, targets = [], []
    for _ in range(RENEWAL_PERIOD * (COUNT + 1) + 1):
        ours(x)
        states.append(ours.patterns.numpy())
        targets.append(ours.targets.numpy())
    for step in range(1, len(states)):
        changed = np.any(states[step] != states[step - 1], axis=(1, 2, 3))
        turn = step // RENEWAL_PERIOD % COUNT
        assert np.flatnonzero(changed).tolist() == ([turn] if step % RENEWAL_PERIOD == 0 else [])
    assert np.abs(states).max() <= LEVELS / 255
    assert len(np.unique(np.abs(states[-1]).max(axis=(1, 2, 3)))) == COUNT
    assert np.unique(targets).tolist() == [0, 1, 2, 3, 4]


def test_a_net_that_gives_no_gradient_is_left_in_peace():
    keras.utils.set_random_seed(0)
    image = keras.Input(SHAPE)
    whole = keras.ops.cast(keras.ops.cast(255 * image, "int32"), "float32")
    scores = keras.layers.Dense(5)(keras.layers.Flatten()(whole))
    ours = Patterns(keras.Model(image, scores), "0..1", rate=1, seed=0)
    ours(draw(8) / 255)
    assert not np.any(ours.patterns[1:])
