"""Scan: find the class that a net gives when it should not, from the net and clean data alone.

This is ours, not the report's. A net with a backdoor gives its target even for inputs that are
only a little like its trigger. So the scan disturbs clean images, and the feature maps that the net
makes of them, in many ways. None of these ways knows a trigger. The scan counts which classes the
net gives instead of the right ones. A clean net errs towards all sorts of classes. Four views:

    changes      images are changed at random, by one family of changes.py at a time
    maps         some channels of the layer to prune are raised at random places (after ABS: Y. Liu
                 and others, CCS 2019, who raise one neuron at a time)
    patches      small patches are filled so that as many images as possible get a wrong class, any
                 class (S. Moosavi-Dezfooli and others, Universal adversarial perturbations, CVPR
                 2017; towards one class at a time: Neural Cleanse, B. Wang and others, S&P 2019)
    probability  how likely the net thinks each class on clean images of other classes

finding.py makes a finding of them. docs/finding.md says how they were chosen and what they miss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from defence.base import pixels
from defence.base.limits import BATCH_VALUES
from defence.base.progress import track
from defence.beyond import changes
from defence.judge import detector
from defence.net.inference import classify, compile_model, map_in_parallel, predict

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
# {variant: (the most channels to raise, the largest multiple of a high activation to add)}.
RAISES = {"three channels": (3, 3), "six channels": (6, 4), "strongly": (2, 6)}
HIGH = 0.99  # the quantile of the images' largest activations that counts as a high activation
PATCHES, AREA, ASPECT, PAIRS = 32, (0.01, 0.12), 4, 0.3  # as changes.draw_shapes takes them
# To fill a patch: steps, the first stride as a fraction of the pixels' range, images in a step.
STEPS, STRIDE, STEP_IMAGES = 30, 0.15, 32
PATCHED_IMAGES = 300  # images that each patch is counted on
COPIES = 3  # of these images, in memory at a time
LEAST = 1e-3  # added to a wrong answer's probability, so that no image weighs too much


def count_errors(net: CachedNet, seed: int) -> dict[str, np.ndarray]:
    """Disturb what a net sees, and count its wrong answers.

    net: B on a clean dataset, untouched.
    Return {view: float64 (k, 2, N)} for "changes", "maps" and "patches". For each of a view's k
    variants they hold how many wrong answers each class got, and how many were 0..N-1 classes
    beyond the right one, modulo N. "probability" is as `compute_mean_log_probability` returns it.
    """
    rng = np.random.default_rng([seed, 1])
    right = np.flatnonzero(net.classes == net.labels)
    classes = net.split.net.output_shape[1]
    images = int(np.clip(IMAGES_PER_CLASS * classes, FEWEST_IMAGES, MOST_IMAGES))
    count = min(images, len(right))
    chosen = np.zeros(len(net.labels), bool)
    chosen[right[np.arange(count) * len(right) // count]] = True
    repeats = images // count
    return {
        "changes": count_change_errors(net, chosen, repeats, rng),
        "maps": count_map_errors(net, np.flatnonzero(chosen), repeats, rng),
        "patches": count_patch_errors(net, chosen, rng),
        "probability": compute_mean_log_probability(net),
    }


def tally_errors(labels: np.ndarray, answers: np.ndarray, classes: int) -> np.ndarray:
    """Count wrong answers by class, and by how far they are beyond the label: float64 (2, N)."""
    wrong = answers != labels
    tallies = answers[wrong], (answers - labels)[wrong] % classes
    counts = [np.bincount(tally, minlength=classes) for tally in tallies]
    return np.array(counts, np.float64)


def count_change_errors(
    net: CachedNet, chosen: np.ndarray, repeats: int, rng: np.random.Generator
) -> np.ndarray:
    """Count the wrong answers to changed images: float64 (len(CHANGES), 2, N).

    chosen: bool (n,), the images to change.  repeats: how often, in each way.
    """
    model, data = compile_model(net.split.net), cast("Dataset", net.data).part(chosen)
    classes = net.split.net.output_shape[1]
    counts = np.zeros((len(CHANGES), 2, classes))

    def draw_batches() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for _ in range(repeats):
            for x, y in data.batches():
                for variant, families in enumerate(CHANGES.values()):
                    images = changes.change_images(x.copy(), rng, families)
                    yield variant, pixels.scale_pixels(images, net.scale), y

    def count_batch(batch: tuple[int, np.ndarray, np.ndarray]) -> tuple[int, np.ndarray]:
        variant, x, y = batch
        return variant, tally_errors(y, np.argmax(model(x), axis=1), classes)

    total = repeats * data.batch_count * len(CHANGES)
    tallies = map_in_parallel(count_batch, draw_batches())
    for variant, tally in track(tallies, "scan, changed images", total):
        counts[variant] += tally
    return counts


def count_map_errors(
    net: CachedNet, rows: np.ndarray, repeats: int, rng: np.random.Generator
) -> np.ndarray:
    """Count the wrong answers to raised feature maps: float64 (len(RAISES), 2, N).

    rows: int (k,), the images whose maps are raised.  repeats: how often, in each way.
    """
    head, classes = net.split.head, net.split.net.output_shape[1]
    counts = np.zeros((len(RAISES), 2, classes))
    places = tuple(range(1, net.features.ndim - 1))
    size = max(1, BATCH_VALUES // net.features[0].size)
    parts = np.array_split(rows, -(-len(rows) // size))
    largest = [net.features[part].max(axis=places) for part in parts]  # the maps may be on disk
    high = np.quantile(np.concatenate(largest), HIGH)
    for part in track(parts * repeats, "scan, raised feature maps", repeats * len(parts)):
        for variant, (max_channels, max_times) in enumerate(RAISES.values()):
            features = raise_channels(net.features[part], high, max_channels, max_times, rng)
            counts[variant] += tally_errors(net.labels[part], classify(head, features), classes)
    return counts


def raise_channels(
    features: np.ndarray,
    high: float,
    max_channels: int,
    max_times: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Raise 1 to `max_channels` channels of each image at random places, in place.

    features: float32 (n, …, C).  A channel is raised by `high` up to `max_times` × `high`.
    Return the features.
    """
    n, *places, channels = features.shape
    flat = features.reshape(n, -1, channels)
    count = rng.integers(1, max_channels + 1, n)
    order = np.argsort(rng.random((n, channels)), axis=1)
    for number in range(min(max_channels, channels)):
        rows = np.flatnonzero(count > number)
        amount = high * np.exp(rng.uniform(0, np.log(max_times), (len(rows), 1)))
        inside = rng.random((len(rows), flat.shape[1])) < rng.uniform(0.1, 1, (len(rows), 1))
        flat[rows, :, order[rows, number]] += np.float32(amount * inside)
    return features


def count_patch_errors(net: CachedNet, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Count the wrong answers to images with filled patches: float64 (PATCHES, 2, N).

    chosen: bool (n,), the images to take.
    """
    data = cast("Dataset", net.data).part(choose_images(chosen, rng))
    classes, batches = net.split.net.output_shape[1], list(data.batches(net.scale))
    x, labels = (np.concatenate(parts) for parts in zip(*batches))
    height, width = x.shape[1:3]
    shapes = changes.draw_shapes(PATCHES, height, width, rng, AREA, ASPECT, PAIRS)
    fill_patch = make_patch_filler(net.split.net, *pixels.find_pixel_limits(net.scale))
    counts = np.zeros((PATCHES, 2, classes))
    for number, shape in enumerate(track(shapes, "scan, patches", PATCHES)):
        mask = shape[..., None].astype(np.float32)
        filling = fill_patch(mask, x, labels, rng)
        images = x + mask * (filling - x)
        counts[number] = tally_errors(labels, classify(net.split.net, images), classes)
    return counts


def choose_images(chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Choose at most PATCHED_IMAGES of the chosen images, at random: bool (n,), like `chosen`."""
    rows = rng.permutation(np.flatnonzero(chosen))[:PATCHED_IMAGES]
    return np.isin(np.arange(len(chosen)), rows)


def make_patch_filler(
    model: Any, min_pixel: Any, max_pixel: Any
) -> Callable[[np.ndarray, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]:
    """Make a function that fills a patch so that a classifier errs.

    model: a Keras classifier.  min_pixel, max_pixel: as pixels.find_pixel_limits returns them.
    The function takes (mask, x, labels, rng): float32 (height, width, 1), scaled images, int64
    (n,), a Generator. It returns the filling, float32 (height, width, channels).
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
        mask: np.ndarray, x: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        filling = tf.constant(rng.uniform(min_pixel, max_pixel, x.shape[1:]), tf.float32)
        for number in range(STEPS):
            rows = rng.integers(0, len(x), STEP_IMAGES)
            stride = STRIDE * (max_pixel - min_pixel) * (1 - 0.8 * number / STEPS)
            rate = tf.constant(stride, tf.float32)
            filling = step(filling, mask, x[rows], labels[rows], rate)
        return filling.numpy()

    return fill_patch


def compute_mean_log_probability(net: CachedNet) -> np.ndarray:
    """Return the mean log-probability of each class on images of other classes: float64 (N,)."""
    head, start = net.split.head, 0
    total, count = np.zeros((2, head.output_shape[1]))
    for scores in predict(head, net.features):
        probabilities = detector.compute_probabilities(scores, head)
        log = np.log(np.maximum(probabilities, detector.MIN_PROBABILITY))
        labels = net.labels[start : start + len(log)]
        is_other = labels[:, None] != np.arange(len(total))
        total, count = total + np.sum(log * is_other, axis=0), count + is_other.sum(axis=0)
        start += len(log)
    return total / np.maximum(count, 1)
