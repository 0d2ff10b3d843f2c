"""Harden: train the whole net so that random changes of a picture do not change its answer.

Not the report's: a step of ours, for the backdoors that its three steps leave in. Every picture is
changed anew each time, as changes.py says, and G is taught its label: a net that has learned that
such changes do not change who somebody is cannot be told by one of them who it is. No trigger is
known or searched for. B's own answers teach nothing, since they carry the trigger over (SCAR,
NeurIPS 2025). docs/hardening.md says whose ideas are in it, and how it was chosen;
tests/tools/tried.py tries it without one family of changes at a time.
"""

import dataclasses
import math

import numpy as np

from defence import changes, files, graph, guard, guard_model, net, patterns, pixels, training
from defence.cli import at_least, say, setting, track
from defence.startup import import_keras

REMARKS = 10  # on progress
PICTURES = "all pictures"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The step's constants. How they were chosen: docs/hardening.md."""

    harden_steps: int = setting(10000, at_least(1, int), "training steps, rounded to whole epochs")
    harden_epochs: int = setting(300, at_least(1, int), "epochs, at most")
    harden_batch_size: int = setting(64, at_least(1, int), "pictures in a training step")
    harden_learning_rate: float = setting(
        1e-3, at_least(0, above=True), "Adam's learning rate, which falls to 0 by cosine"
    )
    harden_pattern_rate: float = setting(
        0.1, at_least(0, most=1), "of the pictures that get a pattern sought against the net, 0..1"
    )


class Changed:
    """Pictures that are changed anew whenever rows of them are taken, as float32, scaled.

    pictures: (n, height, width, channels), 0..255.  scale: a key of pixels.SCALES.
    rng: a NumPy Generator.  families: as for changes.change.
    """

    def __init__(self, pictures, scale, rng, families=changes.FAMILIES):
        self.pictures, self.scale, self.rng, self.families = pictures, scale, rng, families

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, rows):
        taken = self.pictures[rows].astype(np.float32)
        return pixels.scaled(changes.change(taken, self.rng, self.families), self.scale)


def check_memory(badnet, clean, settings):
    """Raise InputError where hardening would take too much memory.

    badnet: Keras model.  clean: Dataset.  settings: Settings.
    """
    batch_size, max_bytes = settings.harden_batch_size, clean.max_bytes
    guard_model.check_step_fits(badnet, "--harden-batch-size", batch_size, max_bytes)
    values = math.prod(badnet.input_shape[1:])
    files.check_room(clean.path, PICTURES, 2 * len(clean) * values, max_bytes)
    if settings.harden_pattern_rate:
        size = patterns.COPIES * patterns.COUNT * 4 * values
        guard.check_fits("--harden-pattern-rate", "the patterns", size, max_bytes)


def read_pictures(data):
    """All images of a Dataset: float16 (n, height, width, channels), 0..255.

    Whole numbers up to 255 are exact in float16, and none is off by more than 1/16.
    """
    shape, done = (len(data), *data.shape), 0
    pictures = files.room_for(shape, np.float16, data.path, PICTURES, data.max_bytes)
    for x, _ in track(data.batches(), "pictures", data.batch_count):
        pictures[done : done + len(x)] = x
        done += len(x)
    return pictures


def harden(cached, settings, rng):
    """Train all of a net, in place, to answer changed pictures with their labels.

    cached: a CachedNet, its masked channels pruned; they stay zero.  settings: Settings.
    rng: a NumPy Generator, for the order of the pictures and how they are changed.
    """
    changed = Changed(read_pictures(cached.data), cached.scale, rng)
    with net.kept_pruned(cached.split.layer, cached.masked):
        train(cached.split.net, changed, cached.labels, settings, rng)
    cached.reread()


def train(badnet, changed, labels, settings, rng):
    """Train all of a Keras model on Changed pictures. The other arguments are those of `harden`.

    labels: int64 (n,), 0..N-1.
    """
    epochs, rate = schedule(len(changed), settings)
    layers = [layer for layer in graph.leaves(badnet) if not net.is_mask(layer)]
    size = settings.harden_batch_size
    option = "--harden-learning-rate"
    prepare = make_patterns(badnet, changed.scale, settings, rng)
    train_epoch = training.make_trainer(
        badnet, layers, rate, size, rng, option=option, prepare=prepare
    )
    for epoch in track(range(1, epochs + 1), "harden"):
        loss = train_epoch(changed, labels)
        if epoch * REMARKS // epochs > (epoch - 1) * REMARKS // epochs:
            say(f"harden, epoch {epoch} of {epochs}: loss {loss:.4f}")


def make_patterns(badnet, scale, settings, rng):
    """The Patterns to seek against a Keras model; None where no picture is to get one.

    scale: of its pixels.  The other arguments are those of `harden`.
    """
    rate = settings.harden_pattern_rate
    return patterns.Patterns(badnet, scale, rate, int(rng.integers(2**31))) if rate else None


def schedule(pictures, settings):
    """How many epochs of so many pictures, and the learning rate: (int, Keras schedule)."""
    steps = -(-pictures // settings.harden_batch_size)
    epochs = min(settings.harden_epochs, max(1, round(settings.harden_steps / steps)))
    cosine = import_keras().optimizers.schedules.CosineDecay
    return epochs, cosine(settings.harden_learning_rate, epochs * steps)
