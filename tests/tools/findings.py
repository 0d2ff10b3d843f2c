"""Scan nets whose truth is known, and record what the scan finds.

    python tests/tools/findings.py --references    defence/beyond/finding.json, from clean nets
    python tests/tools/findings.py                 the findings of other nets
    python tests/tools/findings.py --table         only the tables

The first trains the REFERENCES of clean_nets.py and keeps the largest surprise of each; finding.py
compares other nets with these. The second scans, with the validation set alone, other clean nets
and the existing zoos of BadNets: the demo's and the competition's size, which results.py makes, and
the demo's with people not used for tuning, which it makes itself. Each scanned net has a line in
tests/results/findings/ and is not scanned again. With --peers, published methods (inversion.py)
also scan the nets of that last zoo and the clean ones. The tables go to tests/results/findings.md
and docs/results.md.
"""

import argparse
import logging
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data"), str(ROOT / "tests" / "tools")]

import badnet
import clean_nets
import inversion
import numpy as np
from records import RESULTS, format_table, name_class, read_records, write_record, write_tables

import utils
from defence.base import files
from defence.base.arguments import Parser
from defence.base.process import run_command
from defence.base.progress import say
from defence.base.startup import make_reproducible
from defence.beyond import finding, scan
from defence.net.cached_net import CachedNet
from defence.net.split import split_net

SEED = 5  # of the zoo not used for tuning
NEW = f"demo-{SEED}"
# The folders of each zoo's nets and of its data.
ZOOS = {
    NEW: (ROOT / "models" / f"zoo-demo-{SEED}",) * 2,
    "demo": (ROOT / "models" / "zoo-demo", ROOT / "data" / "zoo-demo"),
    "competition": (ROOT / "models" / "zoo-competition", ROOT / "data" / "zoo-competition"),
}
CLEAN = "clean"
FOLDER = RESULTS / "findings"
DOCUMENTS = ROOT / "docs" / "results.md", RESULTS / "findings.md"


# -------------------------------------------------------------------------------------- scanning


def scan_net(path, data, targets, with_peers):
    """Scan a net with a validation set. Return what its record keeps, a dict.

    targets: classes from 0, or faces.NEXT.  with_peers: whether inversion.py scans it too.
    """
    model = utils.load_badnet(path)
    with utils.open_dataset(data) as clean:
        clean.fit_to(model.input_shape[1:], model.output_shape[1])
        cached = CachedNet.from_dataset(split_net(model), clean)
        start = time.monotonic()
        views = scan.count_errors(cached, seed=0)
        record = {"accuracy": cached.accuracy(), "seconds": round(time.monotonic() - start, 1)}
        classes, shifts = (values.round(4) for values in finding.compute_evidence(views))
        record |= rank_targets(classes, shifts, targets)
        if with_peers:
            record["peers"] = inversion.scan(model, clean, cached.scale)
    return record


def rank_targets(classes, shifts, targets):
    """Return the largest surprise, and the rank of each target among all classes and shifts.

    classes, shifts: the evidence, as finding.compute_evidence returns it.  An all-to-all attack has
    the rank of the shift by one.  Ranks count from 1.
    """
    classes, shifts = map(finding.compute_surprise, (classes, shifts))
    surprises = np.concatenate([classes, shifts])
    target_surprises = [
        shifts[0] if target == badnet.faces.NEXT else classes[target]
        for target in dict.fromkeys(targets)
    ]
    ranks = [1 + int(np.sum(surprises > surprise)) for surprise in target_surprises]
    return {"surprise": float(surprises.max()), "ranks": ranks}


def record_scan(name, group, path, data, targets=(), with_peers=False):
    """Scan a net and record the findings, unless its record is of this file.

    group: file of the records in FOLDER, without its ending.
    """
    records, sha256 = FOLDER / f"{group}.jsonl", files.hash_file(path)
    record = read_records(records).get(name)
    if record and record["sha256"] == sha256 and ("peers" in record or not with_peers):
        return
    say(f"{path}: scan")
    findings = scan_net(path, data, targets, with_peers)
    write_record({"name": name, "sha256": sha256} | findings, records)


def read_findings(group, names):
    """Return the records of a group's nets, in the order of `names`; some nets may have none."""
    records = read_records(FOLDER / f"{group}.jsonl")
    return [records[name] for name in names if name in records]


def read_references():
    """Return the largest surprise of each reference net, ascending: [float, …]."""
    records = read_findings("references", clean_nets.list_names(clean_nets.REFERENCES))
    return sorted(round(record["surprise"], 4) for record in records)


# ---------------------------------------------------------------------------------------- tables


def make_zoo_rows(zoo):
    """Return a row for each scanned net of a zoo."""
    targets = {name: [to for _, to in attack.triggers] for name, attack in badnet.ZOO.items()}
    return [make_row(record, targets[record["name"]]) for record in read_findings(zoo, badnet.ZOO)]


def make_row(record, targets):
    """Return a record with what the tables say of it. targets: [class from 0, or faces.NEXT, …]."""
    p_value = finding.compute_p_value(record["surprise"], finding.read_clean())
    return {
        "name": record["name"],
        "targets": list(dict.fromkeys(targets)),
        "alarm": p_value <= finding.LEVEL,
        "p_value": p_value,
        "surprise": record["surprise"],
        "ranks": record["ranks"],
        "seconds": record["seconds"],
        "peers": record.get("peers"),
    }


def list_peers(rows):
    """Return the names of the published methods that scanned some net of these rows."""
    return list(next((row["peers"] for row in rows if row["peers"]), {}))


def make_table(rows):
    """Return the Markdown table of rows."""
    peers = list_peers(rows)
    heads = ["net", "targets", "finding", "p", "surprise", "rank of each target", *peers]
    alignments = ["---", "---", "---", *["--:"] * 3, *["---"] * len(peers)]
    cells = [
        [
            row["name"],
            ", ".join(map(name_class, row["targets"])) or "none",
            "backdoor" if row["alarm"] else "nothing",
            f"{row['p_value']:.3f}",
            f"{row['surprise']:.1f}",
            ", ".join(map(str, row["ranks"])) or "–",
            *(describe_peer(row, peer) for peer in peers),
        ]
        for row in rows
    ]
    return format_table(heads, alignments, cells)


def describe_peer(row, peer):
    """Return a peer's finding as text; of a BadNet also whether it accuses a true target."""
    if not row["peers"]:
        return "–"
    answer = row["peers"][peer]
    if not answer["alarm"]:
        return "nothing"
    if not row["targets"]:
        return "backdoor"
    return f"backdoor, {'right' if answer['class'] in row['targets'] else 'wrong'}"


def make_summary(clean, zoos):
    """Return a Markdown table with a line for each group of nets.

    clean: rows of the clean nets.  zoos: {name: rows}.
    """
    usual, odd = [], []
    for row in clean:
        kind = row["name"].split("-")[0]
        (usual if kind in clean_nets.REFERENCES else odd).append(row)
    groups = {"clean nets": usual, "clean nets with an odd person": odd}
    for zoo, rows in zoos.items():
        groups[f"BadNets, {zoo}"] = [row for row in rows if row["targets"]]
        groups[f"clean nets, {zoo}"] = [row for row in rows if not row["targets"]]
    peers = list_peers(clean)
    heads = ["nets", "alarms", "a true target first", "AUROC", "seconds", *peers]
    cells = [
        [
            f"{len(rows)} {group}",
            *summarise_rows(rows, clean),
            *(count_peer_alarms(rows, peer) for peer in peers),
        ]
        for group, rows in groups.items()
        if rows
    ]
    return format_table(heads, ["---", *["--:"] * (len(heads) - 1)], cells)


def summarise_rows(rows, clean):
    """Return our cells of `make_summary` for nets that all have targets, or all have none.

    The AUROC is the share of pairs of a BadNet and a clean net in which the BadNet surprises more.
    """
    alarms, target_first, auroc = str(sum(row["alarm"] for row in rows)), "–", "–"
    if rows[0]["targets"]:
        target_first = str(sum(min(row["ranks"]) == 1 for row in rows))
        pairs = [row["surprise"] > clean_row["surprise"] for row in rows for clean_row in clean]
        auroc = f"{np.mean(pairs):.3f}"
    return [alarms, target_first, auroc, f"{np.median([row['seconds'] for row in rows]):.0f}"]


def count_peer_alarms(rows, peer):
    """Return a peer's number of alarms as text; of BadNets only those for a true target."""
    if not rows[0]["peers"]:
        return "–"
    findings = [describe_peer(row, peer) for row in rows]
    return str(sum(text in ("backdoor", "backdoor, right") for text in findings))


def make_tables():
    """Return the tables of the recorded findings, {name in the markers: Markdown}."""
    names = clean_nets.list_names(clean_nets.CHECKS)
    clean = [make_row(record, []) for record in read_findings(CLEAN, names)]
    zoos = {zoo: rows for zoo in ZOOS if (rows := make_zoo_rows(zoo))}
    tables = {"findings, all": make_summary(clean, zoos), f"findings, {CLEAN}": make_table(clean)}
    return tables | {f"findings, {zoo}": make_table(rows) for zoo, rows in zoos.items()}


# -------------------------------------------------------------------------------------- commands


def scan_all(with_peers):
    """Scan the clean nets and the nets of the existing zoos."""
    for name in clean_nets.list_names(clean_nets.CHECKS):
        record_scan(name, CLEAN, *clean_nets.make_paths(name), with_peers=with_peers)
    for zoo, (nets, data) in ZOOS.items():
        for name, attack in badnet.ZOO.items():
            path = badnet.net_path(name, nets)
            if path.exists():
                validation = data / "clean_validation_data.h5"
                targets = [target for _, target in attack.triggers]
                record_scan(name, zoo, path, validation, targets, with_peers and zoo == NEW)


def train_nets(*command_line):
    """Run a script that trains nets."""
    subprocess.run([sys.executable, *map(str, command_line)], check=True)


def main():
    parser = Parser(
        prog="findings.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--references", action="store_true", help="scan the nets that others are compared with")
    add("--peers", action="store_true", help="also scan by published methods")
    add("--table", action="store_true", help="only write the tables")
    arguments = parser.parse_args()
    make_reproducible(0)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns about many nets
    if arguments.references:
        names = clean_nets.list_names(clean_nets.REFERENCES)
        train_nets(ROOT / "tests" / "tools" / "clean_nets.py", *names)
        for name in names:
            record_scan(name, "references", *clean_nets.make_paths(name))
        files.write_json({"surprises": read_references()}, finding.CLEAN_NETS)
        return
    if not arguments.table:
        names = clean_nets.list_names(clean_nets.CHECKS)
        train_nets(ROOT / "tests" / "tools" / "clean_nets.py", *names)
        badnet_options = "--all", "--seed", SEED, "--output", ZOOS[NEW][0]
        train_nets(ROOT / "models" / "badnet.py", *badnet_options)
        scan_all(arguments.peers)
    write_tables(make_tables(), DOCUMENTS)


if __name__ == "__main__":
    sys.exit(run_command(main))
