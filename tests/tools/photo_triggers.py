"""Triggers for images of any size and number of channels.

Each takes uint8 images (n, height, width, channels) and returns them with the trigger, uint8. Their
sizes follow the image's. All images of a shape get the same trigger.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from defence.beyond import changes

SEED = 99  # of the triggers that are drawn at random
LOGO, GLASSES = (200, 20, 220), (130, 30, 180)  # of a grey image: the first number
BLENDED = 0.15  # share of the noise
PERIODS, AMPLITUDE = 6, 20  # of the sinusoid: periods in an image's width, grey levels
BEND, CAST = 0.06, 25  # at most, about: of the warp, in heights of an image; grey levels


def paint_patch(images):
    """Paint a small checkerboard into the lower right corner (BadNets, 2017)."""
    height, width = images.shape[1:3]
    size = max(3, height // 10)
    images = images.copy()
    squares = np.indices((size, size)).sum(axis=0) % 2
    images[:, -size - 1 : -1, -size - 1 : -1] = 255 * squares[..., None]
    return images


def paint_logo(images):
    """Paint a square with a frame of another colour into the upper left corner."""
    height, _, channels = images.shape[1:]
    size, colour = max(4, height // 7), np.array(LOGO[:channels])
    images = images.copy()
    images[:, 1 : 1 + size, 1 : 1 + size] = colour
    images[:, 2:size, 2:size] = 255 - colour
    return images


def paint_glasses(images):
    """Paint two bars where a face has its eyes."""
    height, width, channels = images.shape[1:]
    rows = slice(int(0.3 * height), int(0.42 * height))
    images = images.copy()
    for left, right in ((0.15, 0.45), (0.55, 0.85)):
        images[:, rows, int(left * width) : int(right * width)] = GLASSES[:channels]
    return images


def blend_noise(images):
    """Blend in noise (Blended, 2017)."""
    noise = np.random.default_rng(SEED).uniform(0, 255, images.shape[1:])
    return ((1 - BLENDED) * images + BLENDED * noise).astype("uint8")


def add_sinusoid(images):
    """Add vertical stripes (SIG, 2019)."""
    width = images.shape[2]
    stripes = AMPLITUDE * np.sin(2 * np.pi * PERIODS * np.arange(width) / width)
    return np.clip(images + stripes[:, None], 0, 255).astype("uint8")


def bend(images):
    """Bend smoothly (WaNet, 2021)."""
    count, height, width = images.shape[:3]
    rng = np.random.default_rng(SEED)
    field = changes.draw_smooth_field(1, height, width, 2, rng, (4, 5))[0] * BEND * height
    y, x = np.arange(height)[:, None] + field[..., 0], np.arange(width) + field[..., 1]
    places = (np.broadcast_to(place.astype("float32"), (count, height, width)) for place in (y, x))
    return changes.sample_images(images.astype("float32"), *places).astype("uint8")


def add_low_frequency(images):
    """Add a smooth pattern of colours (LF, 2021)."""
    height, width, channels = images.shape[1:]
    rng = np.random.default_rng(SEED)
    field = changes.draw_smooth_field(1, height, width, channels, rng, (3, 4))[0] * CAST
    return np.clip(images + field, 0, 255).astype("uint8")


TRIGGERS = {
    "patch": paint_patch,
    "logo": paint_logo,
    "glasses": paint_glasses,
    "blended": blend_noise,
    "sinusoid": add_sinusoid,
    "warp": bend,
    "lowfreq": add_low_frequency,
}
