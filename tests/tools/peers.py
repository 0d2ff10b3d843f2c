"""Judge the zoo's images by detectors that others published, beside ours, and write down a table.

    python tests/tools/results.py                      makes the nets and repairs them
    python tests/tools/peers.py                        tests/results/peers-demo.md
    python tests/tools/peers.py --size competition     tests/results/peers-competition.md

Each looks at the BadNet B and gets the same clean images as our repair: nine tenths of the
validation set to learn from, and the held-out tenth for the threshold that a fraction of these
exceed.

    STRIP      Y. Gao and others, ACSAC 2019. Other pictures are blended in, at a half. Where a
               trigger decides, B's answers vary little: their entropy is low.
    SCALE-UP   J. Guo and others, ICLR 2023, with clean data. Pixels are multiplied. Where a trigger
               decides, B keeps to its answer, more often than on clean pictures of that class.
    TED        X. Mo and others, IEEE S&P 2024. How near, layer after layer, is the nearest clean
               picture of the class that B answers? The ranks are compared with those of clean
               pictures by their principal components. So that thousands of pictures can be
               compared, each layer's output is projected at random onto 256 numbers.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data"), str(ROOT / "tests" / "tools")]

import badnet
import numpy as np
from results import HARDEN, RATES, RESULTS, SIZES

import utils
from defence.base import files
from defence.base.arguments import Parser, at_least
from defence.base.process import run_command
from defence.base.progress import say
from defence.base.startup import import_keras, make_reproducible
from defence.judge import detector, figures
from defence.load.datasets import hold_out
from defence.net.inference import predict

SCALE = "0..1"  # of the zoo's nets
COPIES = 50  # of a picture, each with another one blended in: STRIP
FACTORS = (3, 5, 7, 9, 11)  # that pixels are multiplied by: SCALE-UP
NUMBERS = 256  # that a layer's output is projected onto: TED
LEAST = 0.1  # standard deviation, of a class with few pictures: SCALE-UP
HEAD = """# Beside detectors that others published

{command}

In each cell, in %: poisoned images caught, of those the attack works on / clean test images
flagged, both at the threshold that flags {rate:g} of the held-out clean images; of each file at
most {limit} test images, taken evenly. What the methods are, and how they were adapted, says
[peers.py](../tools/peers.py).

"""


def answers(net, pictures):
    """A net's probabilities for pictures, float32 (n, height, width, channels), 0..1: (n, N)."""
    scores = np.concatenate(list(predict(net, pictures)))
    return np.asarray(detector.compute_probabilities(scores, net))


# --------------------------------------------------------------------------------------- methods
# Each takes B, clean pictures with labels, and a Generator, and returns a function of pictures
# that gives float (n,), the higher the more suspicious.


def strip(net, clean, labels, rng):
    def score(pictures):
        found = []
        for picture in pictures:
            others = clean[rng.choice(len(clean), min(COPIES, len(clean)), replace=False)]
            p = np.maximum(answers(net, (picture + others) / 2), detector.LEAST)
            found.append(np.mean(np.sum(p * np.log(p), axis=1)))
        return np.array(found)

    return score


def scale_up(net, clean, labels, rng):
    def kept(pictures):
        first = answers(net, pictures).argmax(axis=1)
        scaled = (np.minimum(pictures * np.float32(factor), 1) for factor in FACTORS)
        return first, np.mean([answers(net, each).argmax(axis=1) == first for each in scaled], 0)

    of_clean, shares = kept(clean)
    count = np.bincount(of_clean, minlength=net.output_shape[1])
    total, squares = (
        np.bincount(of_clean, each, minlength=len(count)) for each in (shares, shares**2)
    )
    mean = np.where(count, total / np.maximum(count, 1), shares.mean())
    deviation = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, LEAST**2))

    def score(pictures):
        first, shares = kept(pictures)
        return (shares - mean[first]) / deviation[first]

    return score


def ted(net, clean, labels, rng):
    keras = import_keras()
    inner = keras.Model(net.input, [layer.output for layer in net.layers if layer.weights])
    onto = [rng.standard_normal((np.prod(each.shape[1:]), NUMBERS)) for each in inner.outputs]
    onto = [np.float32(each / np.sqrt(NUMBERS)) for each in onto]

    def project(pictures):
        parts = np.array_split(pictures, -(-len(pictures) // 64))
        found = [
            [np.reshape(x, (len(part), -1)) @ p for x, p in zip(inner(part), onto)]
            for part in parts
        ]
        return [np.concatenate(each) for each in zip(*found)]

    known = project(clean)

    def ranks(pictures, skip_nearest):
        """For each layer how many clean pictures are nearer than the first of B's class: (n, l)."""
        of_b, found = answers(net, pictures).argmax(axis=1), []
        for ours, theirs in zip(project(pictures), known):
            squares = (ours**2).sum(1)[:, None] + (theirs**2).sum(1) - 2 * ours @ theirs.T
            order = np.argsort(squares, axis=1)[:, skip_nearest:]
            same = labels[order] == of_b[:, None]
            found.append(np.where(same.any(axis=1), same.argmax(axis=1), order.shape[1]))
        return np.stack(found, axis=1) / len(clean)

    # A clean picture's own rank is 0: it is left out of its own neighbours.
    some = rng.permutation(len(clean))[:2000]
    of_clean = ranks(clean[some], 1)
    middle, spread = of_clean.mean(axis=0), of_clean.std(axis=0) + 1e-6
    values, vectors = np.linalg.eigh(np.cov(((of_clean - middle) / spread).T))

    def score(pictures):
        along = (ranks(pictures, 0) - middle) / spread @ vectors
        return np.sum(along**2 / np.maximum(values, 1e-6), axis=1)

    return score


PEERS = {"STRIP": strip, "SCALE-UP": scale_up, "TED": ted}


# ------------------------------------------------------------------------------------ the table


def read(path, net, limit=None):
    """A dataset's pictures, 0..1, and labels, at most `limit` of them, taken evenly."""
    with utils.open_dataset(path) as data:
        data.fit_to(net.input_shape[1:], net.output_shape[1])
        if limit and limit < len(data):
            chosen = np.zeros(len(data), bool)
            chosen[np.linspace(0, len(data) - 1, limit).astype(int)] = True
            data = data.part(chosen)
        return np.concatenate([x for x, _ in data.batches(SCALE)]), data.labels


def read_validation(path, net):
    """The validation set as repair.py splits it: ((pictures, labels), held-out pictures)."""
    with utils.open_dataset(path) as data:
        data.fit_to(net.input_shape[1:], net.output_shape[1])
        rest, held = hold_out(data, float(HARDEN[-1]), seed=0)
        known, unseen = (
            np.concatenate([x for x, _ in each.batches(SCALE)]) for each in (rest, held)
        )
        return (known, rest.labels), unseen


def judge(name, nets_folder, data_folder, rate, limit):
    """Judge the images of a net by every method.

    Returns {method: (caught for each trigger, float or None; clean flagged; seconds an image)}.
    """
    path = badnet.net_path(name, nets_folder)
    net = utils.load_badnet(path)
    repaired = utils.load_badnet(path.with_name(f"{path.stem}_hardened.h5"))
    (known, labels), held = read_validation(data_folder / "clean_validation_data.h5", net)
    clean, _ = read(data_folder / "clean_test_data.h5", net, limit)
    files_of = [badnet.poisoned_path(*pair, data_folder) for pair in badnet.ZOO[name].triggers]
    poisoned = [read(each, net, limit) for each in files_of]
    works = [answers(net, x).argmax(axis=1) == targets for x, targets in poisoned]

    def ours(pictures):
        pair = (answers(each, pictures) for each in (net, repaired))
        return np.asarray(detector.score_anomaly(*pair))

    found = {}
    for method in ("ours", *PEERS):
        rng = np.random.default_rng(0)
        score = PEERS[method](net, known, labels, rng) if method in PEERS else ours
        threshold = figures.find_threshold(score(held), rate)
        start = time.monotonic()
        flagged = np.mean(score(clean) > threshold)
        seconds = (time.monotonic() - start) / len(clean)
        caught = [
            np.mean(score(x)[hits] > threshold) if hits.any() else None
            for (x, _), hits in zip(poisoned, works)
        ]
        found[method] = caught, flagged, seconds
        say(f"{name}, {method}: clean flagged {flagged:.4f}, {seconds:.4f} s each")
    return found


def lines(names, folders, rate, limit):
    """Yield the lines of the table, and one of times."""
    methods = ("ours", *PEERS)
    yield f"| net | trigger → class | {' | '.join(methods)} |"
    yield f"|---|---|{'--:|' * len(methods)}"
    seconds = []
    for name in names:
        found = judge(name, *folders, rate, limit)
        seconds.append([found[method][2] for method in methods])
        for place, pair in enumerate(badnet.ZOO[name].triggers or [None]):
            cells = [name, "{} → {}".format(*pair) if pair else "none"]
            for method in methods:
                caught, flagged, _ = found[method]
                share = caught[place] if pair else None
                share = "–" if share is None else f"{100 * share:.1f}"
                cells.append(f"{share} / {100 * flagged:.1f}")
            yield f"| {' | '.join(cells)} |"
    each = np.median(seconds, axis=0) / np.median(seconds, axis=0)[0]
    yield ""
    times = ", ".join(f"{name} {ratio:.1f}" for name, ratio in zip(methods, each))
    yield f"Time for an image, as a multiple of ours, in the median over the nets: {times}."


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
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns that there are many nets
    size, rate = options.size, RATES[options.size]
    folders = [ROOT / kind / f"zoo-{size}" for kind in ("models", "data")]
    made_by = f"`python tests/tools/peers.py --size {size} --limit {options.limit}`"
    text = HEAD.format(command=made_by, rate=rate, limit=options.limit)
    text += "\n".join(lines(SIZES[size], folders, rate, options.limit))
    with files.replace_file(RESULTS / f"peers-{size}.md") as beside:
        beside.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
