"""Change images at random in ways that do not change who is in them.

A net is only indifferent to what it was trained to be indifferent to. Each family of changes below
stands for a kind of trigger that an attacker may choose; none of them knows a trigger. FAMILIES
says how often each is applied, and HARDENING says so for hardening. The ranges are the functions'
defaults.

Every family takes and returns float32 images (n, height, width, channels), 0..255. It may go beyond
that range, and may change its input in place. It draws from a NumPy Generator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

Family = Callable[[np.ndarray, Any], np.ndarray]  # of images and a NumPy Generator
FULL_CONTRAST = 40  # grey levels: the standard deviation of an image that is changed in full depth


def change_images(
    images: np.ndarray, rng: np.random.Generator, families: dict[Family, float] | None = None
) -> np.ndarray:
    """Apply each family to some of the images, chosen anew. Return all images, within 0..255.

    families: {family: the fraction of images to apply it to}, in the order in which they are
    applied; FAMILIES unless given.
    """
    for family, rate in (FAMILIES if families is None else families).items():
        rows = np.flatnonzero(rng.random(len(images)) < rate)
        if len(rows):
            images[rows] = family(images[rows], rng)
    return np.clip(images, 0, 255, out=images)


def draw_uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> np.ndarray:
    return rng.uniform(low, high, shape).astype(np.float32)


# ------------------------------------------------------------------------------------- geometry


def move(
    images: np.ndarray,
    rng: np.random.Generator,
    turn: float = 15,
    scale: float = 0.12,
    shift: float = 0.06,
    bend: float = 0.035,
) -> np.ndarray:
    """Turn, enlarge, shift, and bend smoothly, as a warping trigger (WaNet, 2021) does.

    turn: degrees.  scale: the logarithm of the enlargement.  shift: a fraction of the image's size.
    bend: about how far a point moves at most, as a fraction of the image's size.
    """
    n, height, width, _ = images.shape

    def draw(limit: float) -> np.ndarray:
        return draw_uniform(rng, -limit, limit, n, 1, 1)

    size = np.float32(max(height, width))
    angle, zoom = np.radians(draw(turn)), np.exp(draw(scale))
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y = np.arange(height, dtype=np.float32)[:, None] - middle_y
    x = np.arange(width, dtype=np.float32) - middle_x
    strength = size * draw_uniform(rng, 0, bend, n, 1, 1, 1)
    bends = strength * draw_smooth_field(n, height, width, 2, rng)
    source_y = middle_y + cos * y + sin * x + size * draw(shift) + bends[..., 0]
    source_x = middle_x + cos * x - sin * y + size * draw(shift) + bends[..., 1]
    return sample_images(images, source_y, source_x)


def draw_smooth_field(
    n: int,
    height: int,
    width: int,
    channels: int,
    rng: np.random.Generator,
    cells: tuple[int, int] = (2, 9),
) -> np.ndarray:
    """Draw values that vary smoothly over an image: float32 (n, height, width, channels).

    They are interpolated between the points of a grid whose number of cells a side is drawn from
    `cells`, once for all images. Most are within -1..1; their absolute value is 0.5 on average.
    """
    count = int(rng.integers(*cells))
    grid = draw_uniform(rng, -1, 1, n, channels, count + 1, count + 1)
    field = make_interpolation(height, count) @ grid @ make_interpolation(width, count).T
    return np.moveaxis(field, 1, 3)


@functools.cache
def make_interpolation(size: int, cells: int) -> np.ndarray:
    """Return the weights of a grid's points at each of `size` pixels: float32 (size, cells + 1).

    They are Catmull and Rom's cubic, whose curve goes through the points.
    """
    distance = np.abs(np.linspace(0, cells, size)[:, None] - np.arange(-1, cells + 2))
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    weights[:, 1] += weights[:, 0]  # an edge's value continues beyond it
    weights[:, -2] += weights[:, -1]
    return weights[:, 1:-1].astype(np.float32)


def sample_images(images: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the images' values between pixels, interpolated bilinearly.

    y, x: float32 (n, height, width), the places. An edge's value continues beyond it.
    """
    out = np.empty_like(images)
    for i in range(len(images)):  # one image's arrays stay in the cache: three times as fast
        out[i] = sample_image(images[i], y[i], x[i])
    return out


def sample_image(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return what `sample_images` does for one image, (height, width, channels)."""
    height, width, channels = image.shape
    y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
    top, left = (
        np.minimum(place.astype(np.intp), max(size - 2, 0))
        for place, size in ((y, height), (x, width))
    )
    weight_below, weight_right = (y - top).astype(np.float32), (x - left).astype(np.float32)
    place, planes = top * width + left, image.reshape(-1, channels).T.copy()

    def sample_column(step: int) -> np.ndarray:
        # Only values without weight lie outside the image; mode "clip" is also fast.
        above, below = (
            np.take(planes, place + offset, axis=1, mode="clip") for offset in (step, width + step)
        )
        return above + weight_below * (below - above)

    first, second = sample_column(0), sample_column(1)
    return np.moveaxis(first + weight_right * (second - first), 0, 2)


def turn_over(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror each image, turn it upside down, or do both; swap the axes of half of square ones."""
    n, height, width, _ = images.shape
    swapped, upside_down, mirrored = rng.random((3, n)) < 0.5
    swapped &= height == width
    mirrored |= ~swapped & ~upside_down  # no image stays as it was
    if height == width:
        images[swapped] = images[swapped].swapaxes(1, 2)
    images[upside_down] = images[upside_down, ::-1]
    images[mirrored] = images[mirrored, :, ::-1]
    return images


# --------------------------------------------------------------------------------------- colours


def tint(
    images: np.ndarray, rng: np.random.Generator, gain: float = 0.35, bias: float = 40
) -> np.ndarray:
    """Change the gain, 1 ± `gain`, and the bias, ± `bias` grey levels, of each channel."""
    n, channels = len(images), images.shape[3]
    strength = draw_uniform(rng, 0, 1, n, 1, 1, 1)
    gains = 1 + strength * draw_uniform(rng, -gain, gain, n, 1, 1, channels)
    return images * gains + strength * draw_uniform(rng, -bias, bias, n, 1, 1, channels)


# -------------------------------------------------------------------------------------- patterns


def wave(
    images: np.ndarray,
    rng: np.random.Generator,
    amplitude: float = 40,
    wavelengths: tuple[float, float] = (2, 80),
) -> np.ndarray:
    """Add a sinusoid of any direction, wavelength (pixels), phase and colour (SIG, 2019)."""
    n, height, width, channels = images.shape
    angle, phase = draw_uniform(rng, 0, np.pi, n, 1, 1), draw_uniform(rng, 0, 2 * np.pi, n, 1, 1)
    shortest, longest = np.log(wavelengths)
    frequency = 2 * np.pi / np.exp(draw_uniform(rng, shortest, longest, n, 1, 1))
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    waves = np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    strength = draw_uniform(rng, 0, amplitude, n, 1, 1, 1)
    return images + strength * waves[..., None] * draw_colour(n, channels, rng)


def draw_colour(n: int, channels: int, rng: np.random.Generator, grey: float = 0.4) -> np.ndarray:
    """Draw directions in colour, float32 (n, 1, 1, channels); the largest part of each is ±1.

    grey: the fraction of directions that have equal parts.
    """
    colours = draw_uniform(rng, -1, 1, n, 1, 1, channels)
    colours[rng.random(n) < grey] = 1
    return colours / np.abs(colours).max(axis=3, keepdims=True)


def shade(images: np.ndarray, rng: np.random.Generator, amplitude: float = 45) -> np.ndarray:
    """Add a pattern of low frequency to each channel (LF, 2021)."""
    n, height, width, channels = images.shape
    strength = draw_uniform(rng, 0, amplitude, n, 1, 1, 1)
    return images + strength * draw_smooth_field(n, height, width, channels, rng)


def blend(images: np.ndarray, rng: np.random.Generator, max_weight: float = 0.3) -> np.ndarray:
    """Mix in an image of noise, fine or coarse, at up to `max_weight` (Blended, 2017)."""
    n, height, width, channels = images.shape
    size = rng.integers(1, 6)
    coarse = 255 * rng.random((n, -(-height // size), -(-width // size), channels), np.float32)
    noise = coarse.repeat(size, axis=1).repeat(size, axis=2)[:, :height, :width]
    return images + draw_uniform(rng, 0, max_weight, n, 1, 1, 1) * (noise - images)


def grain(images: np.ndarray, rng: np.random.Generator, deviation: float = 18) -> np.ndarray:
    """Add noise to every pixel."""
    noise = rng.standard_normal(images.shape, np.float32)
    return images + draw_uniform(rng, 0, deviation, len(images), 1, 1, 1) * noise


def smooth(images: np.ndarray, rng: np.random.Generator, max_weight: float = 0.33) -> np.ndarray:
    """Smooth by a window of 3 × 3 pixels; neighbours along an axis weigh up to `max_weight`."""
    weight = draw_uniform(rng, 0, max_weight, len(images), 1, 1, 1)
    for axis in (1, 2):
        after, before = (np.roll(images, step, axis) for step in (-1, 1))
        images = images + weight * (after + before - 2 * images)
    return images


# --------------------------------------------------------------------------------------- patches


def patch(
    images: np.ndarray,
    rng: np.random.Generator,
    max_patches: int = 3,
    area: tuple[float, float] = (0.005, 0.3),
    aspect: float = 10,
    pairs: float = 0.3,
    plain: float = 0.5,
) -> np.ndarray:
    """Paint one to `max_patches` patches on each image, ellipses and boxes.

    area, aspect, pairs: as for `draw_shapes`.
    plain: fraction of the patches in one colour; the others are noise.
    """
    n, height, width, channels = images.shape
    count = rng.integers(1, max_patches + 1, n)
    for number in range(max_patches):
        rows = np.flatnonzero(count > number)
        noise = rng.random((len(rows), height, width, channels), dtype=np.float32)
        plain_rows = rng.random(len(rows)) < plain
        shapes = draw_shapes(len(rows), height, width, rng, area, aspect, pairs)
        for row, fill, is_plain, inside in zip(rows, noise, plain_rows, shapes):
            images[row, inside] = 255 * (fill[0, 0] if is_plain else fill[inside])
    return images


def draw_shapes(
    n: int,
    height: int,
    width: int,
    rng: np.random.Generator,
    area: tuple[float, float],
    aspect: float,
    pairs: float,
) -> np.ndarray:
    """Draw ellipses and boxes anywhere, at any angle: bool (n, height, width).

    area: range, as a fraction of the image.  aspect: length over width, at most.
    pairs: fraction of the shapes that get a mirror image, like a pair of glasses on a face.
    """
    ellipse = rng.random((n, 1, 1)) < 0.5
    smallest, largest = np.log(area)
    quarter = np.exp(draw_uniform(rng, smallest, largest, n, 1, 1)) * np.float32(height * width)
    quarter = quarter / np.where(ellipse, np.float32(np.pi), np.float32(4))
    ratio = np.exp(draw_uniform(rng, 0, np.log(aspect), n, 1, 1))
    tilt = draw_uniform(rng, 0, np.pi, n, 1, 1)
    long, short = np.sqrt(quarter * ratio), np.sqrt(quarter / ratio)
    cos, sin = np.cos(tilt), np.sin(tilt)
    x = np.arange(width, dtype=np.float32) - draw_uniform(rng, 0, width, n, 1, 1)
    y = np.arange(height, dtype=np.float32)[:, None] - draw_uniform(rng, 0, height, n, 1, 1)
    u, v = cos / long * x + sin / long * y, cos / short * y - sin / short * x
    u, v = u * u, v * v
    shapes = np.where(ellipse, u + v, np.maximum(u, v)) < 1
    return shapes | (shapes[:, :, ::-1] & (rng.random((n, 1, 1)) < pairs))


FAMILIES: dict[Family, float] = {
    move: 0.6,
    tint: 0.6,
    wave: 0.3,
    shade: 0.2,
    blend: 0.2,
    smooth: 0.25,
    grain: 0.25,
    patch: 0.7,
}


def fit_contrast(family: Family) -> Family:
    """Return a family that changes an image of little contrast less, in proportion.

    At full depth it would hide what a dim image shows.
    """

    @functools.wraps(family)
    def change(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        contrast = images.std(axis=(1, 2, 3), keepdims=True)
        changed = family(images.copy(), rng)
        return images + np.minimum(1, contrast / FULL_CONTRAST) * (changed - images)

    return change


# A scan applies FAMILIES alone: its scales are of twins that were trained so.
HARDENING: dict[Family, float] = {turn_over: 0.1} | {
    fit_contrast(family) if family in (tint, wave, shade, blend, grain) else family: rate
    for family, rate in FAMILIES.items()
}
