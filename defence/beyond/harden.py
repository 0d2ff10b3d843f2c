"""Harden: train the whole net so that random changes of an image do not change its answer.

This step is ours, not the report's. It is for the backdoors that the report's three steps leave in.
Each image is changed anew every time (changes.py), and G is taught its label. A net that has
learned to ignore such changes cannot take one of them for a trigger. No trigger is known or
searched for. B's own answers teach nothing, since they carry the trigger over (SCAR, NeurIPS 2025).
docs/hardening.md says what the step gives, docs/design-notes.md how it was chosen;
tests/tools/tried.py tries it without one family of changes at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from defence.base import pixels
from defence.base.arguments import at_least, setting
from defence.base.limits import allocate
from defence.base.progress import follow, say, track
from defence.beyond import changes, patterns
from defence.net import graph, training
from defence.net.cached_net import CachedNet, LabelledImages
from defence.net.split import is_mask, keep_pruned, make_trainable

REMARKS = 10  # on progress
ALL_IMAGES = "all images"
RISE, FALL = 0.05, 0.7  # of the steps, in which the learning rate rises, and falls


@dataclasses.dataclass(frozen=True)
class Settings:
    """The step's constants. docs/design-notes.md says how they were chosen."""

    harden_steps: int = setting(5000, at_least(1, int), "training steps, rounded to whole epochs")
    harden_epochs: int = setting(150, at_least(1, int), "epochs, at most")
    harden_batch_size: int = setting(64, at_least(1, int), "images in a training step")
    harden_learning_rate: float = setting(
        4e-3,
        at_least(0, above=True),
        "Adam's learning rate at its highest; it rises first, and falls to 0",
    )
    harden_pattern_rate: float = setting(
        0.1,
        at_least(0, most=1),
        "fraction of each step's images to which a pattern is added that was computed to make G "
        "answer another class, so that G learns to ignore such patterns; 0: none",
    )


class ChangedImages:
    """Images that are changed anew whenever rows of them are taken, as float32, scaled.

    images: (n, height, width, channels), 0..255.  scale: a key of pixels.SCALES.
    families: as for changes.change_images.
    """

    def __init__(
        self,
        images: np.ndarray,
        scale: str,
        rng: np.random.Generator,
        families: dict[Callable, float] = changes.HARDENING,
    ) -> None:
        self.images, self.scale, self.rng, self.families = images, scale, rng, families

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Any) -> np.ndarray:
        images = self.images[rows].astype(np.float32)
        images = changes.change_images(images, self.rng, self.families)
        return pixels.scale_pixels(images, self.scale)


def read_images(data: LabelledImages) -> np.ndarray:
    """Read all images of a dataset: float16 (n, height, width, channels), 0..255.

    Whole numbers up to 255 are exact in float16, and no other value is off by more than 1/16.
    """
    shape, start = (len(data), *data.shape), 0
    images = allocate(shape, np.float16, data.path, ALL_IMAGES, data.max_bytes)
    for x, _ in track(data.batches(), "images", data.batch_count):
        images[start : start + len(x)] = x
        start += len(x)
    return images


def harden_net(cached: CachedNet, settings: Settings) -> None:
    """Train all of a net, in place, to answer changed images with their labels.

    cached: its masked channels are pruned and stay zero. Its generator draws the order of the
    images and how they are changed.
    """
    images = ChangedImages(read_images(cached.data), cached.scale, cached.rng)
    with keep_pruned(cached.split.layer, cached.masked):
        train_on_changes(cached.split.net, images, cached.labels, settings, cached.rng)
    make_trainable(cached.split)
    cached.recompute_features()


def train_on_changes(
    model: Any,
    images: ChangedImages,
    labels: np.ndarray,
    settings: Settings,
    rng: np.random.Generator,
) -> None:
    """Train all of a Keras model on changed images. labels: int64 (n,), 0..N-1."""
    epochs, steps, rate = make_schedule(len(images), settings)
    layers = [layer for layer in graph.list_layers(model) if not is_mask(layer)]
    train_epoch = training.make_trainer(
        model,
        layers,
        rate,
        settings.harden_batch_size,
        rng,
        option="--harden-learning-rate",
        prepare=make_patterns(model, images.scale, settings, rng),
    )
    promise = f"hardening takes about {{}} ({steps:,} steps)"
    with follow("harden", epochs * len(images), promise) as advance:
        for epoch in range(1, epochs + 1):
            loss = train_epoch(images, labels, advance)
            if epoch * REMARKS // epochs > (epoch - 1) * REMARKS // epochs:
                say(f"harden, epoch {epoch} of {epochs}: loss {loss:.4f}")


def make_patterns(
    model: Any, scale: str, settings: Settings, rng: np.random.Generator
) -> patterns.Patterns | None:
    """Make the patterns that are optimised against a Keras model; None where no image gets one.

    scale: of the model's pixels.
    """
    rate = settings.harden_pattern_rate
    return patterns.Patterns(model, scale, rate, int(rng.integers(2**31))) if rate else None


def make_schedule(images: int, settings: Settings) -> tuple[int, int, Any]:
    """Return the number of epochs for n images, of steps, and the learning rate.

    The rate is a function of the step in TensorFlow's graph. It rises to its maximum, stays there,
    and falls to 0, each time in a straight line, so that few steps suffice.
    """
    import tensorflow as tf

    batches = -(-images // settings.harden_batch_size)
    epochs = min(settings.harden_epochs, max(1, round(settings.harden_steps / batches)))
    steps = epochs * batches

    def compute_rate(step: Any) -> Any:
        done = (tf.cast(step, tf.float32) + 0.5) / steps
        shape = tf.minimum(1.0, tf.minimum(done / RISE, (1 - done) / FALL))
        return settings.harden_learning_rate * shape

    return epochs, steps, compute_rate
