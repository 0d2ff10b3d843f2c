"""Published detectors of poisoned images, written again for Keras, to compare ours with.

STRIP      Y. Gao and others, ACSAC 2019. It blends other images in, at a half. Where a trigger
           decides, B's answers vary little: their entropy is low.
SCALE-UP   J. Guo and others, ICLR 2023, with clean data. It multiplies pixels. Where a trigger
           decides, B keeps its answer more often than on clean images of that class.
TED        X. Mo and others, IEEE S&P 2024. It ranks, in each layer, the nearest clean image of
           the class that B answers among all clean images, and compares the ranks with clean
           images' ranks by their principal components. To compare thousands of images, we
           project each layer's output at random onto 256 numbers.
IBD-PSC    L. Hou and others, ICML 2024. It scales the last layers of batch normalisation.
           Where a trigger decides, the scaled nets stay sure of B's answer. For nets that have
           such layers.
BaDExpert  T. Xie and others, ICLR 2024. A copy of B unlearns clean images, so that only the
           backdoor is left. An image is suspicious where the copy agrees with B, and a
           fine-tuned B does not. Their copy learns for an epoch; on as few images as ours we
           train on until its accuracy is as low as they demand.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data"), str(ROOT / "tests" / "tools")]

import numpy as np
from peer_training import SCALE, Descent, compile_gradient, copy_net, count_steps, draw_batches

from defence.base.startup import import_keras
from defence.judge import detector
from defence.net import graph
from defence.net.inference import classify, compile_model, predict

COPIES = 50  # of an image, each with another image blended in: STRIP
FACTORS = (3, 5, 7, 9, 11)  # of pixels: SCALE-UP
NUMBERS = 256  # of a layer's projected output: TED
MIN_DEVIATION = 0.1  # of a class, which may have few images: SCALE-UP
SCALED_NETS, MOST_WRONG, FACTOR = 5, 0.6, 1.5  # IBD-PSC
EXPERT_BATCH, EXPERT_RATE, EXPERT_ACCURACY = 128, 1e-4, 0.2  # BaDExpert's copy of B
MOST_EPOCHS = 100  # for that copy
TUNED_BATCH, TUNED_RATE, TUNED_DECAY, TUNED_EPOCHS = 64, 0.05, 1e-4, 10  # BaDExpert's fine-tuned B


def compute_answers(net, images):
    """Return a net's probabilities, (n, N). images: float32 (n, height, width, channels), 0..1."""
    scores = np.concatenate(list(predict(net, images)))
    return np.asarray(detector.compute_probabilities(scores, net))


def make_pair(net, repaired, hardened):
    """Return our score: that of the detector of B and a repaired net.

    hardened: whether the repaired net is hardened.
    """
    model = detector.build_detector(net, repaired, SCALE, hardened=hardened)
    run = compile_model(model, detector.VIEWS)
    return lambda images: np.asarray(run(np.float32(255) * images)[2])


# --------------------------------------------------------------------------------------- methods
# Each takes B, clean images with labels and a Generator. It returns a function that gives images
# their scores, float (n,); the higher, the more suspicious.


def make_strip(net, clean, labels, rng):
    """Return STRIP's score."""

    def score(images):
        negative_entropies = []
        for image in images:
            blended = clean[rng.choice(len(clean), min(COPIES, len(clean)), replace=False)]
            p = compute_answers(net, (image + blended) / 2)
            p = np.maximum(p, detector.MIN_PROBABILITY)
            negative_entropies.append(np.mean(np.sum(p * np.log(p), axis=1)))
        return np.array(negative_entropies)

    return score


def make_scale_up(net, clean, labels, rng):
    """Return SCALE-UP's score."""

    def measure_constancy(images):
        """Return B's classes, and for how many of the FACTORS, 0..1, it keeps its class."""
        classes = compute_answers(net, images).argmax(axis=1)
        scaled = (np.minimum(images * np.float32(factor), 1) for factor in FACTORS)
        same = [compute_answers(net, x).argmax(axis=1) == classes for x in scaled]
        return classes, np.mean(same, 0)

    clean_classes, shares = measure_constancy(clean)
    count = np.bincount(clean_classes, minlength=net.output_shape[1])
    total, squares = (
        np.bincount(clean_classes, values, minlength=len(count)) for values in (shares, shares**2)
    )
    mean = np.where(count, total / np.maximum(count, 1), shares.mean())
    deviation = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, MIN_DEVIATION**2))

    def score(images):
        classes, shares = measure_constancy(images)
        return (shares - mean[classes]) / deviation[classes]

    return score


def make_ted(net, clean, labels, rng):
    """Return TED's score."""
    keras = import_keras()
    inner = keras.Model(net.input, [layer.output for layer in net.layers if layer.weights])
    projections = [
        rng.standard_normal((np.prod(output.shape[1:]), NUMBERS)) for output in inner.outputs
    ]
    projections = [np.float32(matrix / np.sqrt(NUMBERS)) for matrix in projections]

    def project(images):
        """Return each layer's projected output, a list of float32 (n, NUMBERS)."""
        parts = np.array_split(images, -(-len(images) // 64))
        outputs = [
            [np.reshape(x, (len(part), -1)) @ matrix for x, matrix in zip(inner(part), projections)]
            for part in parts
        ]
        return [np.concatenate(layer_outputs) for layer_outputs in zip(*outputs)]

    clean_outputs = project(clean)

    def rank(images, skipped):
        """Return how many clean images are nearer than the nearest of B's class: (n, layers).

        skipped: number of the nearest clean images to leave out.
        """
        classes, ranks = compute_answers(net, images).argmax(axis=1), []
        for outputs, clean_layer in zip(project(images), clean_outputs):
            squares = (outputs**2).sum(1)[:, None] + (clean_layer**2).sum(1)
            squares = squares - 2 * outputs @ clean_layer.T
            order = np.argsort(squares, axis=1)[:, skipped:]
            same = labels[order] == classes[:, None]
            ranks.append(np.where(same.any(axis=1), same.argmax(axis=1), order.shape[1]))
        return np.stack(ranks, axis=1) / len(clean)

    # A clean image is its own nearest one, so that one is left out.
    chosen = rng.permutation(len(clean))[:2000]
    clean_ranks = rank(clean[chosen], 1)
    mean, deviation = clean_ranks.mean(axis=0), clean_ranks.std(axis=0) + 1e-6
    values, vectors = np.linalg.eigh(np.cov(((clean_ranks - mean) / deviation).T))

    def score(images):
        components = (rank(images, 0) - mean) / deviation @ vectors
        return np.sum(components**2 / np.maximum(values, 1e-6), axis=1)

    return score


def list_norms(net):
    """Return a net's layers of batch normalisation."""
    kind = import_keras().layers.BatchNormalization
    return [layer for layer in graph.list_layers(net) if isinstance(layer, kind)]


def make_ibd_psc(net, clean, labels, rng):
    """Return IBD-PSC's score, or None for a net without batch normalisation."""
    count = len(list_norms(net))
    if not count:
        return None

    def scale_last(number):
        scaled = copy_net(net)
        for layer in list_norms(scaled)[-number:]:
            for variable in (layer.gamma, layer.beta):
                variable.assign(FACTOR * variable)
        return scaled

    first = 1
    while first < count and np.mean(classify(scale_last(first), clean) != labels) <= MOST_WRONG:
        first += 1
    # Their code takes one layer more than the first number of layers that is enough.
    numbers = range(first + 1, first + 1 + SCALED_NETS)
    scaled_nets = [scale_last(min(number, count)) for number in numbers]

    def score(images):
        classes = compute_answers(net, images).argmax(axis=1)[:, None]
        answers = [compute_answers(scaled, images) for scaled in scaled_nets]
        return np.mean([np.take_along_axis(p, classes, axis=1)[:, 0] for p in answers], axis=0)

    return score


def make_bad_expert(net, clean, labels, rng):
    """Return BaDExpert's score."""
    expert, tuned = unlearn_clean(net, clean, labels, rng), tune(net, clean, labels, rng)

    def score(images):
        classes = compute_answers(net, images).argmax(axis=1)[:, None]
        x, y = (
            np.take_along_axis(compute_answers(model, images), classes, axis=1)[:, 0]
            for model in (expert, tuned)
        )
        agreement = 2 * y / np.maximum(x, 1e-8), (1 - x) / np.maximum(0.5 - y, 1e-8)
        return -np.minimum(*agreement)

    return score


def unlearn_clean(net, clean, labels, rng):
    """Return a copy of a net that was taught the next class for each clean image."""
    expert, wrong = copy_net(net), (labels + 1) % net.output_shape[1]
    gradient = compile_gradient(expert, expert.trainable_variables)
    adam = import_keras().optimizers.Adam(EXPERT_RATE)
    steps = count_steps((clean, labels), EXPERT_BATCH, 1)
    for _ in range(MOST_EPOCHS):
        for batch in draw_batches(expert, (clean, wrong), EXPERT_BATCH, steps, rng):
            adam.apply(gradient(*batch), expert.trainable_variables)
        if np.mean(classify(expert, clean) == labels) < EXPERT_ACCURACY:
            break
    return expert


def tune(net, clean, labels, rng):
    """Return a fine-tuned copy of a net."""
    tuned, steps = copy_net(net), count_steps((clean, labels), TUNED_BATCH, TUNED_EPOCHS)
    weights = tuned.trainable_variables
    gradient = compile_gradient(tuned, weights)
    descent = Descent(weights, TUNED_RATE, steps, TUNED_DECAY)
    for batch in draw_batches(tuned, (clean, labels), TUNED_BATCH, steps, rng):
        descent.step(gradient(*batch))
    return tuned


PEERS = {"STRIP": make_strip, "SCALE-UP": make_scale_up, "TED": make_ted}
DETECTORS = PEERS | {"IBD-PSC": make_ibd_psc, "BaDExpert": make_bad_expert}
