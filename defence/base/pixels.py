"""What nets take their pixels as: the conventions of Keras, and how pixels 0..255 become such."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Scale:
    """Pixels, 0..255, less `mean`, over `deviation`; numbers, or one for each channel.

    bgr: whether the channels are turned around first.
    """

    mean: object
    deviation: object
    bgr: bool = False


# The last two are what ImageNet's nets take (keras.applications.imagenet_utils.preprocess_input).
SCALES = {
    "0..1": Scale(0.0, 255.0),
    "0..255": Scale(0.0, 1.0),
    "-1..1": Scale(127.5, 127.5),
    "caffe": Scale(np.float32([103.939, 116.779, 123.68]), 1.0, bgr=True),
    "torch": Scale(np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])),
}
DEFAULT = "0..1"


def list_scales(channels):
    """The SCALES that images of so many channels can be brought to, in their order: [name, …]."""
    return [name for name, each in SCALES.items() if np.size(each.mean) in (1, channels)]


def scale_pixels(images, name):
    """Bring images (n, height, width, channels), 0..255, to one of SCALES.

    images: float32, a NumPy array or a TensorFlow tensor, which stays as it is. Returns its like.
    """
    scale = SCALES[name]
    if scale.bgr:
        images = images[..., ::-1]
    if np.any(scale.mean):
        images = images - scale.mean
    return images / scale.deviation


def find_pixel_limits(name):
    """What pixels 0 and 255 become: (least, most), numbers or arrays of one for each channel."""
    scale = SCALES[name]
    return (0 - scale.mean) / scale.deviation, (255 - scale.mean) / scale.deviation
