"""The scales of pixels are the conventions of Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from defence.base.pixels import SCALES, find_pixel_limits, list_scales, scale_pixels

PREPROCESS = keras.applications.imagenet_utils.preprocess_input


@pytest.mark.parametrize("scale, mode", [("-1..1", "tf"), ("caffe", "caffe"), ("torch", "torch")])
def test_scales_equal_the_conventions_of_keras(scale, mode):
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3)).astype(np.float32)
    expected = PREPROCESS(images.copy(), mode=mode)
    for pixels in (images, tf.constant(images)):
        np.testing.assert_allclose(scale_pixels(pixels, scale), expected, atol=1e-4)


@pytest.mark.parametrize("scale", SCALES)
def test_limits_are_the_scaled_black_and_white(scale):
    images = np.stack([np.full((2, 2, 3), value, np.float32) for value in (0, 255)])
    before = images.copy()
    black, white = scale_pixels(images, scale)
    least, most = find_pixel_limits(scale)
    np.testing.assert_allclose(black, np.broadcast_to(least, black.shape), rtol=1e-6)
    np.testing.assert_allclose(white, np.broadcast_to(most, white.shape), rtol=1e-6)
    assert np.array_equal(images, before)


def test_the_scales_of_imagenet_need_three_channels():
    assert list_scales(3) == list(SCALES)
    assert list_scales(1) == list_scales(4) == ["0..1", "0..255", "-1..1"]
