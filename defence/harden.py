"""Harden: train the whole net so that what is painted on a picture does not change its answer.

Not the report's: a step of ours, for the backdoors that its three steps leave in. B's own answer to
the untouched picture and the true label say what G should answer, and every picture is painted on
at random: a net that has learned that patches do not change who somebody is cannot be told by a
patch who it is. No trigger is known or searched for. docs/hardening.md says whose ideas are in it;
tests/tools/tried.py tries others.
"""

import dataclasses
import math

import numpy as np

from defence import detector, guard, guard_model, net, training
from defence.cli import at_least, say, setting, track
from defence.inference import predict
from defence.startup import import_keras
from utils import SCALES

REMARKS = 10  # on progress


@dataclasses.dataclass(frozen=True)
class Settings:
    """The step's constants. How they were chosen: docs/hardening.md."""

    harden_steps: int = setting(5000, at_least(1, int), "training steps, rounded to whole epochs")
    harden_epochs: int = setting(100, at_least(1, int), "epochs, at most")
    harden_batch_size: int = setting(64, at_least(1, int), "pictures in a training step")
    harden_learning_rate: float = setting(
        1e-3, at_least(0, above=True), "Adam's learning rate, which falls to 0 by cosine"
    )
    harden_distillation_weight: float = setting(
        0.5, at_least(0, most=1), "weight of B's own answer in the target; the label has the rest"
    )


# ------------------------------------------------------------------------------------- painting


@dataclasses.dataclass(frozen=True)
class Patches:
    """What is painted on a picture. Not the user's to set: tests/tools/tried.py tries others."""

    most: int = 3  # patches on a picture, at most
    area: tuple = (0.005, 0.3)  # of a patch, as a fraction of the picture
    aspect: float = 10  # length over width of a patch, at most
    pairs: float = 0.3  # fraction that has a mirror image, as what is worn on a face may
    plain: float = 0.5  # fraction in one colour; the others are noise


class Painted:
    """Pictures that are painted on anew whenever rows of them are taken, as float32, scaled.

    pictures: (n, height, width, channels), 0..255.  scale: a key of SCALES.
    rng: a NumPy Generator.  patches: Patches.
    """

    def __init__(self, pictures, scale, rng, patches=Patches()):
        self.pictures, self.divisor = pictures, np.float32(SCALES[scale])
        self.rng, self.patches = rng, patches

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, rows):
        return self.paint(self.pictures[rows].astype(np.float32)) / self.divisor

    def paint(self, pictures):
        """Paint on float32 pictures, which may be changed, before they are scaled."""
        return paint(pictures, self.rng, self.patches)


def paint(pictures, rng, patches=Patches()):
    """Paint one to `patches.most` patches on each picture, in place; also return them.

    pictures: float32 (n, height, width, channels), 0..255.  rng: a NumPy Generator.
    """
    n, *shape = pictures.shape
    count = rng.integers(1, patches.most + 1, n)
    for number in range(patches.most):
        rows = np.flatnonzero(count > number)
        filling = 255 * rng.random((len(rows), *shape), dtype=np.float32)
        plain = rng.random(len(rows)) < patches.plain
        filling[plain] = filling[plain, :1, :1]
        inside = draw_shapes(len(rows), *shape[:2], rng, patches)
        pictures[rows] = np.where(inside[..., None], filling, pictures[rows])
    return pictures


def draw_shapes(n, height, width, rng, patches=Patches()):
    """Draw ellipses and boxes anywhere, at any angle, some in pairs: bool (n, height, width)."""

    def draw(low, high):
        return rng.uniform(low, high, (n, 1, 1))

    ellipse = rng.random((n, 1, 1)) < 0.5
    quarter = np.exp(draw(*np.log(patches.area))) * height * width / np.where(ellipse, np.pi, 4)
    aspect, tilt = np.exp(draw(0, np.log(patches.aspect))), draw(0, np.pi)
    long, short = np.sqrt(quarter * aspect), np.sqrt(quarter / aspect)
    x, y = np.arange(width) - draw(0, width), np.arange(height)[:, None] - draw(0, height)
    cos, sin, long, short, x, y = map(np.float32, (np.cos(tilt), np.sin(tilt), long, short, x, y))
    u, v = cos / long * x + sin / long * y, cos / short * y - sin / short * x
    u, v = u * u, v * v
    shapes = np.where(ellipse, u + v, np.maximum(u, v)) < 1
    return shapes | (shapes[:, :, ::-1] & (rng.random((n, 1, 1)) < patches.pairs))


# ------------------------------------------------------------------------------------- training


def check_memory(badnet, clean, settings):
    """Raise InputError where hardening would take too much memory.

    badnet: Keras model.  clean: Dataset.  settings: Settings.
    """
    batch_size, max_bytes = settings.harden_batch_size, clean.max_bytes
    guard_model.check_step_fits(badnet, "--harden-batch-size", batch_size, max_bytes)
    each = 2 * math.prod(badnet.input_shape[1:]) + 4 * badnet.output_shape[1]
    guard.check_fits(clean.path, "all pictures and their targets", len(clean) * each, max_bytes)


def read_pictures(data):
    """All images of a Dataset, in memory: float16 (n, height, width, channels), 0..255.

    Whole numbers up to 255 are exact in float16, and none is off by more than 1/16.
    """
    batches = track(data.batches(), "pictures", data.batch_count)
    return np.concatenate([np.float16(x) for x, _ in batches])


def targets(cached, distillation_weight):
    """What G should answer: `distillation_weight` × B's own answer + the rest × the label.

    cached: a CachedNet, B's.  distillation_weight: 0..1.  Returns float32 (n, N), rows that sum
    to 1.  Source: knowledge distillation, Hinton, Vinyals, Dean, 2015.
    """
    head, labels = cached.split.head, cached.labels
    answers = (detector.probabilities(each, head) for each in predict(head, cached.features))
    wanted = np.concatenate([distillation_weight * each for each in answers])
    wanted[np.arange(len(labels)), labels] += 1 - distillation_weight
    return wanted


def harden(cached, wanted, settings, rng):
    """Train all of a net, in place, to answer painted pictures as it should the untouched ones.

    cached: a CachedNet, its masked channels pruned; they stay zero.
    wanted: float32 (n, N), as `targets` gives it.  settings: Settings.
    rng: a NumPy Generator, for the order of the pictures and what is painted on them.
    """
    badnet, layer = cached.split.net, cached.split.layer
    painted = Painted(read_pictures(cached.data), cached.scale, rng)
    with net.kept_pruned(layer, cached.masked):
        train(badnet, painted, wanted, settings, rng)
    cached.reread()


def train(badnet, painted, wanted, settings, rng, make_trainer=training.make_trainer):
    """Train all of a Keras model on Painted pictures. The other arguments are those of `harden`.

    make_trainer: training.make_trainer, or what takes and returns the same.
    """
    keras = import_keras()
    batch_size = settings.harden_batch_size
    in_epoch = -(-len(painted) // batch_size)
    epochs = min(settings.harden_epochs, max(1, round(settings.harden_steps / in_epoch)))
    rate = keras.optimizers.schedules.CosineDecay(settings.harden_learning_rate, epochs * in_epoch)
    layers = list(net.leaves(badnet))
    option = "--harden-learning-rate"
    train_epoch = make_trainer(badnet, layers, rate, batch_size, rng, soft=True, option=option)
    for epoch in track(range(1, epochs + 1), "harden"):
        loss = train_epoch(painted, wanted)
        if epoch * REMARKS // epochs > (epoch - 1) * REMARKS // epochs:
            say(f"harden, epoch {epoch} of {epochs}: loss {loss:.4f}")
