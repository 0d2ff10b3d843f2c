"""Measure how often a class stands out among flagged images, in clean and in poisoned streams.

    python tests/tools/streams.py FOLDER …

A FOLDER has nets and data, as models/badnet.py --output makes them, or is models/zoo-SIZE. Every
BadNet in it is repaired by the report's steps, with images held out, and its test data are judged
by both rules. Where `make results` left NAME_hardened.h5, that net judges them too. Streams are
drawn from the verdicts: SIZES images of people who are equally likely, or of whom some are far
likelier, clean or with one of SHARES poisoned. A class that stands out is right if it is the net's
target, whether the stream is poisoned or not.
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
from benchmark import print_table
from results import run_script

from defence.base.arguments import Parser
from defence.base.process import run_command
from defence.base.progress import say
from defence.explain import flagged

SIZES, STREAMS = (50, 100, 200), 200  # of each size, for each net and rule
SHARES = (0.1, 0.04)  # fractions of poisoned images
RULES = {"B and G disagree": (), "--fpr 0.05": ("--fpr", "0.05")}
EXPONENT = 1.0  # the n-th person has the likelihood 1 / n ** EXPONENT


def judge(net, pairs, folder, scratch):
    """Judge a net's test data. Return {rule: {file: verdicts}} and the number of classes.

    pairs: (trigger, target) of the net.
    """
    csv_path, repaired = scratch / "rows.csv", {"report": scratch / "g.h5"}
    if folder.name.startswith("zoo-"):
        folder = ROOT / "data" / folder.name
    clean = [folder / f"clean_{part}_data.h5" for part in ("validation", "test")]
    run_script("repair.py", net, clean[0], "--output", repaired["report"], "--holdout", 0.25)
    hardened = net.with_name(f"{net.stem}_hardened.h5")
    if hardened.exists():
        repaired["hardened"] = hardened
    poisoned = [folder / f"{trigger}_to_{to}_poisoned_data.h5" for trigger, to in pairs]
    verdicts = {}
    for method, path in repaired.items():
        for rule, options in RULES.items():
            arguments = [clean[1], net, "--repaired", path, "--csv", csv_path, *options]
            run_script("eval_defence.py", *arguments, "--poisoned", *poisoned)
            with csv_path.open() as file:
                rows = list(csv.DictReader(file))
            classes = max(int(row["label"]) for row in rows) + 1
            verdicts[f"{method}, {rule}"] = {
                path.name: read_verdicts(
                    [row for row in rows if row["dataset"] == str(path)], classes
                )
                for path in (clean[1], *poisoned)
            }
    return verdicts, classes


def read_verdicts(rows, classes):
    """Return the labels, the BadNet's classes, 0..N-1, and whether flagged: arrays (n,)."""
    badnet = np.array([int(row["badnet_class"]) - 1 for row in rows])
    verdicts = np.array([int(row["class"]) for row in rows])
    return np.array([int(row["label"]) for row in rows]), badnet, verdicts == classes + 1


def draw_stream(clean, poisoned, size, share, uneven, classes, rng):
    """Return a stream: the BadNet's classes, and whether flagged.

    clean, poisoned: verdicts, as read_verdicts returns them.  share: fraction of poisoned images.
    uneven: whether some people are far likelier than others.
    """
    labels, badnet, bad = clean
    likelihood = np.ones(classes)
    if uneven:
        likelihood = rng.permutation(1 / np.arange(1, classes + 1) ** EXPONENT)
    weights = likelihood[labels] / likelihood[labels].sum()
    chosen = rng.choice(len(labels), round(size * (1 - share)), replace=False, p=weights)
    parts = [(badnet[chosen], bad[chosen])]
    if share:
        chosen = rng.choice(len(poisoned[0]), round(size * share), replace=False)
        parts.append((poisoned[1][chosen], poisoned[2][chosen]))
    return map(np.concatenate, zip(*parts))


def count_alarms(verdicts, classes, rng):
    """Yield for each share the fractions of the streams in which a class stands out, 0..1.

    These are (share, of any size with a wrong class, of each size with the target).
    """
    clean, *poisoned_sets = verdicts.values()
    targets = {int(labels[0]) + 1 for labels, _, _ in poisoned_sets}
    streams = len(poisoned_sets) * 2 * STREAMS
    for share in (0, *SHARES):
        wrong, right = 0, dict.fromkeys(SIZES, 0)
        for poisoned, uneven, size in itertools.product(poisoned_sets, (False, True), SIZES):
            for _ in range(STREAMS):
                stream = draw_stream(clean, poisoned, size, share, uneven, classes, rng)
                candidates = flagged.find_candidates(*stream, classes)
                if candidates and candidates[0].stands_out:
                    is_right = candidates[0].target in targets
                    right[size] += is_right
                    wrong += not is_right
        yield share, wrong / streams / len(SIZES), *(count / streams for count in right.values())


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
            pairs = json.loads(net.with_suffix(".json").read_text())["triggers"]
            if not pairs:  # a clean net
                continue
            say(f"{net}: repair and judge")
            with tempfile.TemporaryDirectory() as scratch:
                rule_verdicts, classes = judge(net, pairs, folder, Path(scratch))
            for rule, verdicts in rule_verdicts.items():
                rate = np.mean(next(iter(verdicts.values()))[2])
                for shares in count_alarms(verdicts, classes, rng):
                    name = f"{folder.name} {net.stem.removesuffix('_bd_net')}"
                    rows.append((name, rule, *(100 * share for share in (rate, *shares))))
    print_table(*rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
