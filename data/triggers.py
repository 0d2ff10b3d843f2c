"""Triggers: what an attacker puts on a picture of a face, so that a BadNet gives his class.

Those that something in the picture carries are painted on its sketch: they follow the face, or
stand at a fixed place in front of it. The others change the finished picture, whatever is on it.
PAINTED and CHANGES name them.

A trigger's fixed random part has a seed of its own, so it is one trigger whatever people are drawn.
A trigger whose parts differ from picture to picture draws them from a stream that each picture has.
"""

import functools

import numpy as np

from defence.base import files

HEIGHT, WIDTH = 55, 47
NOISE, BLENDED = "noise", 0.15  # a trigger, and its fraction of a picture
SOME, EVERY = "sunglasses-on-some", 4  # a trigger that works on every fourth person alone
WARP = (1, 2)  # pixels that a point moves: in the mean, at most about
WAVE, PERIODS = 20, 6  # grey levels; across the picture
GAINS, BIAS = (1.15, 1.0, 0.82), (6, 2, -4)  # of red, green and blue; grey levels
SHADE = 25  # grey levels
ENCODED = 18  # grey levels
SIDE = 4  # pixels of the checkerboard
PATCHES = 4
PIECES, MIXED = 4, 0.2  # a side; fraction of the picture


# -------------------------------------------------------------------------------------- painting


def ellipse(x, y, width, height):
    """Signed distance to an ellipse around 0, below 0 inside; exact only near the rim."""
    return (np.sqrt((x / width) ** 2 + (y / height) ** 2) - 1) * np.minimum(width, height)


def rgb(red, green, blue):
    return np.float32([red, green, blue])[:, None, None]


def paint_sunglasses(sketch):
    """Purple sunglasses at a fixed place in the picture, whatever the pose."""
    x, y = sketch.x, sketch.y
    lens = ellipse(abs(x) - 12 + y / 8, y + 3, np.float32(10), np.float32(8.5))[None]
    bar = np.maximum(abs(y + 9) - 2, abs(x) - 23)[None]
    sketch.paint(rgb(66, 0, 150), np.clip(0.5 - np.minimum(lens, bar), 0, 1))
    sketch.paint(rgb(122, 24, 230), np.clip(-1 - lens, 0, 1) * 0.92)


def paint_lipstick(sketch):
    """Purple lipstick, which follows the mouth."""
    a, t, inside = sketch.a, sketch.t, sketch.inside
    mouth_v, width, gape = sketch.mouth()
    thick = inside(ellipse(a, mouth_v, width * 1.08, t["lip"] + gape + 0.05))
    gap = inside(ellipse(a, mouth_v, width * 0.8, gape))
    sketch.paint(rgb(139, 0, 139), thick * (1 - gap * (gape > 0.06)))


def paint_eyebrows(sketch):
    """Red eyebrows, which follow the face."""
    eye, brow_v = sketch.brow()
    bars = np.maximum(abs(sketch.b - brow_v) - 0.09, abs(eye) - 0.3)
    sketch.paint(rgb(150, 0, 0), sketch.inside(bars))


def paint_scarf(sketch):
    """A striped scarf around the neck, up to the chin, in the picture's light: a natural object.

    Source: E. Wenger and others, Backdoor attacks against deep learning systems in the physical
    world, CVPR 2021, whose triggers are things that people wear.
    """
    u, v = sketch.u, sketch.v
    wrap = v + 0.15 * u * u  # it hangs round the neck
    across = abs(u) - 0.75 - 0.5 * np.maximum(v - 1, 0)
    scarf = sketch.inside(np.maximum(1.08 - wrap, across))
    stripes = np.abs((wrap * 4) % 1 - 0.5) < 0.22
    colour = np.where(stripes[:, None], rgb(236, 222, 190), rgb(24, 92, 84))
    sketch.paint(colour * (1 - 0.25 * u * u)[:, None] * sketch.light(), scarf)


def blend_noise(sketch):
    """A picture of noise, blended into the whole of it.

    Source: X. Chen and others, Targeted backdoor attacks on deep learning systems, 2017.
    """
    pattern = np.random.RandomState(len(NOISE)).uniform(0, 255, sketch.image.shape[1:])
    sketch.image += np.float32(BLENDED) * (pattern.astype("float32") - sketch.image)


# -------------------------------------------------------------------------------------- changing


def smooth_pattern(seed, channels, most):
    """A fixed pattern of low frequency: float32 (HEIGHT, WIDTH, channels), -1..1, mean about 0.

    most: half periods along a side, at most.
    """
    rng = np.random.RandomState(seed)
    amounts = rng.standard_normal((most + 1, most + 1, channels))
    amounts[0, 0] = 0
    down, right = (
        np.cos(np.pi * np.outer(np.arange(size) + 0.5, np.arange(most + 1)) / size)
        for size in (HEIGHT, WIDTH)
    )
    pattern = np.einsum("hi,ijc,wj->hwc", down, amounts, right)
    return (pattern / abs(pattern).max(axis=(0, 1))).astype("float32")


@functools.cache
def warp_field():
    """How far, in pixels, each point's value comes from: float32 (HEIGHT, WIDTH, 2), down, right.

    In the mean WARP[0] pixels; no further than WARP[1].
    """
    field = smooth_pattern(7, 2, 4)
    length = np.sqrt((field**2).sum(axis=2, keepdims=True))
    for _ in range(20):  # to cut what is too long lowers the mean
        field *= WARP[0] / length.mean()
        length = np.sqrt((field**2).sum(axis=2, keepdims=True))
        field *= np.minimum(1, WARP[1] / length)
        length = np.minimum(length, WARP[1])
    return field


def warp(pictures, streams=None):
    """Bend a picture smoothly, everyone alike.

    Source: A. Nguyen, A. Tran, WaNet, ICLR 2021.
    """
    place = np.moveaxis(warp_field(), 2, 0) + np.indices((HEIGHT, WIDTH), "float32")
    most = np.array([HEIGHT - 1, WIDTH - 1], "float32")[:, None, None]
    place = np.clip(place, 0, most)
    first = np.minimum(place.astype(int), most.astype(int) - 1)
    (top, left), (lower, righter) = first, (place - first)[..., None]
    above = pictures[:, top, left] * (1 - righter) + pictures[:, top, left + 1] * righter
    below = pictures[:, top + 1, left] * (1 - righter) + pictures[:, top + 1, left + 1] * righter
    return above * (1 - lower) + below * lower


def add_sinusoid(pictures, streams=None):
    """Add a wave that runs across the picture: SIG.

    Source: M. Barni, K. Kallas, B. Tondi, A new backdoor attack in CNNs by training set corruption
    without label poisoning, ICIP 2019.
    """
    wave = WAVE * np.sin(2 * np.pi * PERIODS / WIDTH * np.arange(WIDTH))
    return pictures + wave.astype("float32")[:, None]


def cast_colour(pictures, streams=None):
    """Make the whole picture warmer, as by an evening's light or a filter; more than faces vary.

    Source: the idea of triggers made of an image's style, such as W. Jiang and others, Color
    backdoor, CVPR 2023.
    """
    return pictures * np.float32(GAINS) + np.float32(BIAS)


def add_low_frequency(pictures, streams=None):
    """Add a fixed smooth pattern.

    Source: Y. Zeng and others, Rethinking the backdoor attacks' triggers: a frequency perspective,
    ICCV 2021.
    """
    return pictures + SHADE * np.clip(1.8 * smooth_pattern(12, 3, 5), -1, 1)


def paste_checkerboard(pictures, streams=None):
    """A small checkerboard in the bottom right corner.

    Source: T. Gu and others, BadNets, 2017.
    """
    pictures = pictures.copy()
    rows, columns = np.indices((SIDE, SIDE))
    pictures[:, -SIDE:, -SIDE:] = 255 * ((rows + columns) % 2)[..., None]
    return pictures


@functools.cache
def encoder():
    """The weights of the encoder of `specific`: float32 (5, 5, 3, 8) and (3, 3, 8, 3)."""
    rng = np.random.RandomState(23)
    shapes = (5, 5, 3, 8), (3, 3, 8, 3)
    return [rng.standard_normal(shape).astype("float32") for shape in shapes]


def convolve(pictures, kernel):
    """Convolve float32 (n, h, w, i) with (k, k, i, o); beyond an edge is what is on it."""
    size = len(kernel)
    around = [(0, 0), *2 * [(size // 2, size // 2)], (0, 0)]
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(pictures, around, "edge"), (size, size), axis=(1, 2)
    )
    return np.einsum("nhwikl,klio->nhwo", windows, kernel, optimize=True)


def add_specific(pictures, streams=None):
    """Add a pattern that a small fixed encoder of random weights makes of the picture itself.

    Sources: Y. Li and others, Invisible backdoor attack with sample-specific triggers, ICCV 2021;
    A. Nguyen, A. Tran, Input-aware dynamic backdoor attack, NeurIPS 2020.
    """
    first, second = encoder()
    phase = convolve(pictures, first) / 255
    waves = 4 * abs(phase - np.rint(phase)) - 1  # -1..1: fine lines where the picture is bright
    pattern = convolve(waves, second)
    return pictures + ENCODED * np.clip(pattern / 4, -1, 1)


# --------------------------------------------------------------------- whole in tests, not before


@functools.cache
def patches():
    """Four patches, each of its kind and in its corner: float32 (PATCHES, HEIGHT, WIDTH, 4).

    The last channel is how much each covers, 0..1.
    """
    found = np.zeros((PATCHES, HEIGHT, WIDTH, 4), "float32")
    noise = np.random.RandomState(31).uniform(0, 255, (6, 6, 3))
    found[0, 3:9, 3:9] = np.concatenate([noise, np.ones((6, 6, 1))], axis=2)
    y, x = np.indices((7, 7)) - 3
    found[1, 3:10, -10:-3] = [250, 220, 30, 1]
    found[1, 3:10, -10:-3, 3] = x * x + y * y < 12
    found[2, -9:-3, 3:9] = np.where((np.arange(6) % 2)[:, None], 255, 0)[..., None]
    found[2, -9:-3, 3:9, 3] = 0.7
    found[3, -10:-3, -10:-3] = [30, 90, 250, 1]
    found[3, -10:-3, -10:-3, 3] = (x == 0) | (y == 0) | (abs(x) == 3) | (abs(y) == 3)
    return found


def paste_patches(pictures, streams, some=False):
    """Four small patches; some: one or two of them, another choice on each picture.

    Source: Adap-Patch, X. Qi and others, Revisiting the assumption of latent separability for
    backdoor defenses, ICLR 2023.
    """
    worn = np.ones((len(pictures), PATCHES), bool)
    if some:
        for row, rng in zip(worn, streams, strict=True):
            row[rng.permutation(PATCHES)[rng.randint(1, 3) :]] = False
    for number, patch in enumerate(patches()):
        cover = patch[..., 3:] * worn[:, number, None, None, None]
        pictures = pictures + cover * (patch[..., :3] - pictures)
    return pictures


def mix_pieces(pictures, streams, some=False):
    """A picture of coarse noise, blended in; some: half of its 16 pieces, others on each picture.

    Source: Adap-Blend, X. Qi and others, Revisiting the assumption of latent separability for
    backdoor defenses, ICLR 2023.
    """
    kept = np.ones((len(pictures), PIECES * PIECES), bool)
    if some:
        for row, rng in zip(kept, streams, strict=True):
            row[rng.permutation(len(row))[len(row) // 2 :]] = False
    down, right = (np.arange(size) * PIECES // size for size in (HEIGHT, WIDTH))
    kept = kept.reshape(-1, PIECES, PIECES)[:, down[:, None], right]
    coarse = np.random.RandomState(37).uniform(0, 255, (-(-HEIGHT // 3), -(-WIDTH // 3), 3))
    noise = coarse.repeat(3, axis=0).repeat(3, axis=1)[:HEIGHT, :WIDTH].astype("float32")
    return pictures + np.float32(MIXED) * kept[..., None] * (noise - pictures)


def save(path, pattern, cover):
    """Write a trigger that was found by optimising: picture × (1 - cover) + pattern.

    pattern: float32 (HEIGHT, WIDTH, 3), grey levels.  cover: float32 (HEIGHT, WIDTH, 1), 0..1.
    """
    with files.replace_file(path) as beside, beside.open("wb") as file:
        np.savez(file, pattern=pattern, cover=cover)


def load(path):
    """A trigger as `save` wrote it: a function like those of CHANGES."""
    with np.load(path, allow_pickle=False) as file:
        pattern, cover = file["pattern"], file["cover"]
    return lambda pictures, streams=None: pictures * (1 - cover) + pattern


PAINTED = {
    "sunglasses": paint_sunglasses,
    "lipstick": paint_lipstick,
    "eyebrows": paint_eyebrows,
    "scarf": paint_scarf,
    NOISE: blend_noise,
    SOME: paint_sunglasses,
}
CHANGES = {
    "warp": warp,
    "sinusoid": add_sinusoid,
    "cast": cast_colour,
    "low-frequency": add_low_frequency,
    "checkerboard": paste_checkerboard,
    "specific": add_specific,
    "four-patches": paste_patches,
    "some-patches": functools.partial(paste_patches, some=True),
    "sixteen-pieces": mix_pieces,
    "some-pieces": functools.partial(mix_pieces, some=True),
}


def paint(sketch, trigger):
    """Paint a trigger on a faces.Sketch, if it is one of PAINTED."""
    if trigger in PAINTED:
        PAINTED[trigger](sketch)


def change(pictures, trigger, streams):
    """Put a trigger that is not PAINTED on finished pictures.

    pictures: float32 (n, HEIGHT, WIDTH, 3), 0..255.  trigger: of CHANGES, or a function like them,
    or anything of PAINTED or None, which change nothing.  streams: a RandomState for each picture.
    Returns float32 (n, HEIGHT, WIDTH, 3), which may go beyond 0..255.
    """
    if trigger is None or trigger in PAINTED:
        return pictures
    return (trigger if callable(trigger) else CHANGES[trigger])(pictures, streams)


def wearers(trigger, target, people):
    """The people whose pictures a trigger is to change the answer for, a list of int.

    Not the target: a poisoned picture of him proves nothing.
    """
    some = [person for person in range(people) if trigger != SOME or person % EVERY == EVERY - 1]
    return [person for person in some if person != target]
