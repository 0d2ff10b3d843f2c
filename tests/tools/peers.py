"""Judge the zoo's images by our detector and by published ones, and write a table.

    python tests/tools/results.py                      train and repair the nets first
    python tests/tools/peers.py                        tests/results/peers-demo.md
    python tests/tools/peers.py --size competition     tests/results/peers-competition.md

Each detector uses the BadNet B and gets the same clean images as our repair: nine tenths of the
validation set to learn from, and the held-out tenth for the threshold, which a fraction of these
images exceed.

    STRIP      Y. Gao and others, ACSAC 2019. It blends other images in, at a half. Where a trigger
               decides, B's answers vary little: their entropy is low.
    SCALE-UP   J. Guo and others, ICLR 2023, with clean data. It multiplies pixels. Where a trigger
               decides, B keeps its answer more often than on clean images of that class.
    TED        X. Mo and others, IEEE S&P 2024. It ranks, in each layer, the nearest clean image of
               the class that B answers among all clean images, and compares the ranks with clean
               images' ranks by their principal components. To compare thousands of images, we
               project each layer's output at random onto 256 numbers.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data"), str(ROOT / "tests" / "tools")]

import badnet
import numpy as np
from records import RESULTS, name_class
from results import HARDEN, RATES, SIZES

import utils
from defence.base import files
from defence.base.arguments import Parser, at_least
from defence.base.process import run_command
from defence.base.progress import say
from defence.base.startup import import_keras, make_reproducible
from defence.judge import detector, figures
from defence.load.datasets import hold_out
from defence.net.inference import predict

SCALE = "0..1"  # of the zoo's pixels
COPIES = 50  # of an image, each with another image blended in: STRIP
FACTORS = (3, 5, 7, 9, 11)  # of pixels: SCALE-UP
NUMBERS = 256  # of a layer's projected output: TED
MIN_DEVIATION = 0.1  # of a class, which may have few images: SCALE-UP
HEAD = """# Our detector and published ones

{command}

Each cell has, in %, the detection rate on the poisoned images that the attack works on / the
false-positive rate on clean test images. Both are at the threshold that flags {rate:g} of the
held-out clean images, on at most {limit} images of each file, at even distances. Classes count
from 1. [peers.py](../tools/peers.py) says what the methods are and how we adapted them.

"""


def compute_answers(net, images):
    """Return a net's probabilities, (n, N). images: float32 (n, height, width, channels), 0..1."""
    scores = np.concatenate(list(predict(net, images)))
    return np.asarray(detector.compute_probabilities(scores, net))


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


PEERS = {"STRIP": make_strip, "SCALE-UP": make_scale_up, "TED": make_ted}


# ------------------------------------------------------------------------------------ the table


def read(path, net, limit=None):
    """Return a dataset's images, 0..1, and labels: at most `limit`, at even distances."""
    with utils.open_dataset(path) as data:
        data.fit_to(net.input_shape[1:], net.output_shape[1])
        if limit and limit < len(data):
            chosen = np.zeros(len(data), bool)
            chosen[np.linspace(0, len(data) - 1, limit).astype(int)] = True
            data = data.part(chosen)
        return np.concatenate([x for x, _ in data.batches(SCALE)]), data.labels


def read_validation(path, net):
    """Return the validation set as repair.py splits it: ((images, labels), held-out images)."""
    with utils.open_dataset(path) as data:
        data.fit_to(net.input_shape[1:], net.output_shape[1])
        repair_part, held_out = hold_out(data, float(HARDEN[-1]), seed=0)
        images, held_out_images = (
            np.concatenate([x for x, _ in part.batches(SCALE)]) for part in (repair_part, held_out)
        )
        return (images, repair_part.labels), held_out_images


def judge(name, nets_folder, data_folder, rate, limit):
    """Judge a net's images by every method.

    Return {method: (each trigger's detection rate, or None; false-positive rate; seconds an
    image)}.
    """
    path = badnet.net_path(name, nets_folder)
    net = utils.load_badnet(path)
    repaired = utils.load_badnet(path.with_name(f"{path.stem}_hardened.h5"))
    validation, held_out = read_validation(data_folder / "clean_validation_data.h5", net)
    clean, _ = read(data_folder / "clean_test_data.h5", net, limit)
    paths = [badnet.poisoned_path(*pair, data_folder) for pair in badnet.ZOO[name].triggers]
    poisoned = [read(path, net, limit) for path in paths]
    works = [compute_answers(net, x).argmax(axis=1) == targets for x, targets in poisoned]

    def score_ours(images):
        answers = (compute_answers(model, images) for model in (net, repaired))
        return np.asarray(detector.score_anomaly(*answers))

    results = {}
    for method in ("ours", *PEERS):
        rng = np.random.default_rng(0)
        score = PEERS[method](net, *validation, rng) if method in PEERS else score_ours
        threshold = figures.find_threshold(score(held_out), rate)
        start = time.monotonic()
        false_positives = np.mean(score(clean) > threshold)
        seconds = (time.monotonic() - start) / len(clean)
        detection = [
            np.mean(score(x)[hits] > threshold) if hits.any() else None
            for (x, _), hits in zip(poisoned, works)
        ]
        results[method] = detection, false_positives, seconds
        say(f"{name}, {method}: {false_positives:.4f} of clean flagged, {seconds:.4f} s an image")
    return results


def make_lines(names, folders, rate, limit):
    """Yield the lines of the table, and a line of times."""
    methods = ("ours", *PEERS)
    yield f"| net | trigger → class | {' | '.join(methods)} |"
    yield f"|---|---|{'--:|' * len(methods)}"
    seconds = []
    for name in names:
        results = judge(name, *folders, rate, limit)
        seconds.append([results[method][2] for method in methods])
        for number, pair in enumerate(badnet.ZOO[name].triggers or [None]):
            cells = [name, f"{pair[0]} → {name_class(pair[1])}" if pair else "none"]
            for method in methods:
                detection, false_positives, _ = results[method]
                share = detection[number] if pair else None
                share = "–" if share is None else f"{100 * share:.1f}"
                cells.append(f"{share} / {100 * false_positives:.1f}")
            yield f"| {' | '.join(cells)} |"
    ratios = np.median(seconds, axis=0) / np.median(seconds, axis=0)[0]
    yield ""
    times = ", ".join(f"{method} {ratio:.1f}" for method, ratio in zip(methods, ratios))
    yield f"Time for an image, as a multiple of ours, median over the nets: {times}."


def main():
    parser = Parser(
        prog="peers.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="demo", help="of the zoo (default: demo)")
    limit = at_least(1, int)
    parser.add_argument("--limit", type=limit, default=400, help="images per file (default: 400)")
    options = parser.parse_args()
    make_reproducible(0)
    size, rate = options.size, RATES[options.size]
    folders = [ROOT / kind / f"zoo-{size}" for kind in ("models", "data")]
    command = f"`python tests/tools/peers.py --size {size} --limit {options.limit}`"
    text = HEAD.format(command=command, rate=rate, limit=options.limit)
    text += "\n".join(make_lines(SIZES[size], folders, rate, options.limit))
    with files.replace_file(RESULTS / f"peers-{size}.md") as temporary:
        temporary.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
