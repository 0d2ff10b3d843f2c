"""Scan nets whose truth is known, and record what the scan finds.

    python tests/tools/findings.py --references    defence/beyond/finding.json, from clean nets
    python tests/tools/findings.py                 the findings of other nets
    python tests/tools/findings.py --table         only the tables

The first scans the REFERENCES of clean_nets.py and photo_nets.py, and keeps the largest number of
each in each way; finding.py compares other nets with these. The second scans all other groups.
Half of them served to choose the scan; the others are reported on. Nets of drawn faces are trained
where they are missing; those of photographs take `photo_data.py` and `photo_nets.py --all` first.
Each scanned net has a line in tests/results/findings/ and is not scanned again. The tables go to
tests/results/findings.md and docs/results.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data"), str(ROOT / "tests" / "tools")]

import badnet
import clean_nets
import inversion
import numpy as np
from findings_nets import (
    CHOSEN_SEED,
    DOCUMENTS,
    MANY,
    MANY_OPTIONS,
    REFERENCES,
    REPORTED_SEED,
    ZOO,
    list_evading,
    list_groups,
    make_folder,
    make_path,
    read_references,
)
from findings_tables import make_tables
from records import read_records, write_record, write_tables

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

# -------------------------------------------------------------------------------------- scanning


def scan_net(net):
    """Scan a net. Return what its record keeps, a dict."""
    model = utils.load_badnet(net.path)
    with utils.open_dataset(net.data) as clean:
        clean.fit_to(model.input_shape[1:], model.output_shape[1])
        cached = CachedNet.from_dataset(split_net(model), clean)
        if obstacle := finding.find_obstacle(cached):
            raise InputError(f"{net.path}: no finding can be made: {obstacle}")
        siblings = twins.make_twins(cached, seed=0)
        views = finding.make_views(cached, siblings, seed=0)
    record = {"accuracy": round(cached.accuracy(), 4)} | summarise(views, net.targets)
    record["margins"] = inversion.run_mm_bd(model, cached.scale)
    return record | {"success": measure_success(net, model, cached.scale)}


def measure_success(net, model, scale):
    """Return the attack success rates of a net, [0..1, …]; none where they are not known."""
    rates = []
    for path in net.poisoned:
        with utils.open_dataset(path) as poisoned:
            poisoned.fit_to(model.input_shape[1:], model.output_shape[1])
            hits = [model(x).numpy().argmax(axis=1) == y for x, y in poisoned.batches(scale)]
        rates.append(round(float(np.concatenate(hits).mean()), 4))
    record = net.path.with_suffix(".json")
    if net.targets and not rates and record.exists():
        rates.append(round(json.loads(record.read_text())["attack_success_rate"], 4))
    return rates


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


# -------------------------------------------------------------------------------------- commands


def train_drawn(names, seeds, badnets=True):
    """Train the nets of drawn faces that do not exist yet.

    names: of clean_nets.py.  seeds: of the people on the nets of the zoo.  badnets: also the
    BadNets of the ZOO, the nets of many people, and the evading ones; else only the clean ones.
    """
    commands = [["tests/tools/clean_nets.py", *names]]
    for seed in seeds:
        options = ["--seed", seed, "--output", make_folder("demo", seed)]
        commands.append(["models/badnet.py", badnet.CLEAN, *(ZOO if badnets else []), *options])
    if badnets:
        options = [f"--{option}={value}" for option, value in MANY_OPTIONS.items()]
        folder = make_folder("people", MANY_OPTIONS["seed"])
        commands.append(["models/badnet.py", badnet.CLEAN, *MANY, *options, "--output", folder])
        missing = [net.name for net in list_evading() if not net.path.exists()]
        commands += [["tests/tools/evade.py", way, "--seed", REPORTED_SEED] for way in missing]
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
    groups = list_groups()
    if not arguments.table:
        references = {REFERENCES: groups.pop(REFERENCES)}
        if arguments.references:
            names = clean_nets.list_names(clean_nets.REFERENCES)
            train_drawn(names, [CHOSEN_SEED], badnets=False)
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
