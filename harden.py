"""Harden: train the whole net so that what is painted on a picture does not change its answer.

Not the report's: a step of ours, for the backdoors that its three steps leave in. B's own answer to
the untouched picture and the true label say what G shall answer, and every picture is painted on at
random: a net that has learned that patches do not change who somebody is cannot be told by a patch
who it is. No trigger is known or searched for. README says whose ideas are in it;
tests/tried.py tries others.
"""

import math

import numpy as np

import nets
import utils
from terminal import at_least, say, track

# The step's constants: type, value, what it is. How they were chosen: README.
SETTINGS = {
    "harden_steps": (at_least(1, int), 5000, "training steps of --harden, in whole epochs"),
    "harden_epochs": (at_least(1, int), 100, "epochs of --harden, at most"),
    "harden_batch_size": (at_least(1, int), 64, "pictures in a step of --harden"),
    "harden_learning_rate": (at_least(0, above=True), 1e-3, "Adam's, which falls to 0 by cosine"),
    "harden_trust": (at_least(0, most=1), 0.5, "weight of B's own answer, beside the label's"),
}

PATCHES = 3  # at most, on a picture
AREA = (0.005, 0.3)  # of a patch, as a share of the picture
ASPECT = 10  # length over width of a patch, at most
PAIRS = 0.3  # share of patches that have a mirror image, as what is worn on a face may
PLAIN = 0.5  # share of patches in one colour; the others are noise
REMARKS = 10  # on the way


class Painted:
    """Pictures that are painted on anew whenever rows of them are taken, as float32, scaled.

    pictures: (n, height, width, channels), 0..255.  scale: a key of utils.SCALES.
    rng: a NumPy Generator.
    """

    def __init__(self, pictures, scale, rng):
        self.pictures, self.divisor, self.rng = pictures, np.float32(utils.SCALES[scale]), rng

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, rows):
        return paint(self.pictures[rows].astype(np.float32), self.rng) / self.divisor


def paint(pictures, rng):
    """Paint 1 to PATCHES patches on each picture, in place; also return them.

    pictures: float32 (n, height, width, channels), 0..255.  rng: a NumPy Generator.
    """
    n, *shape = pictures.shape
    count = rng.integers(1, PATCHES + 1, n)
    for number in range(PATCHES):
        rows = np.flatnonzero(count > number)
        filling = 255 * rng.random((len(rows), *shape), dtype=np.float32)
        plain = rng.random(len(rows)) < PLAIN
        filling[plain] = filling[plain, :1, :1]
        inside = draw_shapes(len(rows), *shape[:2], rng)
        pictures[rows] = np.where(inside[..., None], filling, pictures[rows])
    return pictures


def draw_shapes(n, height, width, rng):
    """Draw ellipses and boxes anywhere, at any angle, some in pairs: bool (n, height, width)."""

    def draw(low, high):
        return rng.uniform(low, high, (n, 1, 1))

    ellipse = rng.random((n, 1, 1)) < 0.5
    quarter = np.exp(draw(*np.log(AREA))) * height * width / np.where(ellipse, np.pi, 4)
    aspect, tilt = np.exp(draw(0, np.log(ASPECT))), draw(0, np.pi)
    long, short = np.sqrt(quarter * aspect), np.sqrt(quarter / aspect)
    x, y = np.arange(width) - draw(0, width), np.arange(height)[:, None] - draw(0, height)
    cos, sin, long, short, x, y = map(np.float32, (np.cos(tilt), np.sin(tilt), long, short, x, y))
    u, v = cos / long * x + sin / long * y, cos / short * y - sin / short * x
    u, v = u * u, v * v
    shapes = np.where(ellipse, u + v, np.maximum(u, v)) < 1
    return shapes | (shapes[:, :, ::-1] & (rng.random((n, 1, 1)) < PAIRS))


def read_pictures(data):
    """All images of a Dataset, in memory: float16 (n, height, width, channels), 0..255.

    Whole numbers up to 255 are exact in float16, and none is off by more than 1/16.
    """
    batches = track(data.batches(), "pictures", data.batch_count)
    return np.concatenate([np.float16(x) for x, _ in batches])


def memory(net):
    """Bytes that a picture, as read_pictures keeps it, and its row of `targets` take."""
    return 2 * math.prod(net.input_shape[1:]) + 4 * net.output_shape[1]


def targets(head, features, labels, trust):
    """What G shall answer: `trust` × B's own answer + (1 − trust) × the label, float32 (n, N).

    head, features: B's, features → scores, and float32 (n, …, C).  labels: int (n,), 0..N-1.
    """
    answers = (nets.probabilities(scores, head) for scores in nets.outputs(head, features))
    wanted = np.concatenate([trust * each for each in answers])
    wanted[np.arange(len(labels)), labels] += 1 - trust
    return wanted


def harden(net, pictures, scale, wanted, settings, rng):
    """Train all of a net, in place, to answer painted pictures as it should the untouched ones.

    pictures: (n, height, width, channels), 0..255.  scale: a key of utils.SCALES.
    wanted: float32 (n, N), as `targets` gives it.  settings: with the attributes of SETTINGS.
    rng: a NumPy Generator, for the order of the pictures and what is painted on them.
    """
    keras = utils.import_keras()
    in_epoch = -(-len(pictures) // settings.harden_batch_size)
    epochs = min(settings.harden_epochs, max(1, round(settings.harden_steps / in_epoch)))
    rate = keras.optimizers.schedules.CosineDecay(settings.harden_learning_rate, epochs * in_epoch)
    train_epoch = nets.make_trainer(
        net, net.layers, rate, settings.harden_batch_size, rng, soft=True
    )
    painted = Painted(pictures, scale, rng)
    for epoch in track(range(1, epochs + 1), "harden"):
        loss = train_epoch(painted, wanted)
        if epoch * REMARKS // epochs > (epoch - 1) * REMARKS // epochs:
            say(f"harden, epoch {epoch} of {epochs}: loss {loss:.4f}")
