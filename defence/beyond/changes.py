"""Change pictures at random in ways that do not change who is on them.

A net is only indifferent to what it was trained to be indifferent to. Each family of changes below
stands for a kind of trigger that an attacker may choose; none of them knows a trigger. FAMILIES has
how often each is applied, and the ranges stand in the functions' defaults.

All functions take and return float32 pictures (n, height, width, channels), 0..255, may go beyond
that range, may change what they are given, and draw from a NumPy Generator.
"""

import functools

import numpy as np


def change_images(pictures, rng, families=None):
    """Apply each family to some of the pictures, chosen anew. Returns them, within 0..255.

    families: {a function of (pictures, rng): the fraction of pictures it is applied to}, in the
    order in which they are applied; FAMILIES unless given.
    """
    for family, rate in (FAMILIES if families is None else families).items():
        rows = np.flatnonzero(rng.random(len(pictures)) < rate)
        if len(rows):
            pictures[rows] = family(pictures[rows], rng)
    return np.clip(pictures, 0, 255, out=pictures)


def draw_uniform(rng, low, high, *shape):
    return rng.uniform(low, high, shape).astype(np.float32)


# ------------------------------------------------------------------------------------- geometry


def move(pictures, rng, turn=15, scale=0.12, shift=0.06, bend=0.035):
    """Turn, enlarge, shift, and bend smoothly, as a warping trigger (WaNet, 2021) does.

    turn: degrees.  scale: the logarithm of the enlargement.  shift: of the picture's size.
    bend: how far a point moves, at most about, of the picture's size.
    """
    n, height, width, _ = pictures.shape

    def draw(most):
        return draw_uniform(rng, -most, most, n, 1, 1)

    size = np.float32(max(height, width))
    angle, grow = np.radians(draw(turn)), np.exp(draw(scale))
    cos, sin = np.cos(angle) * grow, np.sin(angle) * grow
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y = np.arange(height, dtype=np.float32)[:, None] - middle_y
    x = np.arange(width, dtype=np.float32) - middle_x
    bends = (
        size * draw_uniform(rng, 0, bend, n, 1, 1, 1) * draw_smooth_field(n, height, width, 2, rng)
    )
    down = middle_y + cos * y + sin * x + size * draw(shift) + bends[..., 0]
    right = middle_x + cos * x - sin * y + size * draw(shift) + bends[..., 1]
    return sample_images(pictures, down, right)


def draw_smooth_field(n, height, width, channels, rng, cells=(2, 9)):
    """Random values that vary smoothly over a picture: float32 (n, height, width, channels).

    Between the points of a grid of `cells` cells a side, drawn for all together, they are
    interpolated; they are about within -1..1, 0.5 in the mean of their size.
    """
    count = rng.integers(*cells)
    grid = draw_uniform(rng, -1, 1, n, channels, count + 1, count + 1)
    field = make_interpolation(height, count) @ grid @ make_interpolation(width, count).T
    return np.moveaxis(field, 1, 3)


@functools.cache
def make_interpolation(size, cells):
    """The weights of a grid's points at each of `size` pixels: float32 (size, cells + 1).

    Catmull and Rom's cubic, whose curve goes through the points.
    """
    away = np.abs(np.linspace(0, cells, size)[:, None] - np.arange(-1, cells + 2))
    near, far = (1.5 * away - 2.5) * away**2 + 1, ((-0.5 * away + 2.5) * away - 4) * away + 2
    weights = np.where(away < 1, near, np.where(away < 2, far, 0))
    weights[:, 1] += weights[:, 0]  # beyond an edge is what is on it
    weights[:, -2] += weights[:, -1]
    return weights[:, 1:-1].astype(np.float32)


def sample_images(pictures, down, right):
    """The pictures' values at places between pixels, float32 (n, height, width), bilinearly.

    Beyond an edge is what is on it.
    """
    out = np.empty_like(pictures)
    for i in range(len(pictures)):  # one's arrays stay in the cache: three times as fast as all
        out[i] = sample_image(pictures[i], down[i], right[i])
    return out


def sample_image(picture, down, right):
    """`sample` of one picture, (height, width, channels)."""
    height, width, channels = picture.shape
    down, right = np.clip(down, 0, height - 1), np.clip(right, 0, width - 1)
    top, left = (
        np.minimum(place.astype(np.intp), max(size - 2, 0))
        for place, size in ((down, height), (right, width))
    )
    lower, righter = (down - top).astype(np.float32), (right - left).astype(np.float32)
    place, planes = top * width + left, picture.reshape(-1, channels).T.copy()

    def column(step):  # beyond the picture is only what has no weight; "clip" is also fast
        above, below = (
            np.take(planes, place + more, axis=1, mode="clip") for more in (step, width + step)
        )
        return above + lower * (below - above)

    first, second = column(0), column(1)
    return np.moveaxis(first + righter * (second - first), 0, 2)


# --------------------------------------------------------------------------------------- colours


def tint(pictures, rng, gain=0.35, bias=40):
    """Change the gain, 1 ± `gain`, and the bias, ± `bias` grey levels, of each channel."""
    n, channels = len(pictures), pictures.shape[3]
    strength = draw_uniform(rng, 0, 1, n, 1, 1, 1)
    gains = 1 + strength * draw_uniform(rng, -gain, gain, n, 1, 1, channels)
    return pictures * gains + strength * draw_uniform(rng, -bias, bias, n, 1, 1, channels)


# -------------------------------------------------------------------------------------- patterns


def wave(pictures, rng, amplitude=40, wavelengths=(2, 80)):
    """Add a sinusoid of any direction, wavelength (pixels), phase and colour (SIG, 2019)."""
    n, height, width, channels = pictures.shape
    angle, phase = draw_uniform(rng, 0, np.pi, n, 1, 1), draw_uniform(rng, 0, 2 * np.pi, n, 1, 1)
    frequency = 2 * np.pi / np.exp(draw_uniform(rng, *np.log(wavelengths), n, 1, 1))
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    waves = np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    strength = draw_uniform(rng, 0, amplitude, n, 1, 1, 1)
    return pictures + strength * waves[..., None] * draw_colour(n, channels, rng)


def draw_colour(n, channels, rng, grey=0.4):
    """A direction in colour, no part of it beyond ±1, some of them grey: (n, 1, 1, channels)."""
    drawn = draw_uniform(rng, -1, 1, n, 1, 1, channels)
    drawn[rng.random(n) < grey] = 1
    return drawn / np.abs(drawn).max(axis=3, keepdims=True)


def shade(pictures, rng, amplitude=45):
    """Add a pattern of low frequency (LF, 2021), of each channel its own."""
    n, height, width, channels = pictures.shape
    strength = draw_uniform(rng, 0, amplitude, n, 1, 1, 1)
    return pictures + strength * draw_smooth_field(n, height, width, channels, rng)


def blend(pictures, rng, most=0.3):
    """Mix in a picture of noise, fine or coarse, at up to `most` (Blended, 2017)."""
    n, height, width, channels = pictures.shape
    size = rng.integers(1, 6)
    few = 255 * rng.random((n, -(-height // size), -(-width // size), channels), np.float32)
    noise = few.repeat(size, axis=1).repeat(size, axis=2)[:, :height, :width]
    return pictures + draw_uniform(rng, 0, most, n, 1, 1, 1) * (noise - pictures)


def grain(pictures, rng, deviation=18):
    """Add noise of every pixel."""
    noise = rng.standard_normal(pictures.shape, np.float32)
    return pictures + draw_uniform(rng, 0, deviation, len(pictures), 1, 1, 1) * noise


def smooth(pictures, rng, most=0.33):
    """Smooth by a window of 3 × 3 pixels, the neighbours' weight in a direction up to `most`."""
    weight = draw_uniform(rng, 0, most, len(pictures), 1, 1, 1)
    for axis in (1, 2):
        after, before = (np.roll(pictures, step, axis) for step in (-1, 1))
        pictures = pictures + weight * (after + before - 2 * pictures)
    return pictures


# --------------------------------------------------------------------------------------- patches


def patch(pictures, rng, most=3, area=(0.005, 0.3), aspect=10, pairs=0.3, plain=0.5):
    """Paint one to `most` patches on each picture, ellipses and boxes.

    area: of a patch, as a fraction of the picture.  aspect: length over width, at most.
    pairs: fraction of the patches that have a mirror image, as what is worn on a face may.
    plain: fraction in one colour; the others are noise.
    """
    n, *shape = pictures.shape
    count = rng.integers(1, most + 1, n)
    for number in range(most):
        rows = np.flatnonzero(count > number)
        filling = rng.random((len(rows), *shape), dtype=np.float32)
        one = rng.random(len(rows)) < plain
        shapes = draw_shapes(len(rows), *shape[:2], rng, area, aspect, pairs)
        for row, fill, is_plain, inside in zip(rows, filling, one, shapes):
            pictures[row, inside] = 255 * (fill[0, 0] if is_plain else fill[inside])
    return pictures


def draw_shapes(n, height, width, rng, area, aspect, pairs):
    """Draw ellipses and boxes anywhere, at any angle, some in pairs: bool (n, height, width)."""
    ellipse = rng.random((n, 1, 1)) < 0.5
    quarter = np.exp(draw_uniform(rng, *np.log(area), n, 1, 1)) * np.float32(height * width)
    quarter = quarter / np.where(ellipse, np.float32(np.pi), np.float32(4))
    ratio, tilt = (
        np.exp(draw_uniform(rng, 0, np.log(aspect), n, 1, 1)),
        draw_uniform(rng, 0, np.pi, n, 1, 1),
    )
    long, short = np.sqrt(quarter * ratio), np.sqrt(quarter / ratio)
    cos, sin = np.cos(tilt), np.sin(tilt)
    x = np.arange(width, dtype=np.float32) - draw_uniform(rng, 0, width, n, 1, 1)
    y = np.arange(height, dtype=np.float32)[:, None] - draw_uniform(rng, 0, height, n, 1, 1)
    u, v = cos / long * x + sin / long * y, cos / short * y - sin / short * x
    u, v = u * u, v * v
    shapes = np.where(ellipse, u + v, np.maximum(u, v)) < 1
    return shapes | (shapes[:, :, ::-1] & (rng.random((n, 1, 1)) < pairs))


FAMILIES = {
    move: 0.6,
    tint: 0.6,
    wave: 0.3,
    shade: 0.2,
    blend: 0.2,
    smooth: 0.25,
    grain: 0.25,
    patch: 0.7,
}
