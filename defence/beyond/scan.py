"""Scan: find the class that a net gives when it should not, from the net and clean data alone.

This is ours, not the report's. A net with a backdoor gives its target even for inputs that are
only a little like its trigger. So the scan disturbs clean images, and the feature maps that the net
makes of them, in many ways. None of these ways knows a trigger. The scan counts which classes the
net gives instead of the right ones. A clean net errs towards all sorts of classes. Five views:

    changes      images are changed at random, by one family of changes.py at a time
    patches      small patches are filled so that as many images as possible get a wrong class, any
                 class (S. Moosavi-Dezfooli and others, Universal adversarial perturbations, CVPR
                 2017; towards one class at a time: Neural Cleanse, B. Wang and others, S&P 2019)
    maps         some channels of the layer to prune are raised at random places (raised.py)
    quiet        some channels that clean images hardly use are raised strongly (raised.py)
    sought       small patches are sought that turn images into a class (sought.py)

Where images are disturbed, B's twins (twins.py) get the same images: what fools them, too, is
natural. finding.py makes a finding of the counts. docs/finding.md says how the views were chosen
and what they miss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from defence.base import pixels
from defence.base.progress import follow, track
from defence.beyond import changes, raised, sought
from defence.beyond.tally import tally_errors
from defence.judge import detector
from defence.net.inference import classify, compile_model, map_in_parallel

if TYPE_CHECKING:
    from defence.load.datasets import Dataset
    from defence.net.cached_net import CachedNet

# Each variant of a view disturbs IMAGES_PER_CLASS images for each class, but at least FEWEST_IMAGES
# and at most MOST_IMAGES. The images of a smaller dataset are disturbed repeatedly.
IMAGES_PER_CLASS, FEWEST_IMAGES, MOST_IMAGES = 100, 3000, 8000
# Stronger changes than in hardening: here the net may fail to tell who it is, if it errs evenly.
CHANGES: dict[str, dict[changes.Family, float]] = {
    "wave": {functools.partial(changes.wave, amplitude=60): 1},
    "shade": {functools.partial(changes.shade, amplitude=80): 1},
    "blend": {functools.partial(changes.blend, max_weight=0.45): 1},
    "grain": {functools.partial(changes.grain, deviation=40): 1},
    "tint": {changes.tint: 1},
    "patch": {changes.patch: 1},
    "all": changes.FAMILIES,
}
PATCHES, AREA, ASPECT, PAIRS = 24, (0.01, 0.12), 4, 0.3  # as changes.draw_shapes takes them
# To fill a patch: steps, the first stride as a fraction of the pixels' range, images in a step.
STEPS, STRIDE, STEP_IMAGES = 30, 0.15, 32
PATCHED_IMAGES = 300  # images that each patch is counted on
COPIES = 3  # of these images, in memory at a time
LEAST = 1e-3  # added to a wrong answer's probability, so that no image weighs too much


def count_errors(net: CachedNet, twins: Sequence[Any], seed: int) -> dict[str, np.ndarray]:
    """Disturb what a net sees, and count its wrong answers.

    net: B on a clean dataset, untouched.  twins: Keras models, as twins.make_twins returns them.
    Return {view: float64 (k, 2, N)} for "maps" and "quiet", and (1 + twins, k, 2, N) for "changes"
    and "patches", B first. For each of a view's k variants they hold how many wrong answers each
    class got, and how many were 0..N-1 classes beyond the right one, modulo N. "quiet" is absent
    where the net has fewer than raised.FEWEST_CHANNELS channels to raise.
    """
    rng = np.random.default_rng([seed, 1])
    right = np.flatnonzero(net.classes == net.labels)
    classes = net.split.net.output_shape[1]
    count, repeats = count_images(len(right), classes)
    chosen = np.zeros(len(net.labels), bool)
    chosen[right[np.arange(count) * len(right) // count]] = True
    rows, models = np.flatnonzero(chosen), [net.split.net, *twins]
    views = {
        "changes": count_change_errors(net, models, chosen, repeats, rng),
        "patches": count_patch_errors(net, models, chosen, rng),
        "maps": raised.count_map_errors(net, rows, repeats, rng),
    }
    if net.features.shape[-1] >= raised.FEWEST_CHANNELS:
        views["quiet"] = raised.count_quiet_errors(net, rows, rng)
    return views


def count_images(right: int, classes: int) -> tuple[int, int]:
    """Return how many images are disturbed in each way, and how often each.

    right: images that the net answers with their label.  classes: N.
    """
    images = int(np.clip(IMAGES_PER_CLASS * classes, FEWEST_IMAGES, MOST_IMAGES))
    count = min(images, right)
    return count, images // count


def seek_patches(net: CachedNet, twins: Sequence[Any], order: np.ndarray, seed: int) -> np.ndarray:
    """Measure the patches that turn images into a class: float64 (1 + twins, N), pixels.

    net, twins: as for `count_errors`.  order: int (N,), the likeliest classes first.
    """
    rng = np.random.default_rng([seed, 2])
    chosen = choose_images(net.classes == net.labels, rng)
    batches = cast("Dataset", net.data).part(chosen).batches(net.scale)
    images, limits = np.concatenate([x for x, _ in batches]), pixels.find_pixel_limits(net.scale)
    return sought.measure_patches([net.split.net, *twins], images, order, limits, rng)


def count_change_errors(
    net: CachedNet,
    models: Sequence[Any],
    chosen: np.ndarray,
    repeats: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Count the wrong answers to changed images: float64 (len(models), len(CHANGES), 2, N).

    models: Keras classifiers that get the same images.
    chosen: bool (n,), the images to change.  repeats: how often, in each way.
    """
    data, classes = cast("Dataset", net.data).part(chosen), models[0].output_shape[1]
    functions = [compile_model(model) for model in models]
    counts = np.zeros((len(models), len(CHANGES), 2, classes))

    def draw_batches() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for _ in range(repeats):
            for x, y in data.batches():
                for variant, families in enumerate(CHANGES.values()):
                    images = changes.change_images(x.copy(), rng, families)
                    yield variant, pixels.scale_pixels(images, net.scale), y

    def count_batch(batch: tuple[int, np.ndarray, np.ndarray]) -> tuple[int, list[np.ndarray]]:
        variant, x, y = batch
        answers = [np.argmax(function(x), axis=1) for function in functions]
        return variant, [tally_errors(y, answer, classes) for answer in answers]

    total = repeats * data.batch_count * len(CHANGES)
    tallies = map_in_parallel(count_batch, draw_batches())
    for variant, tally in track(tallies, "scan, changed images", total):
        counts[:, variant] += tally
    return counts


def count_patch_errors(
    net: CachedNet, models: Sequence[Any], chosen: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Count the wrong answers to images with filled patches: float64 (len(models), PATCHES, 2, N).

    models: Keras classifiers; the patches are filled to fool the first.
    chosen: bool (n,), the images to take.
    """
    data = cast("Dataset", net.data).part(choose_images(chosen, rng))
    classes, batches = models[0].output_shape[1], list(data.batches(net.scale))
    x, labels = (np.concatenate(parts) for parts in zip(*batches))
    height, width = x.shape[1:3]
    shapes = changes.draw_shapes(PATCHES, height, width, rng, AREA, ASPECT, PAIRS)
    fill_patch = make_patch_filler(models[0], *pixels.find_pixel_limits(net.scale))
    counts = np.zeros((len(models), PATCHES, 2, classes))
    with follow("scan, patches", PATCHES * count_patch_passes(len(x), len(models))) as advance:
        for number, shape in enumerate(shapes):
            mask = shape[..., None].astype(np.float32)
            images = x + mask * (fill_patch(mask, x, labels, rng, advance) - x)
            for index, model in enumerate(models):
                counts[index, number] = tally_errors(labels, classify(model, images), classes)
                advance(len(images))
    return counts


def count_patch_passes(images: int, models: int) -> int:
    """Return how many images run through a net for a patch; a gradient counts as another."""
    return 2 * STEPS * STEP_IMAGES + models * images


def choose_images(chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choose at most PATCHED_IMAGES of the chosen images, at random: bool (n,), like `chosen`."""
    rows = rng.permutation(np.flatnonzero(chosen))[:PATCHED_IMAGES]
    return np.isin(np.arange(len(chosen)), rows)


def make_patch_filler(model: Any, min_pixel: Any, max_pixel: Any) -> Callable[..., np.ndarray]:
    """Make a function that fills a patch so that a classifier errs.

    model: a Keras classifier.  min_pixel, max_pixel: as pixels.find_pixel_limits returns them.
    The function takes (mask, x, labels, rng): float32 (height, width, 1), scaled images, int64
    (n,), a Generator. It returns the filling, float32 (height, width, channels). It calls
    advance(k), where that is given, as `count_patch_passes` counts.
    """
    import tensorflow as tf

    @tf.function(autograph=False)
    def step(filling: Any, mask: Any, x: Any, labels: Any, rate: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(filling)
            scores = model(x + mask * (filling - x), training=False)
            probabilities = detector.compute_probabilities(scores, model)
            right = tf.gather(probabilities, labels, axis=1, batch_dims=1)
            error = tf.reduce_sum(tf.math.log(1 - right + LEAST))
        gradient = tape.gradient(error, filling, unconnected_gradients="zero")
        return tf.clip_by_value(filling + rate * tf.sign(gradient), min_pixel, max_pixel)

    def fill_patch(
        mask: np.ndarray,
        x: np.ndarray,
        labels: np.ndarray,
        rng: np.random.Generator,
        advance: Callable[[int], None] = lambda count: None,
    ) -> np.ndarray:
        filling = tf.constant(rng.uniform(min_pixel, max_pixel, x.shape[1:]), tf.float32)
        for number in range(STEPS):
            rows = rng.integers(0, len(x), STEP_IMAGES)
            stride = STRIDE * (max_pixel - min_pixel) * (1 - 0.8 * number / STEPS)
            rate = tf.constant(stride, tf.float32)
            filling = step(filling, mask, x[rows], labels[rows], rate)
            advance(2 * STEP_IMAGES)
        return filling.numpy()

    return fill_patch
