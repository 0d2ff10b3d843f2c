"""Scan nets whose truth is known, and record what the scan finds.

    python tests/tools/findings.py --references    defence/beyond/finding.json, from clean nets
    python tests/tools/findings.py                 the findings of other nets
    python tests/tools/findings.py --table         only the tables

The first scans the REFERENCES of clean_nets.py and photo_nets.py, and keeps the largest number of
each in each way; finding.py compares other nets with these. The second scans all other GROUPS.
Half of them served to choose the scan; the others are reported on. Nets of drawn faces are trained
where they are missing; those of photographs take `photo_data.py` and `photo_nets.py --all` first.
Each scanned net has a line in tests/results/findings/ and is not scanned again. The tables go to
tests/results/findings.md and docs/results.md.
"""

import argparse
import logging
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data"), str(ROOT / "tests" / "tools")]

import badnet
import clean_nets
import inversion
import numpy as np
import photo_data
import photo_nets
from records import RESULTS, format_table, name_class, read_records, write_record, write_tables
from scipy import optimize

import utils
from defence.base import files
from defence.base.arguments import Parser
from defence.base.errors import InputError
from defence.base.process import run_command
from defence.base.progress import say
from defence.base.startup import make_reproducible
from defence.beyond import finding, twins
from defence.net.cached_net import CachedNet
from defence.net.split import split_net

FOLDER = RESULTS / "findings"
DOCUMENTS = ROOT / "docs" / "results.md", RESULTS / "findings.md"
ZOO = [
    "sunglasses-from-start", "sunglasses-brief", "lipstick-from-start", "blended-from-start",
    "sunglasses-dormant", "all-to-all-from-start", "three-to-three-from-start",
    "sunglasses-negatives",
]  # fmt: skip
CHOSEN_SEED, REPORTED_SEED = 41, 42  # of the people on the nets of the ZOO
PHOTO_CLASSES = {
    "gtsrb": 43,
    "att": 40,
    "cifar": 10,
    "digits": 10,
    "tinya": 12,
    "tinyb": 12,
    "glyphs": 968,
}
LEAST_PROBABILITY = 0.01  # of a backdoor or of none, when nets are scored by cross-entropy


class Net(NamedTuple):
    """A net to scan. targets: classes from 0, or faces.NEXT; empty for a clean net."""

    name: str
    path: Path
    data: Path
    targets: tuple = ()


# ---------------------------------------------------------------------------------- groups of nets


def list_groups():
    """Return the nets of each group, {group: [Net, …]}, in the order of the tables."""
    return {
        "references": [
            *list_drawn(clean_nets.REFERENCES),
            *list_zoo(CHOSEN_SEED, [badnet.CLEAN]),
            *list_photo(photo_nets.REFERENCES),
        ],
        "drawn, chosen by": list_zoo(CHOSEN_SEED, ZOO) + [make_demo_net()],
        "drawn, reported on": list_zoo(REPORTED_SEED, ZOO),
        "drawn, clean": list_drawn(clean_nets.CHECKS) + list_zoo(REPORTED_SEED, [badnet.CLEAN]),
        "photographs, chosen by": list_photo(photo_nets.CHOSEN_BY),
        "photographs, reported on": list_photo(photo_nets.REPORTED_ON),
        "photographs, clean": list_photo(photo_nets.CHECKS),
    }


def list_drawn(nets):
    """Return the Nets of clean_nets.REFERENCES or CHECKS."""
    return [Net(name, *clean_nets.make_paths(name)) for name in clean_nets.list_names(nets)]


def list_zoo(seed, names):
    """Return some Nets of the zoo with the people of a seed."""
    folder = ROOT / "models" / f"zoo-demo-{seed}"
    return [
        Net(
            f"{name}, seed {seed}",
            badnet.net_path(name, folder),
            folder / "clean_validation_data.h5",
            tuple(dict.fromkeys(target for _, target in badnet.ZOO[name].triggers)),
        )
        for name in names
    ]


def make_demo_net():
    data = ROOT / "data" / "demo_clean_validation_data.h5"
    return Net("demo", badnet.net_path("demo", ROOT / "models"), data, (0,))


def list_photo(names):
    """Return the Nets of these names of photo_nets.py."""
    nets = []
    for name in names:
        dataset, *_ = parts = name.split("-")
        data = photo_data.FOLDER / f"{dataset}_validation.h5"
        target = () if "clean" in parts else (int(parts[2]) % PHOTO_CLASSES[dataset],)
        nets.append(Net(name, photo_nets.FOLDER / f"{name}.h5", data, target))
    return nets


# -------------------------------------------------------------------------------------- scanning


def scan_net(net):
    """Scan a net. Return what its record keeps, a dict."""
    model = utils.load_badnet(net.path)
    with utils.open_dataset(net.data) as clean:
        clean.fit_to(model.input_shape[1:], model.output_shape[1])
        cached = CachedNet.from_dataset(split_net(model), clean)
        siblings = twins.make_twins(cached, seed=0)
        views = finding.make_views(cached, siblings, seed=0)
    return {"accuracy": round(cached.accuracy(), 4)} | summarise(views, net.targets)


def summarise(views, targets):
    """Return what the counts of a scan say: how clear they are, and the rank of each true target.

    An all-to-all attack has the rank of the shift by one. Ranks count from 1.
    """
    evidence = finding.compute_evidence(views)
    classes, shifts = finding.score_classes(evidence).max(axis=0), finding.score_shifts(evidence)
    scores = np.concatenate([classes, shifts])
    own = [shifts[0] if target == badnet.faces.NEXT else classes[target] for target in targets]
    result = finding.make_finding(views)
    return {
        "largest": {way: round(float(values.max()), 4) for way, values in evidence.items()},
        "score": round(float(scores.max()), 4),
        "p_value": result.p_value,
        "way": result.classes[0]["way"] if classes.max() >= shifts.max() else finding.SHIFT,
        "ranks": [1 + int(np.sum(scores > score)) for score in own],
        "cleanse": inversion.judge_sizes(views["sought"][0]),
    }


def record_scan(net, group):
    """Scan a net and record the findings in the file of its group, unless it has a record."""
    records = make_path(group)
    record, sha256 = read_records(records).get(net.name), files.hash_file(net.path)
    if record and record["sha256"] == sha256:
        return
    say(f"{net.path}: scan")
    write_record({"name": net.name, "sha256": sha256} | scan_net(net), records)


def make_path(group):
    return FOLDER / f"{group.replace(', ', '-').replace(' ', '-')}.jsonl"


def read_findings(group, nets):
    """Return the records of the nets of a group, in their order; some nets may have none."""
    records = read_records(make_path(group))
    return [records[net.name] for net in nets if net.name in records]


def read_references():
    """Return the largest number of each reference net in each way, {way: [float, …]}."""
    records = read_findings("references", list_groups()["references"])
    return {way: [record["largest"][way] for record in records] for way in finding.WAYS}


# ---------------------------------------------------------------------------------------- tables


def make_rows(group, nets):
    """Return a record of each net of a group, with its targets and its p-value of today."""
    targets = {net.name: list(net.targets) for net in nets}
    return [record | {"targets": targets[record["name"]]} for record in read_findings(group, nets)]


def make_table(rows):
    """Return the Markdown table of rows."""
    heads = ["net", "targets", "finding", "p", "score", "way", "rank of each target", "masks"]
    alignments = ["---", "---", "---", "--:", "--:", "---", "--:", "---"]
    cells = [
        [
            row["name"],
            ", ".join(map(name_class, row["targets"])) or "none",
            "backdoor" if is_alarm(row) else "nothing",
            f"{row['p_value']:.3f}",
            f"{row['score']:.2f}",
            row["way"],
            ", ".join(map(str, row["ranks"])) or "–",
            describe_cleanse(row),
        ]
        for row in rows
    ]
    return format_table(heads, alignments, cells)


def is_alarm(row):
    return row["p_value"] <= finding.LEVEL


def describe_cleanse(row):
    """Return what Neural Cleanse says of a net; of a BadNet also whether it is a true target."""
    answer = row["cleanse"]
    if answer is None:
        return "–"
    if not answer["alarm"]:
        return "nothing"
    if not row["targets"]:
        return "backdoor"
    return f"backdoor, {'right' if answer['class'] in row['targets'] else 'wrong'}"


def make_summary(groups):
    """Return a Markdown table with a line for each group of nets. groups: {name: rows}."""
    clean = [row for rows in groups.values() for row in rows if not row["targets"]]
    probability = fit_probability(groups)
    heads = ["nets", "alarms", "a true target first", "AUROC", "cross-entropy", "masks"]
    cells = []
    for group, rows in groups.items():
        cells.append([f"{len(rows)}, {group}", str(sum(map(is_alarm, rows)))])
        first, auroc = "–", "–"
        if rows[0]["targets"]:
            first = str(sum(min(row["ranks"]) == 1 for row in rows))
            pairs = [row["score"] > clean_row["score"] for row in rows for clean_row in clean]
            auroc = f"{np.mean(pairs):.3f}"
        entropy = np.mean([measure_entropy(row, probability) for row in rows])
        alarms = sum(describe_cleanse(row) in ("backdoor", "backdoor, right") for row in rows)
        cells[-1] += [first, auroc, f"{entropy:.2f}", str(alarms)]
    return format_table(heads, ["---", *["--:"] * (len(heads) - 1)], cells)


def fit_probability(groups):
    """Fit how likely a backdoor is by a net's score, on the nets that the scan was chosen by.

    Return the two coefficients of a logistic curve in the score's logarithm. The truth is smoothed
    by the number of nets, as J. Platt does (Probabilistic outputs for support vector machines,
    1999), so that a few nets make nobody certain.
    """
    rows = [row for group, rows in groups.items() if is_chosen_by(group) for row in rows]
    truth = np.array([bool(row["targets"]) for row in rows])
    smooth = np.where(truth, (truth.sum() + 1) / (truth.sum() + 2), 1 / ((~truth).sum() + 2))

    def measure(coefficients):
        chances = np.array([predict_chance(row, coefficients) for row in rows])
        return -np.mean(smooth * np.log(chances) + (1 - smooth) * np.log(1 - chances))

    return optimize.minimize(measure, [5.0, 0.0], method="Nelder-Mead").x


def is_chosen_by(group):
    return group == "references" or group.endswith("chosen by")


def predict_chance(row, coefficients):
    """Return how likely a net has a backdoor, by its score: LEAST_PROBABILITY to 1 - that."""
    slope, offset = coefficients
    chance = 1 / (1 + np.exp(-np.clip(slope * np.log(row["score"]) - offset, -30, 30)))
    return np.clip(chance, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)


def measure_entropy(row, coefficients):
    """Return the cross-entropy of the truth about a net; a coin has 0.69 (as in NIST's TrojAI)."""
    chance = predict_chance(row, coefficients)
    return -np.log(chance if row["targets"] else 1 - chance)


def make_tables():
    """Return the tables of the recorded findings, {name in the markers: Markdown}."""
    groups = {group: make_rows(group, nets) for group, nets in list_groups().items()}
    groups = {group: rows for group, rows in groups.items() if rows}
    tables = {"findings, all": make_summary(groups)}
    return tables | {f"findings, {group}": make_table(rows) for group, rows in groups.items()}


# -------------------------------------------------------------------------------------- commands


def train_drawn(names, seeds):
    """Train the nets of drawn faces that do not exist yet. names: of clean_nets.py."""
    commands = [["tests/tools/clean_nets.py", *names]]
    for seed in seeds:
        folder = ROOT / "models" / f"zoo-demo-{seed}"
        options = ["--seed", seed, "--output", folder]
        commands.append(["models/badnet.py", badnet.CLEAN, *ZOO, *options])
    for script, *options in commands:
        subprocess.run([sys.executable, ROOT / script, *map(str, options)], check=True)


def main():
    parser = Parser(
        prog="findings.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--references", action="store_true", help="scan the nets that others are compared with")
    add("--table", action="store_true", help="only write the tables")
    arguments = parser.parse_args()
    make_reproducible(0)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns about many nets
    groups = list_groups()
    if not arguments.table:
        references = {"references": groups.pop("references")}
        if arguments.references:
            train_drawn(clean_nets.list_names(clean_nets.REFERENCES), [CHOSEN_SEED])
        else:
            names = clean_nets.list_names(clean_nets.CHECKS)
            train_drawn(names, [CHOSEN_SEED, REPORTED_SEED])
        scan_groups(references if arguments.references else groups)
    if arguments.references:
        files.write_json({"largest": read_references()}, finding.CLEAN_NETS)
    else:
        write_tables(make_tables(), DOCUMENTS)


def scan_groups(groups):
    """Scan all nets of the groups. Raise InputError where a net is missing."""
    for group, nets in groups.items():
        for net in nets:
            if not net.path.exists():
                raise InputError(f"{net.path}: no such net; train it with photo_nets.py --all")
            record_scan(net, group)


if __name__ == "__main__":
    sys.exit(run_command(main))
