"""Scan nets whose truth is known, and write down what is found of each.

    python tests/tools/findings.py --references    defence/finding.json, from clean nets
    python tests/tools/findings.py                 what is found of other nets
    python tests/tools/findings.py --table         only the tables of docs/results.md anew

The first trains the REFERENCES of clean_nets.py and keeps the largest surprise of each, which
finding.py compares others with. The second scans, with the validation set alone, other clean nets,
and the zoos of BadNets that are there: the demo's and the competition's size, which results.py
makes, and the demo's with people that nothing was chosen by, which is made here. A net that was
scanned, as tests/results/findings/ tells, is not scanned again. With --peers the nets of that last
zoo and the clean ones are also scanned by methods that others published (inversion.py).
"""

import argparse
import json
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
from results import DOCUMENT, RESULTS, with_tables

import utils
from defence.base import files
from defence.base.arguments import Parser
from defence.base.process import run_command
from defence.base.progress import say
from defence.base.startup import make_reproducible
from defence.beyond import finding, scan
from defence.net.cached_net import CachedNet
from defence.net.split import split_net

SEED = 5  # of the zoo that nothing was chosen by
NEW = f"demo-{SEED}"
# The zoos: where their nets are, and their data.
ZOOS = {
    NEW: (ROOT / "models" / f"zoo-demo-{SEED}",) * 2,
    "demo": (ROOT / "models" / "zoo-demo", ROOT / "data" / "zoo-demo"),
    "competition": (ROOT / "models" / "zoo-competition", ROOT / "data" / "zoo-competition"),
}
CLEAN = "clean"
FOLDER = RESULTS / "findings"


def look(path, data, with_peers):
    """Scan a net with a validation set. Returns what is kept of it, a dict.

    In it "classes" and "shifts" are what finding.evidence gives.
    with_peers: whether the methods of inversion.py are to scan it as well.
    """
    model = utils.load_badnet(path)
    with utils.open_dataset(data) as clean:
        clean.fit_to(model.input_shape[1:], model.output_shape[1])
        cached = CachedNet.from_dataset(split_net(model), clean)
        start = time.monotonic()
        views = scan.count_errors(cached, seed=0)
        found = {"accuracy": cached.accuracy(), "seconds": round(time.monotonic() - start, 1)}
        evidence = [each.round(4).tolist() for each in finding.compute_evidence(views)]
        if with_peers:
            found["peers"] = inversion.scan(model, clean, cached.scale)
    return found | {"classes": evidence[0], "shifts": evidence[1]}


def keep(name, of, path, data, with_peers=False):
    """Scan a net and keep what is found in FOLDER, unless it is there and of this net."""
    result, sha256 = FOLDER / of / f"{name}.json", files.hash_file(path)
    if result.exists():
        found = json.loads(result.read_text())
        if found["sha256"] == sha256 and ("peers" in found or not with_peers):
            return
    say(f"{path}: scan")
    result.parent.mkdir(parents=True, exist_ok=True)
    files.write_json({"name": name, "sha256": sha256} | look(path, data, with_peers), result)


def kept(of, names):
    """What was found of nets, as far as it is there: [dict, …]."""
    paths = [FOLDER / of / f"{name}.json" for name in names]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def surprises(found):
    """The surprises of a net's classes and of its shifts: two arrays, as finding.surprises."""
    return [finding.compute_surprise(np.array(found[of])) for of in ("classes", "shifts")]


def references():
    """The largest surprise of each net that others are compared with, ascending: [float, …]."""
    found = kept("references", clean_nets.names(clean_nets.REFERENCES))
    return sorted(round(float(np.concatenate(surprises(each)).max()), 4) for each in found)


# ---------------------------------------------------------------------------------------- tables


def zoo_rows(of):
    """A `row` for each net of a zoo that was scanned."""
    targets = {name: [each for _, each in attack.triggers] for name, attack in badnet.ZOO.items()}
    return [row(found, targets[found["name"]]) for found in kept(of, badnet.ZOO)]


def row(found, targets):
    """What a table says of a net. targets: [class from 0, or faces.NEXT, …].

    ranks: of each true target, or for an all-to-all attack of the shift by one, among all classes
    and shifts, by surprise, from 1.
    """
    classes, shifts = surprises(found)
    both = np.concatenate([classes, shifts])
    own = [
        shifts[0] if target == badnet.faces.NEXT else classes[target]
        for target in dict.fromkeys(targets)
    ]
    p_value = finding.compute_p_value(both.max(), finding.read_clean())
    return {
        "name": found["name"],
        "targets": list(dict.fromkeys(targets)),
        "alarm": p_value <= finding.LEVEL,
        "p_value": p_value,
        "surprise": both.max(),
        "ranks": [1 + int(np.sum(both > each)) for each in own],
        "seconds": found["seconds"],
        "peers": found.get("peers"),
    }


def table(rows):
    """A Markdown table of `row`s."""
    heads = ["net", "targets", "finding", "p", "surprise", "rank of each target"]
    peers = list(next((each["peers"] for each in rows if each["peers"]), {}))
    lines = [[*heads, *peers], ["---", "---", "---", *["--:"] * 3, *["---"] * len(peers)]]
    for each in rows:
        said = [shown(each["peers"], name, each["targets"]) for name in peers]
        found = "backdoor" if each["alarm"] else "nothing"
        targets = ", ".join(map(str, each["targets"])) or "none"
        ranks = ", ".join(map(str, each["ranks"])) or "–"
        numbers = [f"{each['p_value']:.3f}", f"{each['surprise']:.1f}", ranks]
        lines.append([each["name"], targets, found, *numbers, *said])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shown(peers, name, targets):
    """What a peer says of a net: whether it alarms, and whether its class is a true target."""
    if not peers:
        return "–"
    said = peers[name]
    if not said["alarm"]:
        return "nothing"
    return "backdoor" + (
        "" if not targets else ", right" if said["class"] in targets else ", wrong"
    )


def summary(clean, zoos):
    """A line for each group of nets: how many raise an alarm, how right it is, what peers say.

    AUROC: of pairs of a BadNet and a clean net, where the BadNet surprises more.
    """
    odd = [each for each in clean if each["name"].split("-")[0] not in clean_nets.REFERENCES]
    usual = [each for each in clean if each not in odd]
    groups = {"clean nets": usual, "clean nets with an odd person": odd}
    for of, rows in zoos.items():
        groups[f"BadNets, {of}"] = [each for each in rows if each["targets"]]
        groups[f"clean nets, {of}"] = [each for each in rows if not each["targets"]]
    peers = list(next((each["peers"] for each in clean if each["peers"]), {}))
    heads = ["nets", "alarms", "a true target first", "AUROC", "seconds", *peers]
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)]]
    for of, rows in groups.items():
        if rows:
            said = [alarms_of(peer, rows) for peer in peers]
            lines.append([f"{len(rows)} {of}", *figures(rows, clean), *said])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figures(rows, clean):
    """The cells of `summary` that are ours, of nets that all have targets, or none."""
    alarms, first, area = str(sum(each["alarm"] for each in rows)), "–", "–"
    if rows[0]["targets"]:
        first = str(sum(min(each["ranks"]) == 1 for each in rows))
        pairs = [each["surprise"] > other["surprise"] for each in rows for other in clean]
        area = f"{np.mean(pairs):.3f}"
    return [alarms, first, area, f"{np.median([each['seconds'] for each in rows]):.0f}"]


def alarms_of(peer, rows):
    """How many alarms a peer raises, those for a true target where nets have any."""
    if not rows[0]["peers"]:
        return "–"
    said = [shown(each["peers"], peer, each["targets"]) for each in rows]
    return str(sum(each in ("backdoor", "backdoor, right") for each in said))


def tables():
    """The tables of docs/results.md, {name: Markdown}, from what was found."""
    clean = [row(found, []) for found in kept(CLEAN, clean_nets.names(clean_nets.CHECKS))]
    zoos = {of: rows for of in ZOOS if (rows := zoo_rows(of))}
    made = {"findings, all": summary(clean, zoos), f"findings, {CLEAN}": table(clean)}
    return made | {f"findings, {of}": table(rows) for of, rows in zoos.items()}


# ------------------------------------------------------------------------------------ all of it


def scan_all(with_peers):
    """Scan the clean nets and the zoos that are there."""
    for name in clean_nets.names(clean_nets.CHECKS):
        keep(name, CLEAN, *clean_nets.paths(name), with_peers)
    for of, (nets, data) in ZOOS.items():
        for name in badnet.ZOO:
            path = badnet.net_path(name, nets)
            if path.exists():
                validation = data / "clean_validation_data.h5"
                keep(name, of, path, validation, with_peers and of == NEW)


def make_nets(*command_line):
    subprocess.run([sys.executable, *map(str, command_line)], check=True)


def main():
    parser = Parser(
        prog="findings.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--references",
        action="store_true",
        help="scan the clean nets that others are compared with",
    )
    add("--peers", action="store_true", help="also by methods that others published")
    add("--table", action="store_true", help="only make the tables anew")
    arguments = parser.parse_args()
    make_reproducible(0)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns that there are many nets
    if arguments.references:
        nets = clean_nets.names(clean_nets.REFERENCES)
        make_nets(ROOT / "tests" / "tools" / "clean_nets.py", *nets)
        for name in nets:
            keep(name, "references", *clean_nets.paths(name))
        files.write_json({"surprises": references()}, finding.CLEAN_NETS)
        return
    if not arguments.table:
        nets = clean_nets.names(clean_nets.CHECKS)
        make_nets(ROOT / "tests" / "tools" / "clean_nets.py", *nets)
        make_nets(ROOT / "models" / "badnet.py", "--all", "--seed", SEED, "--output", ZOOS[NEW][0])
        scan_all(arguments.peers)
    text = with_tables(DOCUMENT.read_text(), tables())
    with files.replace_file(DOCUMENT) as beside:
        beside.write_text(text)


if __name__ == "__main__":
    sys.exit(run_command(main))
