"""Try other ways to harden a net than harden.py's, and other scores, and write down what they give.

    python models/badnet.py --seed 1 --output FOLDER three-to-one-from-start three-to-one-brief \\
        blended-from-start
    python tests/tools/tried.py FOLDER

These BadNets are in none of the tables of docs/results.md. Each is repaired by the report's steps
once, and from there hardened anew in every way. The table goes to tests/results/tried.md.
"""

import argparse
import dataclasses
import functools
import logging
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data")]

import badnet
import numpy as np

import repair
import utils
from defence import cached_net, detector, figures, files, harden, training
from defence.cached_net import CachedNet
from defence.cli import Parser, at_least, command, say
from defence.harden import Patches, paint
from defence.inference import predict
from defence.net import find_layer, kept_pruned, leaves, split
from defence.observer import Observer
from defence.options import Settings
from defence.startup import make_reproducible
from defence.training import make_trainer

NETS = ("three-to-one-from-start", "three-to-one-brief", "blended-from-start")
SCALE = "0..1"
RATE = 0.01
TABLE = ROOT / "tests" / "results" / "tried.md"
HEAD = """# What was tried

{command}

These are trials of {steps} training steps each (`repair.py --harden` takes 5,000), on nets of the
demo's size: 40 people, 600 validation and 400 clean test images. They compare ways to harden; how
well the step itself does is in [docs/results.md](../../docs/results.md).

In %: clean accuracy of G; for each trigger the attack success rate on G / the detection rate, of
the poisoned images that the attack works on, where the threshold of the anomaly score flags 1 % of
the clean test images. A row changes that one thing. One image is 0.25 %, and another seed moves the
rates by several points.

"""


class Painted(harden.Painted):
    """Pictures that another function paints on, which takes and returns what harden.paint does."""

    def __init__(self, painter, *arguments):
        super().__init__(*arguments)
        self.painter = painter

    def paint(self, pictures):
        return self.painter(pictures, self.rng, self.patches)


def half(pictures, rng, patches):
    """Paint on every other picture alone."""
    pictures[::2] = paint(pictures[::2].copy(), rng, patches)
    return pictures


def pieces(pictures, rng, patches):
    """Patches that show what another picture has somewhere else, instead of noise."""
    others = np.roll(pictures, rng.integers(-15, 16, 2), (1, 2))[rng.permutation(len(pictures))]
    painted = paint(pictures.copy(), rng, dataclasses.replace(patches, plain=1))
    shown = np.any(painted != pictures, axis=3, keepdims=True) & (
        rng.random(others.shape[:1] + (1,) * 3) < 0.5
    )
    return np.where(shown, others, painted)


def mixed(pictures, rng, patches):
    """Into 15 % of the pictures noise is mixed as a whole, at 5 to 30 %."""
    weight = rng.uniform(0.05, 0.3, (len(pictures), 1, 1, 1)) * (
        rng.random((len(pictures), 1, 1, 1)) < 0.15
    )
    noise = 255 * rng.random(pictures.shape)
    return paint(np.float32(pictures + weight * (noise - pictures)), rng, patches)


def moved(pictures, rng, patches):
    """Pictures shifted by up to 2 pixels and lit otherwise, as well as painted on."""
    pictures = np.roll(pictures, rng.integers(-2, 3, 2), (1, 2))
    light = rng.uniform(0.85, 1.15, (len(pictures), 1, 1, pictures.shape[3]))
    return paint(np.clip(pictures * light.astype(np.float32), 0, 255), rng, patches)


def of_the_head(model, layers, *arguments, **options):
    """Train what is behind the pruned layer alone, as the report's third step does."""
    head = split(model, find_layer(model)).head
    return make_trainer(model, list(leaves(head)), *arguments, **options)


def averaged(*arguments, **options):
    """Also keep a running mean of the weights, which forgets 1 % at each step."""
    adam = functools.partial(training.fused_adam(), use_ema=True)
    # Keras makes the mean's variables when Adam is built, which make_trainer does itself.
    with mock.patch.object(training, "fused_adam", lambda: adam):
        return make_trainer(*arguments, **options)


# What is done otherwise: other patches, options, functions in the place of others.
WAYS = {
    "as harden.py does": {},
    "… with another seed": {"seed": 1},
    "… in place of the report's steps": {"from_b": True},
    "… half the steps": {"steps": 0.5},
    "… twice the steps": {"steps": 2},
    "towards the label alone": {"harden_distillation_weight": 0},
    "towards B's answer alone": {"harden_distillation_weight": 1},
    "half of the pictures painted on": {"paint": half},
    "all patches in one colour": {"patches": Patches(plain=1)},
    "pieces of other faces instead of noise": {"paint": pieces},
    "none longer than 3 times its width": {"patches": Patches(aspect=3)},
    "none smaller than 1 % of the picture": {"patches": Patches(area=(0.01, 0.3))},
    "no mirrored pairs": {"patches": Patches(pairs=0)},
    "noise mixed into some whole pictures": {"paint": mixed},
    "patches of half the area": {"patches": Patches(area=(0.0025, 0.15))},
    "up to 6 patches": {"patches": Patches(most=6)},
    "also shifted and lit otherwise": {"paint": moved},
    "layers behind conv_3 alone": {"trainer": of_the_head},
    "learning rate 3e-4": {"harden_learning_rate": 3e-4},
    "weights averaged over the last 100 steps": {"trainer": averaged},
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
    "Jeffreys (harden.py's)": detector.anomaly_score,
}


class Case:
    """A net of the zoo, before and after the report's steps, and the data to judge it by."""

    def __init__(self, name, folder, seed):
        self.net = utils.load_badnet(badnet.net_path(name, folder))
        shape, classes = self.net.input_shape[1:], self.net.output_shape[1]

        def read(path):
            with utils.open_dataset(path) as data:
                data.fit_to(shape, classes)
                return np.concatenate([x for x, _ in data.batches(SCALE)]), data.labels

        poisoned = [badnet.poisoned_path(*pair, folder) for pair in badnet.ZOO[name][1]]
        self.sets = [read(path) for path in (folder / "clean_test_data.h5", *poisoned)]
        self.of_b = self.answers()
        self.before = self.net.get_weights()
        with utils.open_dataset(folder / "clean_validation_data.h5") as clean:
            clean.fit_to(shape, classes)
            parts = split(self.net, find_layer(self.net))
            cached = CachedNet(parts, clean, SCALE, *cached_net.extract(parts, clean, SCALE))
            self.wanted = {weight: harden.targets(cached, weight) for weight in (0, 0.5, 1)}
            self.pictures = harden.read_pictures(clean)
            self.options = Settings(seed=seed)
            self.pruned = repair.do_repair(self.net, clean, self.options, Observer()).masked
        self.after = self.net.get_weights()

    def answers(self, shift=0):
        """The net's probabilities for every dataset, its images shifted by pixels to the right."""
        of_sets = [list(predict(self.net, np.roll(x, shift, 2))) for x, _ in self.sets]
        of_sets = [detector.probabilities(np.concatenate(scores), self.net) for scores in of_sets]
        return list(map(np.asarray, of_sets))

    def harden(self, way, steps):
        """Harden the net in a way. Returns G's answers to every dataset."""
        changes = {name: value for name, value in way.items() if hasattr(self.options, name)}
        steps = round(steps * way.get("steps", 1))
        settings = dataclasses.replace(self.options, harden_steps=steps, **changes)
        self.net.set_weights(self.before if way.get("from_b") else self.after)
        pruned = [] if way.get("from_b") else self.pruned
        rng = np.random.default_rng(settings.seed)
        painter, patches = way.get("paint", paint), way.get("patches", Patches())
        painted = Painted(painter, self.pictures, SCALE, rng, patches)
        wanted = self.wanted[settings.harden_distillation_weight]
        trainer = way.get("trainer", make_trainer)
        with kept_pruned(find_layer(self.net), pruned):
            harden.train(self.net, painted, wanted, settings, rng, trainer)
        if trainer is averaged:
            self.net.optimizer.finalize_variable_values(self.net.trainable_variables)
        return self.answers()

    def cells(self, of_g, score=detector.anomaly_score):
        """Clean accuracy; of each trigger, attack success and detection rate: texts, in %."""
        clean, *poisoned = [np.asarray(score(b, g)) for b, g in zip(self.of_b, of_g)]
        limit = figures.threshold(clean, RATE)
        yield f"{100 * np.mean(of_g[0].argmax(axis=1) == self.sets[0][1]):.1f}"
        for scores, b, g, (_, targets) in zip(poisoned, self.of_b[1:], of_g[1:], self.sets[1:]):
            works = b.argmax(axis=1) == targets
            left = np.mean(g.argmax(axis=1) == targets)
            yield f"{100 * left:.1f} / {100 * np.mean(scores[works] > limit):.1f}"


def mean(*of_nets):
    """The mean of several nets' answers to the same datasets."""
    return [np.mean(answers, axis=0) for answers in zip(*of_nets)]


def try_all(cases, steps):
    """Yield the lines of the tables, each as soon as it is known."""

    def line(*cells):
        say(" | ".join(cells))
        return f"| {' | '.join(cells)} |"

    heads = [
        head
        for name in NETS
        for head in (f"{name}: G", *(trigger for trigger, _ in badnet.ZOO[name][1]))
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
        of_g = [case.harden(way, steps) for case in cases]
        yield row(name, of_g)
        if not way:
            of_harden = of_g
            views = [mean(*map(case.answers, (-1, 0, 1))) for case in cases]
        if way == {"seed": 1}:
            two = list(map(mean, of_harden, of_g))
    yield row("as harden.py does, G's answers to three views", views)
    yield row("… of two G's, of two seeds", two)
    yield row("… of two G's, the report's and the hardened", list(map(mean, of_report, of_harden)))
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
    parser.add_argument(
        "--steps", type=at_least(1, int), default=300, help="training steps (default: 300)"
    )
    parser.add_argument("--seed", type=at_least(0, int), default=0, help="(default: 0)")
    options = parser.parse_args()
    make_reproducible(options.seed)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns that there are many nets
    cases = [Case(name, options.folder, options.seed) for name in NETS]
    lines = try_all(cases, options.steps)
    made_by = f"`python tests/tools/tried.py FOLDER --steps {options.steps} --seed {options.seed}`"
    text = HEAD.format(command=made_by, steps=options.steps) + "\n".join(lines)
    with files.replacing(TABLE) as beside:
        beside.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(command(main))
