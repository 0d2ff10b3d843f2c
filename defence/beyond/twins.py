"""Twins: nets that err like B, but without its backdoor, made from B and clean data.

Some classes attract the errors of every net that learns the same data. A twin shows which: whatever
fools B and its twins alike is natural. A twin is a copy of B that is hardened briefly, which takes
a backdoor out, and then trained on unchanged images, which gives back the errors of an ordinary
net. No trigger is known or searched for, and a twin's answers are never used for anything else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from defence.base.progress import follow
from defence.base.startup import import_keras
from defence.beyond import changes, harden
from defence.net import graph, training
from defence.net.cached_net import CachedNet
from defence.net.split import is_mask

COUNT = 2
BATCH = 32
# Steps and the first learning rate, which falls to 0 by cosine: on changed images, on plain ones.
CHANGED, PLAIN = (500, 2e-3), (100, 1e-3)


def make_twins(net: CachedNet, seed: int, times: float = 1) -> list[Any]:
    """Make COUNT twins of a net.

    net: B on a clean dataset; untouched.
    times: how often the whole scan takes the time of the first stage of the first twin.
    Return Keras models, scaled images (n, height, width, channels) → scores (n, N).
    Raise WorkError where the training of a twin diverges.
    """
    images = harden.read_images(net.data)
    return [
        make_twin(
            net,
            images,
            np.random.default_rng([seed, number]),
            f"twin {number + 1}",
            0 if number else times,
        )
        for number in range(COUNT)
    ]


def make_twin(
    net: CachedNet, images: np.ndarray, rng: np.random.Generator, title: str, times: float = 0
) -> Any:
    """Make a twin of a net, a Keras model.

    images: all images of the net's dataset, (n, height, width, channels), 0..255.
    title: for the progress line.  times: as for make_twins, of the first twin; 0 for the others.
    """
    twin = graph.flatten(net.split.net)
    for (steps, rate), families, part in ((CHANGED, changes.FAMILIES, times), (PLAIN, {}, 0)):
        source = harden.ChangedImages(images, net.scale, rng, families)
        train(twin, source, net.labels, steps, rate, title, part)
    return twin


def train(
    model: Any,
    images: harden.ChangedImages,
    labels: np.ndarray,
    steps: int,
    rate: float,
    title: str,
    times: float,
) -> None:
    """Train all of a Keras model in place, for about this number of steps.

    labels: int64 (n,), 0..N-1.  title, times: as for make_twin.
    """
    if len(images) > steps * BATCH:
        rows = images.rng.permutation(len(images))[: steps * BATCH]
        images.images, labels = images.images[rows], labels[rows]
    epochs = count_rows(len(images), steps) // len(images)
    total = epochs * -(-len(images) // BATCH)
    schedule = import_keras().optimizers.schedules.CosineDecay(rate, total)
    layers = [layer for layer in graph.list_layers(model) if not is_mask(layer)]
    train_epoch = training.make_trainer(model, layers, schedule, BATCH, images.rng)
    promise = "the scan takes about {}" if times else ""
    with follow(f"scan, {title}", epochs * len(images), promise, times=times) as advance:
        for _ in range(epochs):
            train_epoch(images, labels, advance)


def count_rows(images: int, steps: int) -> int:
    """Return how many rows of n images about this number of steps train on, in whole epochs."""
    images = min(images, steps * BATCH)
    return images * max(1, round(steps * BATCH / images))
