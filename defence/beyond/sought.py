"""Seek the smallest patch that turns images into a class, on B and on its twins: a view of scan.py.

A trigger is a small patch that B takes for the target, whatever the image; a twin, which has lost
the backdoor, needs a far larger one. After Neural Cleanse (B. Wang and others, IEEE S&P 2019),
which compares the classes of one net. Few random changes resemble a trigger of a few pixels, which
the other views miss, but a search finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from defence.base.limits import BATCH_VALUES
from defence.base.progress import follow
from defence.base.startup import import_keras
from defence.judge import detector

CLASSES, TWINS_CLASSES = 48, 12  # classes to seek a patch for, at most: on B, and on its twins
STEPS, STEP_IMAGES, RATE = 100, 8, 0.1  # images in a step for each class; Adam's learning rate
# A patch must turn SUCCESS of the images. While it does, its size costs more at every step.
SUCCESS, FIRST_COST, COST_STEP, MEMORY = 0.95, 1e-3, 1.3, 0.7


def measure_patches(
    models: Sequence[Any],
    images: np.ndarray,
    classes: np.ndarray,
    limits: tuple[Any, Any],
    rng: np.random.Generator,
) -> np.ndarray:
    """Measure the smallest patch for each of some classes: float64 (len(models), N), pixels.

    models: Keras classifiers, B first.  images: scaled (n, height, width, channels), of all
    classes.  classes: int (k,), the likeliest first; only the first CLASSES take part.
    limits: as pixels.find_pixel_limits returns them.
    NaN stands for a class that was not sought. The twins seek only the TWINS_CLASSES with the
    smallest patches on B.
    """
    sizes = np.full((len(models), models[0].output_shape[1]), np.nan)
    sought = np.sort(classes[:CLASSES])
    steps = STEPS * count_searches(len(classes), len(models))
    with follow("scan, sought patches", steps) as advance:
        for row, model in zip(sizes, models):
            row[sought] = seek_patches(model, images, sought, limits, rng, advance)
            sought = np.sort(sought[np.argsort(sizes[0, sought], kind="stable")][:TWINS_CLASSES])
    return sizes


def seek_patches(
    model: Any,
    images: np.ndarray,
    classes: np.ndarray,
    limits: tuple[Any, Any],
    rng: np.random.Generator,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Seek a patch for each class, and return their sizes in pixels: float64 (len(classes),).

    advance: is called with the number of classes after each step for them.
    The size is the sum of a mask of values 0..1; all the image's pixels, where no patch works.
    """
    most = count_step_images(images[0].size) // STEP_IMAGES
    groups = np.array_split(classes, -(-len(classes) // most))
    return np.concatenate(
        [seek_group(model, images, group, limits, rng, advance) for group in groups]
    )


def count_searches(classes: int, models: int) -> int:
    """Return for how many classes a patch is sought, over all models, of which B is the first."""
    return min(classes, CLASSES) + (models - 1) * min(classes, TWINS_CLASSES)


def count_step_images(values: int) -> int:
    """Return how many images of so many values a step takes, at most."""
    return STEP_IMAGES * min(CLASSES, max(1, BATCH_VALUES // (STEP_IMAGES * values)))


def seek_group(
    model: Any,
    images: np.ndarray,
    classes: np.ndarray,
    limits: tuple[Any, Any],
    rng: np.random.Generator,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Do what `seek_patches` does for so few classes that they share every step."""
    step = make_step(model, classes, limits, rng)
    cost = np.full(len(classes), FIRST_COST, np.float32)
    smallest = np.full(len(classes), float(np.prod(images.shape[1:3])))
    success = np.zeros(len(classes))
    for _ in range(STEPS):
        x = images[rng.integers(0, len(images), STEP_IMAGES)]
        hits, size = (values.numpy() for values in step(x, cost))
        success = MEMORY * success + (1 - MEMORY) * hits
        works = success >= SUCCESS
        smallest = np.where(works, np.minimum(smallest, size), smallest)
        cost = np.where(works, cost * COST_STEP, cost / COST_STEP).astype(np.float32)
        advance(len(classes))
    return smallest


def make_step(
    model: Any, classes: np.ndarray, limits: tuple[Any, Any], rng: np.random.Generator
) -> Callable[[np.ndarray, np.ndarray], Any]:
    """Make a function that trains the patches of all classes by one step of Adam.

    It takes scaled images (STEP_IMAGES, height, width, channels) and the costs of a pixel,
    float32 (k,). It returns the fraction of these images that each class's patch turns into it, and
    the patches' sizes in pixels, (k,).
    """
    import tensorflow as tf

    keras = import_keras()
    count, shape, (low, high) = len(classes), model.input_shape[1:], limits
    mask = keras.Variable(np.full((count, 1, *shape[:2], 1), -2, np.float32))
    pattern = keras.Variable(rng.normal(0, 1, (count, 1, *shape)).astype(np.float32))
    adam = keras.optimizers.Adam(RATE, beta_1=0.5, beta_2=0.9)
    adam.build([mask, pattern])
    targets = np.repeat(classes, STEP_IMAGES)
    low, span = np.float32(low), np.float32(np.subtract(high, low))

    @tf.function(autograph=False)
    def step(x: Any, cost: Any) -> Any:
        with tf.GradientTape() as tape:
            cover = tf.sigmoid(mask)
            filling = low + span * tf.sigmoid(pattern)
            patched = x[None] + cover * (filling - x[None])
            scores = model(tf.reshape(patched, (-1, *shape)), training=False)
            probabilities = detector.compute_probabilities(scores, model)
            target = tf.gather(probabilities, targets, axis=1, batch_dims=1)
            target = tf.reshape(target, (count, STEP_IMAGES))
            size = tf.reduce_sum(cover, axis=(1, 2, 3, 4))
            fit = -tf.reduce_mean(tf.math.log(target + 1e-7), axis=1)
            loss = tf.reduce_sum(fit + cost * size)
        adam.apply(tape.gradient(loss, [mask.value, pattern.value]))
        return tf.reduce_mean(tf.cast(target > 0.5, tf.float32), axis=1), size

    return step
