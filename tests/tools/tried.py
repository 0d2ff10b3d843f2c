"""Try other ways to harden a net than harden.py's, and other scores. Write a table of them.

    python models/badnet.py --seed 1 --output FOLDER patterns-from-start objects-from-start
    python tests/tools/tried.py FOLDER
    python tests/tools/tried.py FOLDER --lengths

These BadNets are in no table of docs/results.md. Each is repaired once by the report's steps, and
then hardened from there in every way. The table goes to tests/results/tried.md, and that of more
and fewer steps to tests/results/lengths.md.
"""

import argparse
import dataclasses
import itertools
import sys
import time
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
from defence.base.startup import import_keras, make_reproducible
from defence.beyond import changes, harden
from defence.beyond.changes import HARDENING
from defence.beyond.harden import ChangedImages
from defence.beyond.observer import Observer
from defence.beyond.settings import Settings
from defence.judge import detector, figures
from defence.net.cached_net import CachedNet, extract_features
from defence.net.inference import predict
from defence.net.split import keep_pruned, split_net

NETS = ("patterns-from-start", "objects-from-start")
SCALE = "0..1"
RATE = 0.01
TABLE, LENGTHS_TABLE = (ROOT / "tests" / "results" / f"{name}.md" for name in ("tried", "lengths"))
HEAD = """# What was tried

`python tests/tools/tried.py FOLDER --seed {seed}{switch}`

These trials compare ways to harden, on nets of the demo's size: 40 people, 600 validation and 400
clean test images. [docs/results.md](../../docs/results.md) says how well hardening works.

In %: clean accuracy of G; for each trigger the attack success rate on G / the detection rate on the
poisoned images that the attack works on, at the threshold of the anomaly score that flags 1 % of
the clean test images. A row changes only the thing it names. One image is 0.25 %, and another seed
moves the rates by some points. No image gets a pattern (`--harden-pattern-rate 0`), since no family
of changes makes patterns. G answers one view of an image.

"""


def train_softly(net, changed, labels, settings, rng, badnet_answers):
    """Train as harden.py does, but towards the mean of the label and B's answer, in a Keras loop.

    badnet_answers: to the unchanged images, float32 (n, N).
    """
    goals = (badnet_answers + np.eye(badnet_answers.shape[1], dtype=np.float32)[labels]) / 2
    size, n = settings.harden_batch_size, len(changed)
    epochs, _, rate = harden.make_schedule(n, settings)
    net.trainable = True
    adam, steps = import_keras().optimizers.Adam(), itertools.count()
    net.compile(adam, "categorical_crossentropy")
    for _ in range(epochs):
        order = rng.permutation(n)
        for start in range(0, n, size):
            rows = order[start : start + size]
            adam.learning_rate = float(rate(next(steps)))
            net.train_on_batch(changed[rows], goals[rows])


def leave_out(family):
    """Return the families of changes and their rates without one family."""
    return {kind: rate for kind, rate in HARDENING.items() if kind is not family}


PATCHES = {changes.patch: 1}
# What each way changes; "soft": see train_softly.
WAYS = {
    "as harden.py does": {},
    "… with another seed": {"seed": 1},
    **{f"without {family.__name__}": {"families": leave_out(family)} for family in HARDENING},
    "patches alone": {"families": PATCHES},
    "patches alone, half of the target is B's answer": {"families": PATCHES, "soft": True},
    "half of the target is B's answer": {"soft": True},
}


LENGTHS = (0.125, 0.25, 0.5, 1, 2)  # times the steps of harden.py


def compute_kl(p, q):
    """Return the Kullback–Leibler divergence of p from q, (n,). p, q: probabilities (n, N)."""
    least = detector.MIN_PROBABILITY
    return np.sum(p * (np.log(np.maximum(p, least)) - np.log(np.maximum(q, least))), axis=1)


def take_badnet_class(b, g):
    """Return G's probability of the class that B answers, float (n,)."""
    return np.take_along_axis(g, b.argmax(axis=1)[:, None], axis=1)[:, 0]


def compute_log_odds(b, g):
    """Return the log-odds of G's most likely class besides B's, against B's class: float (n,)."""
    others = g.copy()
    np.put_along_axis(others, b.argmax(axis=1)[:, None], 0, axis=1)
    least = detector.MIN_PROBABILITY
    likeliest = np.maximum(others.max(axis=1), least)
    return np.log(likeliest / np.maximum(take_badnet_class(b, g), least))


SCORES = {
    "1 − G's probability of B's class": lambda b, g: 1 - take_badnet_class(b, g),
    "log-odds of G's class against B's": compute_log_odds,
    "Kullback–Leibler, of B from G": compute_kl,
    "Kullback–Leibler, of G from B": lambda b, g: compute_kl(g, b),
    "Jensen–Shannon": lambda b, g: sum(compute_kl(p, (b + g) / 2) for p in (b, g)),
    "Hellinger": lambda b, g: 1 - np.sum(np.sqrt(b * g), axis=1),
    "Jeffreys": lambda b, g: compute_kl(b, g) + compute_kl(g, b),
    detector.SCORE: detector.score_anomaly,
}


class Case:
    """A net of the zoo, before and after the report's steps, and the datasets that judge it."""

    def __init__(self, name, folder, options):
        self.net = utils.load_badnet(badnet.net_path(name, folder))
        shape, classes = self.net.input_shape[1:], self.net.output_shape[1]

        def read(path):
            with utils.open_dataset(path) as data:
                data.fit_to(shape, classes)
                return np.concatenate([x for x, _ in data.batches(SCALE)]), data.labels

        poisoned = [badnet.poisoned_path(*pair, folder) for pair in badnet.ZOO[name].triggers]
        self.datasets = [read(path) for path in (folder / "clean_test_data.h5", *poisoned)]
        self.badnet_answers = self.compute_answers()
        self.options = options
        with utils.open_dataset(folder / "clean_validation_data.h5") as clean:
            clean.fit_to(shape, classes)
            parts = split_net(self.net)
            cached = CachedNet(parts, clean, SCALE, *extract_features(parts, clean, SCALE))
            scores = np.concatenate(list(predict(parts.head, cached.features)))
            answers = detector.compute_probabilities(scores, self.net)
            self.labels, self.validation_answers = clean.labels, np.asarray(answers)
            self.images = harden.read_images(clean)
            self.pruned = repair.do_repair(self.net, clean, options, Observer()).masked
        self.weights = self.net.get_weights()

    def compute_answers(self):
        """Return the net's probabilities for every dataset."""
        all_scores = [np.concatenate(list(predict(self.net, x))) for x, _ in self.datasets]
        return [
            np.asarray(detector.compute_probabilities(scores, self.net)) for scores in all_scores
        ]

    def harden(self, way):
        """Harden the net, after the report's steps, in one of WAYS. Return G's answers."""
        options, length = self.options, way.get("length", 1)
        options = dataclasses.replace(
            options,
            seed=way.get("seed", options.seed),
            harden_steps=round(length * options.harden_steps),
            harden_epochs=round(length * options.harden_epochs),
        )
        self.net.set_weights(self.weights)
        rng = np.random.default_rng(options.seed)
        changed = ChangedImages(self.images, SCALE, rng, way.get("families", HARDENING))
        arguments = self.net, changed, self.labels, options, rng
        with keep_pruned(split_net(self.net).layer, self.pruned):
            if way.get("soft"):
                train_softly(*arguments, self.validation_answers)
            else:
                harden.train_on_changes(*arguments)
        return self.compute_answers()

    def make_cells(self, repaired_answers, score=detector.score_anomaly):
        """Yield clean accuracy, then each trigger's attack success and detection rate, in %."""
        pairs = list(zip(self.badnet_answers, repaired_answers))
        clean, *poisoned = [np.asarray(score(b, g)) for b, g in pairs]
        threshold = figures.find_threshold(clean, RATE)
        yield f"{100 * np.mean(pairs[0][1].argmax(axis=1) == self.datasets[0][1]):.1f}"
        for scores, (b, g), (_, targets) in zip(poisoned, pairs[1:], self.datasets[1:]):
            works = b.argmax(axis=1) == targets
            success = np.mean(g.argmax(axis=1) == targets)
            yield f"{100 * success:.1f} / {100 * np.mean(scores[works] > threshold):.1f}"


def average(*nets_answers):
    """Return the mean of several nets' answers to the same datasets, for every case."""
    return [
        [np.mean(answers, axis=0) for answers in zip(*case_answers)]
        for case_answers in zip(*nets_answers)
    ]


def list_heads():
    """Return the heads of the columns that `make_row` fills."""
    return [
        head
        for name in NETS
        for head in (f"{name}: G", *(trigger for trigger, _ in badnet.ZOO[name].triggers))
    ]


def make_line(*cells):
    say(" | ".join(cells))
    return f"| {' | '.join(cells)} |"


def make_row(name, cases, answers, *score):
    """Return a line of a table. answers: of G, for each case."""
    pairs = zip(cases, answers)
    cells = (case.make_cells(case_answers, *score) for case, case_answers in pairs)
    return make_line(name, *itertools.chain.from_iterable(cells))


def try_all(cases):
    """Yield the lines of the tables, each as soon as it is computed."""
    heads = list_heads()
    rule = make_line("---", *["--:"] * len(heads))
    yield from (make_line("way", *heads), rule)
    yield make_row("B itself", cases, [case.badnet_answers for case in cases])
    report = [case.compute_answers() for case in cases]
    yield make_row("the report's steps alone", cases, report)
    for name, way in WAYS.items():
        answers = [case.harden(way) for case in cases]
        yield make_row(name, cases, answers)
        if not way:
            hardened = answers
        if way == {"seed": 1}:
            yield make_row("… the mean of both G's answers", cases, average(hardened, answers))
    both = average(report, hardened)
    yield make_row("the mean of the report's G's and of harden.py's", cases, both)
    for method, answers in (("the report's steps", report), ("as harden.py does", hardened)):
        yield from ("", make_line(f"score, {method}", *heads), rule)
        for name, score in SCORES.items():
            yield make_row(name, cases, answers, score)


def try_lengths(cases):
    """Yield the lines of the table of more and fewer steps."""
    heads = list_heads()
    yield make_line("times the steps; processor seconds for both BadNets", *heads)
    yield make_line("---", *["--:"] * len(heads))
    for length in LENGTHS:
        start = time.process_time()
        answers = [case.harden({"length": length}) for case in cases]
        yield make_row(f"{length:g}; {time.process_time() - start:.0f}", cases, answers)


def main():
    parser = Parser(
        prog="tried.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="with the nets and their datasets"
    )
    parser.add_argument("--seed", type=at_least(0, int), default=0, help="(default: 0)")
    parser.add_argument("--lengths", action="store_true", help="only more steps, and fewer")
    options = parser.parse_args()
    make_reproducible(options.seed)
    settings = Settings(seed=options.seed, harden_pattern_rate=0)
    cases = [Case(name, options.folder, settings) for name in NETS]
    lines, path = (try_lengths, LENGTHS_TABLE) if options.lengths else (try_all, TABLE)
    switch = " --lengths" if options.lengths else ""
    text = HEAD.format(seed=options.seed, switch=switch) + "\n".join(lines(cases))
    with files.replace_file(path) as temporary:
        temporary.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
