"""The pixel ranges of nets, as Keras uses them, and the conversion from 0..255 to each."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from defence.base.errors import InputError


@dataclasses.dataclass(frozen=True)
class Scale:
    """A pixel range: (pixel 0..255 - `mean`) / `deviation`, numbers or float32 (channels,).

    bgr: whether the order of the channels is reversed first.
    """

    mean: float | np.ndarray
    deviation: float | np.ndarray
    bgr: bool = False


# The last two are for nets of ImageNet (keras.applications.imagenet_utils.preprocess_input).
SCALES = {
    "0..1": Scale(0.0, 255.0),
    "0..255": Scale(0.0, 1.0),
    "-1..1": Scale(127.5, 127.5),
    "caffe": Scale(np.array([103.939, 116.779, 123.68], np.float32), 1.0, bgr=True),
    "torch": Scale(
        np.array([123.675, 116.28, 103.53], np.float32),
        np.array([58.395, 57.12, 57.375], np.float32),
    ),
}
DEFAULT = "0..1"


def list_scales(channels: int) -> list[str]:
    """Return the names of the SCALES for images with this number of channels, in their order."""
    return [name for name, scale in SCALES.items() if np.size(scale.mean) in (1, channels)]


def check_scale(name: str, channels: int) -> None:
    """Raise InputError unless one of SCALES is for images with this number of channels."""
    if name not in list_scales(channels):
        raise InputError(
            f"--scale {name}: is for images of 3 channels, but the net takes {channels}; "
            f"choose one of {', '.join(list_scales(channels))}"
        )


def scale_pixels(images: Any, name: str) -> Any:
    """Return images (n, height, width, channels), 0..255, in the range of one of SCALES.

    images: float32, a NumPy array or a TensorFlow tensor; not changed in place.
    """
    scale = SCALES[name]
    if scale.bgr:
        images = images[..., ::-1]
    if np.any(scale.mean):
        images = images - scale.mean
    return images / scale.deviation


def find_pixel_limits(name: str) -> tuple[Any, Any]:
    """Return the scaled values of pixels 0 and 255: two numbers, or two arrays (channels,)."""
    scale = SCALES[name]
    return (0 - scale.mean) / scale.deviation, (255 - scale.mean) / scale.deviation
