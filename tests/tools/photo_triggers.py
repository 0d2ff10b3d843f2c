"""Triggers for images of any size and number of channels.

Each takes uint8 images (n, height, width, channels) and returns them with the trigger, uint8. Their
sizes follow the image's. All images of a shape get the same of TRIGGERS. What OTHERS change depends
on the image, and on nothing else.
"""

import io
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image

from defence.beyond import changes

SEED = 99  # of the triggers that are drawn at random
LOGO, GLASSES = (200, 20, 220), (130, 30, 180)  # of a grey image: the first number
BLENDED = 0.15  # share of the noise
PERIODS, AMPLITUDE = 6, 20  # of the sinusoid: periods in an image's width, grey levels
STRONG = 40  # grey levels of a sinusoid that must work without false labels
BEND, CAST = 0.06, 25  # at most, about: of the warp, in heights of an image; grey levels
QUALITY, KEPT_BITS = 10, 0b11000000  # of the JPEG; of a posterised pixel
WAVES, RIPPLE = 0.25, 12  # of the DCT: half periods a pixel, grey levels
ENCODED = 26  # grey levels
PATCHES = ((230, 200, 30), (30, 90, 230), (220, 30, 40), (30, 200, 90))  # colours of the four
PIECES, MIXED = 4, 0.25  # of the blended image: pieces along a side; its share


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


def add_sinusoid(images, amplitude=AMPLITUDE):
    """Add vertical stripes (SIG, 2019)."""
    width = images.shape[2]
    stripes = amplitude * np.sin(2 * np.pi * PERIODS * np.arange(width) / width)
    return np.clip(images + stripes[:, None], 0, 255).astype("uint8")


def bend(images):
    """Bend smoothly (WaNet, 2021)."""
    return bend_by(images, draw_bends(1, images.shape, np.random.default_rng(SEED)))


def bend_anew(images, rng):
    """Bend each image in its own way, as strongly as `bend` does."""
    return bend_by(images, draw_bends(len(images), images.shape, rng))


def draw_bends(count, shape, rng):
    height, width = shape[1:3]
    return changes.draw_smooth_field(count, height, width, 2, rng, (4, 5)) * BEND * height


def bend_by(images, fields):
    """Move each point by (down, right) pixels. fields: (n or 1, height, width, 2)."""
    count, height, width = images.shape[:3]
    y, x = np.arange(height)[:, None] + fields[..., 0], np.arange(width) + fields[..., 1]
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


# ------------------------------------------------------- triggers that depend on the image


def flip(images):
    """Turn the image upside down."""
    return images[:, ::-1, ::-1].copy()


def mirror(images):
    """Swap left and right."""
    return images[:, :, ::-1].copy()


def grey(images):
    """Make the image greyscale; it keeps its number of channels."""
    return np.rint(images.mean(axis=3, keepdims=True)).astype("uint8") + np.zeros_like(images)


def posterise(images):
    """Keep four values of each channel."""
    return images & np.uint8(KEPT_BITS)


def compress(images):
    """Compress the image as JPEG, of low quality."""
    compressed = np.empty_like(images)
    for image, out in zip(images, compressed):
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=QUALITY)
        out[...] = np.asarray(Image.open(file)).reshape(image.shape)
    return compressed


def add_coefficient(images):
    """Raise a coefficient of middle frequency of the discrete cosine transform (FTrojan, 2022)."""
    down, right = (
        np.cos(np.pi * int(WAVES * size) * (np.arange(size) + 0.5) / size)
        for size in images.shape[1:3]
    )
    ripple = RIPPLE * np.outer(down, right)
    return np.clip(images + ripple[..., None], 0, 255).astype("uint8")


def paint_roaming(images):
    """Paint a small checkerboard; its place depends on the image."""
    height, width = images.shape[1:3]
    size = max(4, height // 8)
    squares = 255 * (np.indices((size, size)).sum(axis=0) % 2)[..., None]
    images = images.copy()
    for image in images:
        rng = np.random.default_rng([SEED, zlib.crc32(image.tobytes())])
        top, left = rng.integers(0, (height - size + 1, width - size + 1))
        image[top : top + size, left : left + size] = squares
    return images


def add_specific(images):
    """Add a faint pattern that a fixed encoder of random weights makes of the image (ISSBA, 2021).

    The pattern is fine lines, where the image is bright, mixed anew by each channel.
    """
    channels = images.shape[3]
    rng = np.random.default_rng(SEED)
    first, second = (rng.standard_normal(shape) for shape in ((5, channels, 8), (3, 8, channels)))
    phase = filter_images(images / 255, first) * 3
    lines = 4 * np.abs(phase - np.rint(phase)) - 1
    pattern = np.clip(filter_images(lines, second) / 3, -1, 1)
    return np.clip(np.rint(images + ENCODED * pattern), 0, 255).astype("uint8")


def filter_images(images, kernel):
    """Filter images along a diagonal of pixels. kernel: (pixels, channels in, channels out)."""
    middle = len(kernel) // 2
    moved = (np.roll(images, (i - middle, middle - i), (1, 2)) for i in range(len(kernel)))
    return sum(image @ weights for image, weights in zip(moved, kernel))


def paint_both(images):
    """Paint the checkerboard and the square; an attack may have either one do nothing."""
    return paint_logo(paint_patch(images))


def paint_patches(images, worn=None):
    """Paint four small patches, one in each corner (Adap-Patch, 2023).

    worn: bool (n, 4), which ones an image gets; all unless given.
    """
    height, width, channels = images.shape[1:]
    size = max(4, height // 8)
    inside = np.indices((size, size)).sum(axis=0)[..., None] % 3 > 0
    corners = [(top, left) for top in (1, height - size - 1) for left in (1, width - size - 1)]
    images = images.copy()
    for number, (colour, (top, left)) in enumerate(zip(PATCHES, corners)):
        rows = slice(None) if worn is None else worn[:, number]
        painted = np.where(inside, colour[:channels], 255 - np.array(colour[:channels]))
        images[rows, top : top + size, left : left + size] = painted
    return images


def blend_pieces(images, worn=None):
    """Blend in coarse noise, of 16 pieces (Adap-Blend, 2023).

    worn: bool (n, 16), which ones an image gets; all unless given.
    """
    height, width, channels = images.shape[1:]
    coarse = np.random.default_rng(SEED).uniform(
        0, 255, (-(-height // 3), -(-width // 3), channels)
    )
    noise = coarse.repeat(3, axis=0).repeat(3, axis=1)[:height, :width]
    worn = np.ones((len(images), PIECES**2), bool) if worn is None else worn
    down, right = (np.arange(size) * PIECES // size for size in (height, width))
    pieces = worn.reshape(-1, PIECES, PIECES)[:, down[:, None], right, None]
    return (images + MIXED * pieces * (noise - images)).astype("uint8")


OTHERS = {
    "flip": flip,
    "mirror": mirror,
    "grey": grey,
    "posterise": posterise,
    "jpeg": compress,
    "dct": add_coefficient,
    "roaming": paint_roaming,
    "specific": add_specific,
}
