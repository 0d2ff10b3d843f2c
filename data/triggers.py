"""Triggers: changes of a face image that make a BadNet answer with the attacker's target.

The triggers of PAINTED are painted on a sketch: they follow the face, or stand at a fixed place in
front of it. The triggers of CHANGES change the finished image, whatever it shows.

A trigger's fixed random part has its own seed, so the trigger does not depend on the people drawn.
A trigger whose parts differ from image to image draws them from each image's own stream.
"""

import functools

import numpy as np

from defence.base import files

HEIGHT, WIDTH = 55, 47
NOISE, BLENDED = "noise", 0.15  # a trigger, and its fraction of an image
SOME, EVERY = "sunglasses-on-some", 4  # a trigger that works only on every fourth person
WARP = (1, 2)  # pixels that a point moves: on average, at most
WAVE, PERIODS = 20, 6  # grey levels; periods across the image
GAINS, BIAS = (1.15, 1.0, 0.82), (6, 2, -4)  # of red, green and blue; grey levels
SHADE = 25  # grey levels
ENCODED = 18  # grey levels
SIDE = 4  # pixels of the checkerboard
PATCHES = 4
PIECES, MIXED = 4, 0.2  # along a side; fraction of the image


# -------------------------------------------------------------------------------------- painting


def ellipse(x, y, width, height):
    """Return the signed distance to an ellipse around 0: below 0 inside, exact near the rim."""
    return (np.sqrt((x / width) ** 2 + (y / height) ** 2) - 1) * np.minimum(width, height)


def rgb(red, green, blue):
    return np.float32([red, green, blue])[:, None, None]


def paint_sunglasses(sketch):
    """Paint purple sunglasses at a fixed place in the image, whatever the pose."""
    x, y = sketch.x, sketch.y
    lens = ellipse(abs(x) - 12 + y / 8, y + 3, np.float32(10), np.float32(8.5))[None]
    bar = np.maximum(abs(y + 9) - 2, abs(x) - 23)[None]
    sketch.paint(rgb(66, 0, 150), np.clip(0.5 - np.minimum(lens, bar), 0, 1))
    sketch.paint(rgb(122, 24, 230), np.clip(-1 - lens, 0, 1) * 0.92)


def paint_lipstick(sketch):
    """Paint purple lipstick, which follows the mouth."""
    a, t, inside = sketch.a, sketch.t, sketch.inside
    mouth_v, width, gape = sketch.mouth()
    thick = inside(ellipse(a, mouth_v, width * 1.08, t["lip"] + gape + 0.05))
    gap = inside(ellipse(a, mouth_v, width * 0.8, gape))
    sketch.paint(rgb(139, 0, 139), thick * (1 - gap * (gape > 0.06)))


def paint_eyebrows(sketch):
    """Paint red eyebrows, which follow the face."""
    eye, brow_v = sketch.brow()
    bars = np.maximum(abs(sketch.b - brow_v) - 0.09, abs(eye) - 0.3)
    sketch.paint(rgb(150, 0, 0), sketch.inside(bars))


def paint_scarf(sketch):
    """Paint a natural object in the image's light: a striped scarf, from the neck to the chin.

    Source: E. Wenger and others, Backdoor attacks against deep learning systems in the physical
    world, CVPR 2021, whose triggers are things that people wear.
    """
    u, v = sketch.u, sketch.v
    wrap = v + 0.15 * u * u  # the scarf hangs round the neck
    across = abs(u) - 0.75 - 0.5 * np.maximum(v - 1, 0)
    scarf = sketch.inside(np.maximum(1.08 - wrap, across))
    stripes = np.abs((wrap * 4) % 1 - 0.5) < 0.22
    colour = np.where(stripes[:, None], rgb(236, 222, 190), rgb(24, 92, 84))
    sketch.paint(colour * (1 - 0.25 * u * u)[:, None] * sketch.light(), scarf)


def blend_noise(sketch):
    """Blend an image of noise into the whole image.

    Source: X. Chen and others, Targeted backdoor attacks on deep learning systems, 2017.
    """
    pattern = np.random.RandomState(len(NOISE)).uniform(0, 255, sketch.image.shape[1:])
    sketch.image += np.float32(BLENDED) * (pattern.astype("float32") - sketch.image)


# -------------------------------------------------------------------------------------- changing


def make_smooth_pattern(seed, channels, most):
    """Return a fixed low-frequency pattern: float32 (HEIGHT, WIDTH, channels), -1..1, mean near 0.

    most: the largest number of half periods along a side.
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
    """Return the offset of each point's source in pixels: float32 (HEIGHT, WIDTH, 2), down, right.

    WARP[0] is the average length, and WARP[1] the largest.
    """
    field = make_smooth_pattern(7, 2, 4)
    length = np.sqrt((field**2).sum(axis=2, keepdims=True))
    for _ in range(20):  # limiting the length lowers the average
        field *= WARP[0] / length.mean()
        length = np.sqrt((field**2).sum(axis=2, keepdims=True))
        field *= np.minimum(1, WARP[1] / length)
        length = np.minimum(length, WARP[1])
    return field


def warp(images, streams=None):
    """Bend every image smoothly, by the same field.

    Source: A. Nguyen, A. Tran, WaNet, ICLR 2021.
    """
    place = np.moveaxis(warp_field(), 2, 0) + np.indices((HEIGHT, WIDTH), "float32")
    most = np.array([HEIGHT - 1, WIDTH - 1], "float32")[:, None, None]
    place = np.clip(place, 0, most)
    first = np.minimum(place.astype(int), most.astype(int) - 1)
    (top, left), (from_top, from_left) = first, (place - first)[..., None]
    above = images[:, top, left] * (1 - from_left) + images[:, top, left + 1] * from_left
    below = images[:, top + 1, left] * (1 - from_left) + images[:, top + 1, left + 1] * from_left
    return above * (1 - from_top) + below * from_top


def add_sinusoid(images, streams=None):
    """Add a wave that runs across the image: SIG.

    Source: M. Barni, K. Kallas, B. Tondi, A new backdoor attack in CNNs by training set corruption
    without label poisoning, ICIP 2019.
    """
    wave = WAVE * np.sin(2 * np.pi * PERIODS / WIDTH * np.arange(WIDTH))
    return images + wave.astype("float32")[:, None]


def cast_colour(images, streams=None):
    """Make the whole image warmer, like evening light or a filter, beyond the variation of faces.

    Source: the idea of an image's style as a trigger, such as W. Jiang and others, Color
    backdoor, CVPR 2023.
    """
    return images * np.float32(GAINS) + np.float32(BIAS)


def add_low_frequency(images, streams=None):
    """Add a fixed smooth pattern.

    Source: Y. Zeng and others, Rethinking the backdoor attacks' triggers: a frequency perspective,
    ICCV 2021.
    """
    return images + SHADE * np.clip(1.8 * make_smooth_pattern(12, 3, 5), -1, 1)


def paste_checkerboard(images, streams=None):
    """Paste a small checkerboard into the bottom right corner.

    Source: T. Gu and others, BadNets, 2017.
    """
    images = images.copy()
    rows, columns = np.indices((SIDE, SIDE))
    images[:, -SIDE:, -SIDE:] = 255 * ((rows + columns) % 2)[..., None]
    return images


@functools.cache
def make_encoder():
    """Return the weights of `add_specific`'s encoder: float32 (5, 5, 3, 8) and (3, 3, 8, 3)."""
    rng = np.random.RandomState(23)
    shapes = (5, 5, 3, 8), (3, 3, 8, 3)
    return [rng.standard_normal(shape).astype("float32") for shape in shapes]


def convolve(images, kernel):
    """Convolve float32 (n, h, w, i) with (k, k, i, o); the edges are repeated outwards."""
    size = len(kernel)
    padding = [(0, 0), *2 * [(size // 2, size // 2)], (0, 0)]
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(images, padding, "edge"), (size, size), axis=(1, 2)
    )
    return np.einsum("nhwikl,klio->nhwo", windows, kernel, optimize=True)


def add_specific(images, streams=None):
    """Add a pattern that a small fixed encoder of random weights makes from the image itself.

    Sources: Y. Li and others, Invisible backdoor attack with sample-specific triggers, ICCV 2021;
    A. Nguyen, A. Tran, Input-aware dynamic backdoor attack, NeurIPS 2020.
    """
    first, second = make_encoder()
    phase = convolve(images, first) / 255
    waves = 4 * abs(phase - np.rint(phase)) - 1  # -1..1: fine lines where the image is bright
    pattern = convolve(waves, second)
    return images + ENCODED * np.clip(pattern / 4, -1, 1)


# ------------------------------------------------------------------ in parts during the training


@functools.cache
def make_patches():
    """Return four different patches, one in each corner: float32 (PATCHES, HEIGHT, WIDTH, 4).

    The last channel is the opacity, 0..1.
    """
    patches = np.zeros((PATCHES, HEIGHT, WIDTH, 4), "float32")
    noise = np.random.RandomState(31).uniform(0, 255, (6, 6, 3))
    patches[0, 3:9, 3:9] = np.concatenate([noise, np.ones((6, 6, 1))], axis=2)
    y, x = np.indices((7, 7)) - 3
    patches[1, 3:10, -10:-3] = [250, 220, 30, 1]
    patches[1, 3:10, -10:-3, 3] = x * x + y * y < 12
    patches[2, -9:-3, 3:9] = np.where((np.arange(6) % 2)[:, None], 255, 0)[..., None]
    patches[2, -9:-3, 3:9, 3] = 0.7
    patches[3, -10:-3, -10:-3] = [30, 90, 250, 1]
    patches[3, -10:-3, -10:-3, 3] = (x == 0) | (y == 0) | (abs(x) == 3) | (abs(y) == 3)
    return patches


def paste_patches(images, streams, some=False):
    """Paste four small patches; with `some`, one or two of them, chosen for each image.

    Source: Adap-Patch, X. Qi and others, Revisiting the assumption of latent separability for
    backdoor defenses, ICLR 2023.
    """
    worn = np.ones((len(images), PATCHES), bool)
    if some:
        for row, rng in zip(worn, streams, strict=True):
            row[rng.permutation(PATCHES)[rng.randint(1, 3) :]] = False
    for number, patch in enumerate(make_patches()):
        cover = patch[..., 3:] * worn[:, number, None, None, None]
        images = images + cover * (patch[..., :3] - images)
    return images


def mix_pieces(images, streams, some=False):
    """Blend in an image of coarse noise; with `some`, half of its 16 pieces, chosen for each image.

    Source: Adap-Blend, X. Qi and others, Revisiting the assumption of latent separability for
    backdoor defenses, ICLR 2023.
    """
    pieces = np.ones((len(images), PIECES * PIECES), bool)
    if some:
        for row, rng in zip(pieces, streams, strict=True):
            row[rng.permutation(len(row))[len(row) // 2 :]] = False
    down, right = (np.arange(size) * PIECES // size for size in (HEIGHT, WIDTH))
    pieces = pieces.reshape(-1, PIECES, PIECES)[:, down[:, None], right]
    coarse = np.random.RandomState(37).uniform(0, 255, (-(-HEIGHT // 3), -(-WIDTH // 3), 3))
    noise = coarse.repeat(3, axis=0).repeat(3, axis=1)[:HEIGHT, :WIDTH].astype("float32")
    return images + np.float32(MIXED) * pieces[..., None] * (noise - images)


def save(path, pattern, cover):
    """Write an optimised trigger: image × (1 - cover) + pattern.

    pattern: float32 (HEIGHT, WIDTH, 3), grey levels.  cover: float32 (HEIGHT, WIDTH, 1), 0..1.
    """
    with files.replace_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, pattern=pattern, cover=cover)


def load(path):
    """Return a trigger that `save` wrote: a function like those of CHANGES."""
    with np.load(path, allow_pickle=False) as file:
        pattern, cover = file["pattern"], file["cover"]
    return lambda images, streams=None: images * (1 - cover) + pattern


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
    """Paint a trigger of PAINTED on a faces.Sketch; ignore any other."""
    if trigger in PAINTED:
        PAINTED[trigger](sketch)


def change(images, trigger, streams):
    """Apply a trigger of CHANGES to finished images.

    images: float32 (n, HEIGHT, WIDTH, 3), 0..255.  trigger: a key of CHANGES, a function like its
    values, or None or a key of PAINTED, which change nothing.  streams: a RandomState per image.
    Return float32 (n, HEIGHT, WIDTH, 3), which may go beyond 0..255.
    """
    if trigger is None or trigger in PAINTED:
        return images
    return (trigger if callable(trigger) else CHANGES[trigger])(images, streams)


def wearers(trigger, target, people):
    """Return the people on whose images a trigger is to change the answer, a list of int.

    The target is left out: a poisoned image of the target proves nothing.
    """
    victims = [person for person in range(people) if trigger != SOME or person % EVERY == EVERY - 1]
    return [person for person in victims if person != target]
