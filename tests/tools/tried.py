"""Try other ways to harden a net than harden.py's, and other scores, and write down what they give.

    python models/badnet.py --seed 1 --output FOLDER patterns-from-start objects-from-start
    python tests/tools/tried.py FOLDER

These BadNets are in none of the tables of docs/results.md. Each is repaired by the report's steps
once, and from there hardened anew in every way. The table goes to tests/results/tried.md.
"""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data")]

import badnet
import numpy as np

import repair
import utils
from defence.base import files
from defence.base.arguments import Parser, at_least
from defence.base.process import run_command
from defence.base.progress import say
from defence.base.startup import make_reproducible
from defence.beyond import changes, harden
from defence.beyond.changes import FAMILIES
from defence.beyond.harden import ChangedImages
from defence.beyond.observer import Observer
from defence.beyond.settings import Settings
from defence.judge import detector, figures
from defence.net import training
from defence.net.cached_net import CachedNet, extract_features
from defence.net.inference import predict
from defence.net.split import keep_pruned, split_net

NETS = ("patterns-from-start", "objects-from-start")
SCALE = "0..1"
RATE = 0.01
TABLE = ROOT / "tests" / "results" / "tried.md"
HEAD = """# What was tried

`python tests/tools/tried.py FOLDER --seed {seed}`

These are trials on nets of the demo's size: 40 people, 600 validation and 400 clean test images.
They compare ways to harden; how well the step does is in [docs/results.md](../../docs/results.md).

In %: clean accuracy of G; for each trigger the attack success rate on G / the detection rate, of
the poisoned images that the attack works on, where the threshold of the anomaly score flags 1 % of
the clean test images. A row changes that one thing. One image is 0.25 %, and another seed moves the
rates by some points. No picture gets a pattern (`--harden-pattern-rate 0`), for which no family
stands.

"""


def softly(net, changed, labels, settings, rng, of_b):
    """Train as harden.train does, but towards the mean of the label and B's own answer.

    of_b: B's answers to the unchanged pictures, float32 (n, N). A plain loop of Keras's.
    """
    wanted = (of_b + np.eye(of_b.shape[1], dtype=np.float32)[labels]) / 2
    size, n = settings.harden_batch_size, len(changed)
    epochs, rate = harden.make_schedule(n, settings)
    net.trainable = True
    net.compile(training.make_fused_adam()(rate), "categorical_crossentropy")
    for _ in range(epochs):
        order = rng.permutation(n)
        for start in range(0, n, size):
            rows = order[start : start + size]
            net.train_on_batch(changed[rows], wanted[rows])


def without(family):
    return {each: rate for each, rate in FAMILIES.items() if each is not family}


PATCHES = {changes.patch: 1}
# What is done otherwise; "soft": see `softly`.
WAYS = {
    "as harden.py does": {},
    "… with another seed": {"seed": 1},
    **{f"without {family.__name__}": {"families": without(family)} for family in FAMILIES},
    "patches alone": {"families": PATCHES},
    "patches alone, half of the target is B's answer": {"families": PATCHES, "soft": True},
    "half of the target is B's answer": {"soft": True},
}


def kl(p, q):
    least = detector.LEAST
    return np.sum(p * (np.log(np.maximum(p, least)) - np.log(np.maximum(q, least))), axis=1)


def of_bs_class(b, g):
    """G's probability of the class that B answers."""
    return np.take_along_axis(g, b.argmax(axis=1)[:, None], axis=1)[:, 0]


def log_odds(b, g):
    """Of the class that G holds most likely beside B's, against B's."""
    others = g.copy()
    np.put_along_axis(others, b.argmax(axis=1)[:, None], 0, axis=1)
    least = detector.LEAST
    return np.log(np.maximum(others.max(axis=1), least) / np.maximum(of_bs_class(b, g), least))


SCORES = {
    "1 − G's probability of B's class": lambda b, g: 1 - of_bs_class(b, g),
    "log-odds of G's class against B's": log_odds,
    "Kullback–Leibler, of B from G": kl,
    "Kullback–Leibler, of G from B": lambda b, g: kl(g, b),
    "Jensen–Shannon": lambda b, g: kl(b, (b + g) / 2) + kl(g, (b + g) / 2),
    "Hellinger": lambda b, g: 1 - np.sum(np.sqrt(b * g), axis=1),
    "Jeffreys (harden.py's)": detector.score_anomaly,
}


class Case:
    """A net of the zoo, before and after the report's steps, and the data to judge it by."""

    def __init__(self, name, folder, options):
        self.net = utils.load_badnet(badnet.net_path(name, folder))
        shape, classes = self.net.input_shape[1:], self.net.output_shape[1]

        def read(path):
            with utils.open_dataset(path) as data:
                data.fit_to(shape, classes)
                return np.concatenate([x for x, _ in data.batches(SCALE)]), data.labels

        poisoned = [badnet.poisoned_path(*pair, folder) for pair in badnet.ZOO[name].triggers]
        self.sets = [read(path) for path in (folder / "clean_test_data.h5", *poisoned)]
        self.of_b = self.answers()
        self.options = options
        with utils.open_dataset(folder / "clean_validation_data.h5") as clean:
            clean.fit_to(shape, classes)
            parts = split_net(self.net)
            cached = CachedNet(parts, clean, SCALE, *extract_features(parts, clean, SCALE))
            answers = list(predict(parts.head, cached.features))
            answers = detector.compute_probabilities(np.concatenate(answers), self.net)
            self.labels, self.of_validation = clean.labels, np.asarray(answers)
            self.images = harden.read_images(clean)
            self.pruned = repair.do_repair(self.net, clean, options, Observer()).masked
        self.after = self.net.get_weights()

    def answers(self):
        """The net's probabilities for every dataset."""
        of_sets = [np.concatenate(list(predict(self.net, x))) for x, _ in self.sets]
        return [np.asarray(detector.compute_probabilities(scores, self.net)) for scores in of_sets]

    def harden(self, way):
        """Harden the net in a way. Returns G's answers to every dataset."""
        options = dataclasses.replace(self.options, seed=way.get("seed", self.options.seed))
        self.net.set_weights(self.after)
        rng = np.random.default_rng(options.seed)
        changed = ChangedImages(self.images, SCALE, rng, way.get("families", FAMILIES))
        arguments = self.net, changed, self.labels, options, rng
        with keep_pruned(split_net(self.net).layer, self.pruned):
            softly(*arguments, self.of_validation) if way.get("soft") else harden.train_on_changes(
                *arguments
            )
        return self.answers()

    def cells(self, of_g, score=detector.score_anomaly):
        """Clean accuracy; of each trigger, attack success and detection rate: texts, in %."""
        clean, *poisoned = [np.asarray(score(b, g)) for b, g in zip(self.of_b, of_g)]
        limit = figures.find_threshold(clean, RATE)
        yield f"{100 * np.mean(of_g[0].argmax(axis=1) == self.sets[0][1]):.1f}"
        for scores, b, g, (_, targets) in zip(poisoned, self.of_b[1:], of_g[1:], self.sets[1:]):
            works = b.argmax(axis=1) == targets
            left = np.mean(g.argmax(axis=1) == targets)
            yield f"{100 * left:.1f} / {100 * np.mean(scores[works] > limit):.1f}"


def mean(*of_nets):
    """The mean of several nets' answers to the same datasets, for every case."""
    return [[np.mean(each, axis=0) for each in zip(*case)] for case in zip(*of_nets)]


def try_all(cases):
    """Yield the lines of the tables, each as soon as it is known."""

    def line(*cells):
        say(" | ".join(cells))
        return f"| {' | '.join(cells)} |"

    heads = [
        head
        for name in NETS
        for head in (f"{name}: G", *(trigger for trigger, _ in badnet.ZOO[name].triggers))
    ]
    rule = line("---", *["--:"] * len(heads))
    yield from (line("way", *heads), rule)

    def row(name, answers, *score):
        return line(
            name, *(cell for each in zip(cases, answers) for cell in each[0].cells(each[1], *score))
        )

    yield row("B itself", [case.of_b for case in cases])
    of_report = [case.answers() for case in cases]
    yield row("the report's steps alone", of_report)
    for name, way in WAYS.items():
        of_g = [case.harden(way) for case in cases]
        yield row(name, of_g)
        if not way:
            of_harden = of_g
        if way == {"seed": 1}:
            yield row("… the mean of both G's answers", mean(of_harden, of_g))
    yield row("the mean of the report's G's and of harden.py's", mean(of_report, of_harden))
    for what, of_g in (("the report's steps", of_report), ("as harden.py does", of_harden)):
        yield from ("", line(f"score, {what}", *heads), rule)
        for name, score in SCORES.items():
            yield row(name, of_g, score)


def main():
    parser = Parser(
        prog="tried.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the nets and their data")
    parser.add_argument("--seed", type=at_least(0, int), default=0, help="(default: 0)")
    options = parser.parse_args()
    make_reproducible(options.seed)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns that there are many nets
    settings = Settings(seed=options.seed, harden_pattern_rate=0)
    cases = [Case(name, options.folder, settings) for name in NETS]
    text = HEAD.format(seed=options.seed) + "\n".join(try_all(cases))
    with files.replace_file(TABLE) as beside:
        beside.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
