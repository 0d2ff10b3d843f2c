"""The conventions of pixels are those of Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from defence.pixels import SCALES, limits, scaled, scales_of

PREPROCESS = keras.applications.imagenet_utils.preprocess_input


@pytest.mark.parametrize("scale, mode", [("-1..1", "tf"), ("caffe", "caffe"), ("torch", "torch")])
def test_they_are_those_of_keras(scale, mode):
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3)).astype(np.float32)
    wanted = PREPROCESS(images.copy(), mode=mode)
    for given in (images, tf.constant(images)):
        np.testing.assert_allclose(scaled(given, scale), wanted, atol=1e-4)


@pytest.mark.parametrize("scale", SCALES)
def test_limits_are_what_black_and_white_become(scale):
    images = np.stack([np.full((2, 2, 3), value, np.float32) for value in (0, 255)])
    before = images.copy()
    black, white = scaled(images, scale)
    least, most = limits(scale)
    np.testing.assert_allclose(black, np.broadcast_to(least, black.shape), rtol=1e-6)
    np.testing.assert_allclose(white, np.broadcast_to(most, white.shape), rtol=1e-6)
    assert np.array_equal(images, before)


def test_those_of_imagenet_are_of_three_channels():
    assert scales_of(3) == list(SCALES)
    assert scales_of(1) == scales_of(4) == ["0..1", "0..255", "-1..1"]
