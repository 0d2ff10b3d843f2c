"""Scan: which class does a net give when it should not? From the net and clean data alone.

Not the report's. A net with a backdoor answers what is like its trigger with its target, be it ever
so little like it. So clean pictures, and the feature maps that the net makes of them, are disturbed
in many ways, none of which knows a trigger, and it is counted which class the net gives instead of
the right one. A clean net errs towards all sorts of classes. Four ways of looking:

    changed     pictures are changed at random, one family of changes.py at a time
    disturbed   some channels of the layer to prune are raised at random places (after ABS: Y. Liu
                and others, CCS 2019, who raise one neuron at a time)
    sought      small patches are filled so that as many pictures as possible get a wrong class,
                whichever (S. Moosavi-Dezfooli and others, Universal adversarial perturbations,
                CVPR 2017; towards a class, each in turn: Neural Cleanse, B. Wang and others, S&P
                2019)
    believed    how likely the net thinks each class on clean pictures of others

finding.py makes a finding of them; docs/finding.md says how they were chosen and what they miss.
"""

import functools

import numpy as np

from defence.base import pixels
from defence.base.limits import BATCH_VALUES
from defence.base.progress import track
from defence.beyond import changes
from defence.judge import detector
from defence.net.inference import classify, compile_model, map_in_parallel, predict

# Pictures that are changed or disturbed in each way, for each class, within limits; where there are
# fewer, each is repeatedly.
FOR_A_CLASS, LEAST_PICTURES, MOST_PICTURES = 100, 3000, 8000
# Beyond what hardening does: here the net may fail to tell who it is, if it errs evenly.
CHANGES = {
    "wave": {functools.partial(changes.wave, amplitude=60): 1},
    "shade": {functools.partial(changes.shade, amplitude=80): 1},
    "blend": {functools.partial(changes.blend, most=0.45): 1},
    "grain": {functools.partial(changes.grain, deviation=40): 1},
    "tint": {changes.tint: 1},
    "patch": {changes.patch: 1},
    "all": changes.FAMILIES,
}
# Channels that are raised, at most, and by how many times a high activation, at most.
RAISES = {"three channels": (3, 3), "six channels": (6, 4), "strongly": (2, 6)}
HIGH = 0.99  # the quantile of the images' largest activations that is a high one
PATCHES, AREA, ASPECT, PAIRS = 32, (0.01, 0.12), 4, 0.3  # as changes.draw_shapes takes them
STEPS, STRIDE, STEP_IMAGES = 30, 0.15, 32  # of a patch's search; of the pixels' range, at first
PATCHED_IMAGES = 300  # images that a patch is counted on
COPIES = 3  # of these images, in memory at a time
LEAST = 1e-3  # of a wrong answer's probability, so that no picture is worth too much


def count_errors(net, seed):
    """Disturb what a net sees, and count its wrong answers.

    net: the CachedNet of B on a clean dataset, untouched.  seed: an int.
    Returns {way: float64 (k, 2, N)}: of each of the k variants of "changed", "disturbed" and
    "sought", how many wrong answers each class got, and how many were so many classes beyond the
    right one, modulo N; and {"believed": float64 (N,)}, as `believed` gives it.
    """
    rng = np.random.default_rng([seed, 1])
    right = np.flatnonzero(net.classes == net.labels)
    classes = net.split.net.output_shape[1]
    wanted = int(np.clip(FOR_A_CLASS * classes, LEAST_PICTURES, MOST_PICTURES))
    count = min(wanted, len(right))
    chosen = np.zeros(len(net.labels), bool)
    chosen[right[np.arange(count) * len(right) // count]] = True
    repeats = wanted // count
    return {
        "changed": count_change_errors(net, chosen, repeats, rng),
        "disturbed": count_map_errors(net, np.flatnonzero(chosen), repeats, rng),
        "sought": count_patch_errors(net, chosen, rng),
        "believed": compute_mean_log_probability(net),
    }


def tally_errors(labels, answers, classes):
    """Wrong answers by class, and by how far they are beyond the label: float64 (2, N)."""
    wrong = answers != labels
    both = answers[wrong], (answers - labels)[wrong] % classes
    return np.float64([np.bincount(each, minlength=classes) for each in both])


def count_change_errors(net, chosen, repeats, rng):
    """Count the answers to changed pictures: float64 (len(CHANGES), 2, N).

    chosen: bool (n,), the images to change.  repeats: how often each is changed in each way.
    """
    model, data = compile_model(net.split.net), net.data.part(chosen)
    classes = net.split.net.output_shape[1]
    counts = np.zeros((len(CHANGES), 2, classes))

    def pictures():
        for _ in range(repeats):
            for x, y in data.batches():
                for way, families in enumerate(CHANGES.values()):
                    changed_ones = changes.change_images(x.copy(), rng, families)
                    yield way, pixels.scale_pixels(changed_ones, net.scale), y

    def answer(item):
        way, x, y = item
        return way, tally_errors(y, np.argmax(model(x), axis=1), classes)

    total = repeats * data.batch_count * len(CHANGES)
    for way, found in track(map_in_parallel(answer, pictures()), "scan, changed pictures", total):
        counts[way] += found
    return counts


def count_map_errors(net, rows, repeats, rng):
    """Count the answers to raised feature maps: float64 (len(RAISES), 2, N). rows: int (k,)."""
    head, classes = net.split.head, net.split.net.output_shape[1]
    counts = np.zeros((len(RAISES), 2, classes))
    places = tuple(range(1, net.features.ndim - 1))
    high = np.quantile(net.features[rows].max(axis=places), HIGH)
    size = max(1, BATCH_VALUES // net.features[0].size)
    parts = np.array_split(rows, -(-len(rows) // size)) * repeats
    for part in track(parts, "scan, raised feature maps", len(parts)):
        for way, limits in enumerate(RAISES.values()):
            features = raise_channels(net.features[part], high, *limits, rng)
            counts[way] += tally_errors(net.labels[part], classify(head, features), classes)
    return counts


def raise_channels(features, high, most, times, rng):
    """Raise 1 to `most` channels of each image by `high` up to `times` that, at random places.

    features: float32 (n, …, C), which is changed.  Returns it.
    """
    n, *places, channels = features.shape
    flat = features.reshape(n, -1, channels)
    count = rng.integers(1, most + 1, n)
    drawn = np.argsort(rng.random((n, channels)), axis=1)
    for number in range(min(most, channels)):
        rows = np.flatnonzero(count > number)
        by = high * np.exp(rng.uniform(0, np.log(times), (len(rows), 1)))
        there = rng.random((len(rows), flat.shape[1])) < rng.uniform(0.1, 1, (len(rows), 1))
        flat[rows, :, drawn[rows, number]] += np.float32(by * there)
    return features


def count_patch_errors(net, chosen, rng):
    """Count the answers to pictures with patches that were sought: float64 (PATCHES, 2, N)."""
    classes, data = net.split.net.output_shape[1], net.data.part(choose_images(chosen, rng))
    batches = list(data.batches(net.scale))
    x, labels = (np.concatenate(parts) for parts in zip(*batches))
    shapes = changes.draw_shapes(PATCHES, *x.shape[1:3], rng, AREA, ASPECT, PAIRS)
    seek = make_patch_filler(net.split.net, *pixels.find_pixel_limits(net.scale))
    counts = np.zeros((PATCHES, 2, classes))
    for number, shape in enumerate(track(shapes, "scan, patches", PATCHES)):
        mask = shape[..., None].astype(np.float32)
        filling = seek(mask, x, labels, rng)
        worn = x + mask * (filling - x)
        counts[number] = tally_errors(labels, classify(net.split.net, worn), classes)
    return counts


def choose_images(chosen, rng):
    """At most PATCHED_IMAGES of the chosen images, at random: bool (n,)."""
    rows = rng.permutation(np.flatnonzero(chosen))[:PATCHED_IMAGES]
    return np.isin(np.arange(len(chosen)), rows)


def make_patch_filler(model, least, most):
    """A function that fills a patch so that a classifier errs. least, most: of pixel values.

    It takes (mask, x, labels, rng): float32 (height, width, 1), pictures, int64 (n,), a Generator,
    and returns the filling, float32 (height, width, channels).
    """
    import tensorflow as tf

    @tf.function(autograph=False)
    def step(filling, mask, x, labels, rate):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(filling)
            scores = model(x + mask * (filling - x), training=False)
            right = tf.gather(
                detector.compute_probabilities(scores, model), labels, axis=1, batch_dims=1
            )
            error = tf.reduce_sum(tf.math.log(1 - right + LEAST))
        gradient = tape.gradient(error, filling, unconnected_gradients="zero")
        return tf.clip_by_value(filling + rate * tf.sign(gradient), least, most)

    def seek(mask, x, labels, rng):
        filling = tf.constant(rng.uniform(least, most, x.shape[1:]), tf.float32)
        for number in range(STEPS):
            rows = rng.integers(0, len(x), STEP_IMAGES)
            rate = tf.constant(STRIDE * (most - least) * (1 - 0.8 * number / STEPS), tf.float32)
            filling = step(filling, mask, x[rows], labels[rows], rate)
        return filling.numpy()

    return seek


def compute_mean_log_probability(net):
    """The mean log-probability of each class on clean images of others: float64 (N,)."""
    head, done = net.split.head, 0
    total, count = np.zeros((2, head.output_shape[1]))
    for scores in predict(head, net.features):
        log = np.log(np.maximum(detector.compute_probabilities(scores, head), detector.LEAST))
        others = net.labels[done : done + len(log), None] != np.arange(len(total))
        total, count = total + np.sum(log * others, axis=0), count + others.sum(axis=0)
        done += len(log)
    return total / np.maximum(count, 1)
