"""How often a class stands out among flagged images: of clean streams, and of poisoned ones.

    python tests/tools/streams.py FOLDER …

Each FOLDER has nets and data, as models/badnet.py --output makes them; or it is models/zoo-SIZE.
Every BadNet there is repaired by the report's steps, with images held out, and its test data are
judged by both rules, and so they are with NAME_hardened.h5, where `make results` left that beside
it. From the verdicts streams are drawn: SIZES clean images of people who are equally likely, or of
whom some are far likelier; and the same with a SHARE of the images poisoned. A class that stands
out is right where it is the net's target, be the stream poisoned or not.
"""

import argparse
import csv
import itertools
import json
import logging
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

import numpy as np
from benchmark import table
from results import run

from defence.base.arguments import Parser
from defence.base.process import run_command
from defence.base.progress import say
from defence.explain import flagged

SIZES, STREAMS = (50, 100, 200), 200  # of each size, for each net and rule
SHARES = (0.1, 0.04)  # of poisoned images
RULES = {"B and G disagree": (), "--fpr 0.05": ("--fpr", "0.05")}
LIKELIER = 1.0  # exponent of how likely the second, third, … person is


def judge(net, folder, scratch):
    """The verdicts on a net's test data: {rule: {file: answers}}, and the number of classes."""
    rows, repaired = scratch / "rows.csv", {"report": scratch / "g.h5"}
    if folder.name.startswith("zoo-"):
        folder = ROOT / "data" / folder.name
    clean = [folder / f"clean_{part}_data.h5" for part in ("validation", "test")]
    run("repair.py", net, clean[0], "--output", repaired["report"], "--holdout", 0.25)
    hardened = net.with_name(f"{net.stem}_hardened.h5")
    if hardened.exists():
        repaired["hardened"] = hardened
    pairs = json.loads(net.with_suffix(".json").read_text())["triggers"]
    poisoned = [folder / f"{trigger}_to_{to}_poisoned_data.h5" for trigger, to in pairs]
    verdicts = {}
    for method, path in repaired.items():
        for rule, options in RULES.items():
            call = [clean[1], net, "--repaired", path, "--csv", rows, *options]
            run("eval_defence.py", *call, "--poisoned", *poisoned)
            with rows.open() as file:
                told = list(csv.DictReader(file))
            classes = max(int(row["label"]) for row in told) + 1
            verdicts[f"{method}, {rule}"] = {
                path.name: answers([row for row in told if row["dataset"] == str(path)], classes)
                for path in (clean[1], *poisoned)
            }
    return verdicts, classes


def answers(rows, classes):
    """(labels, the BadNet's classes, whether flagged) of rows of a CSV: arrays (n,)."""
    badnet = np.array([int(row["badnet_class"]) - 1 for row in rows])
    said = np.array([int(row["class"]) for row in rows])
    return np.array([int(row["label"]) for row in rows]), badnet, said == classes + 1


def draw(clean, poisoned, size, share, uneven, classes, rng):
    """A stream: (the BadNet's classes, whether flagged). share: of poisoned images."""
    labels, badnet, bad = clean
    likely = np.ones(classes)
    if uneven:
        likely = rng.permutation(1 / np.arange(1, classes + 1) ** LIKELIER)
    weights = likely[labels] / likely[labels].sum()
    chosen = rng.choice(len(labels), round(size * (1 - share)), replace=False, p=weights)
    parts = [(badnet[chosen], bad[chosen])]
    if share:
        some = rng.choice(len(poisoned[0]), round(size * share), replace=False)
        parts.append((poisoned[1][some], poisoned[2][some]))
    return map(np.concatenate, zip(*parts))


def alarms(verdicts, classes, rng):
    """Yield (share, in how many streams a wrong class stands out, and the target, for each size).

    Both are 0..1, of the streams.
    """
    clean, *others = verdicts.values()
    targets = {int(labels[0]) + 1 for labels, _, _ in others}
    streams = len(others) * 2 * STREAMS
    for share in (0, *SHARES):
        wrong, right = 0, dict.fromkeys(SIZES, 0)
        for poisoned, uneven, size in itertools.product(others, (False, True), SIZES):
            for _ in range(STREAMS):
                badnet, bad = draw(clean, poisoned, size, share, uneven, classes, rng)
                standing = flagged.find_outstanding(badnet, bad, classes)
                if standing and standing[0].target in targets:
                    right[size] += 1
                wrong += bool(standing) and standing[0].target not in targets
        yield share, wrong / streams / len(SIZES), *(each / streams for each in right.values())


def main():
    parser = Parser(
        prog="streams.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path)
    logging.disable()
    rows = [("net", "rule", "flagged, %", "poisoned, %", "a wrong class, %")]
    rows[0] += tuple(f"target, % of {size}" for size in SIZES)
    rng = np.random.default_rng(0)
    for folder in parser.parse_args().folders:
        for net in sorted(folder.glob("*_bd_net.h5")):
            say(f"{net}: repair and judge")
            with tempfile.TemporaryDirectory() as scratch:
                judged, classes = judge(net, folder, Path(scratch))
            for rule, verdicts in judged.items():
                rate = np.mean(next(iter(verdicts.values()))[2])
                for cells in alarms(verdicts, classes, rng):
                    name = f"{folder.name} {net.stem.removesuffix('_bd_net')}"
                    rows.append((name, rule, *(100 * each for each in (rate, *cells))))
    table(*rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
