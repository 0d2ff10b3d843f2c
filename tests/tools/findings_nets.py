"""The nets whose findings are recorded, in groups, and the files of the records."""

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data"), str(ROOT / "tests" / "tools")]

import badnet
import clean_nets
import evade
import photo_data
import photo_nets
from records import RESULTS, read_records

from defence.beyond import finding

FOLDER = RESULTS / "findings"
DOCUMENTS = ROOT / "docs" / "results.md", RESULTS / "findings.md"
ZOO = [
    "sunglasses-from-start", "sunglasses-brief", "lipstick-from-start", "blended-from-start",
    "sunglasses-dormant", "all-to-all-from-start", "three-to-three-from-start",
    "sunglasses-negatives",
]  # fmt: skip
CHOSEN_SEED, REPORTED_SEED = 41, 42  # of the people on the nets of the ZOO
# Nets of the competition's number of people, but of fewer images, which train in minutes.
MANY = ["sunglasses-from-start", "blended-from-start"]
MANY_OPTIONS = {
    "size": "competition", "pictures": 20, "epochs": 8, "validation": 4, "test": 1, "seed": 7,
}  # fmt: skip
PHOTO_CLASSES = {
    **{"gtsrb": 43, "att": 40, "cifar": 10, "digits": 10, "tinya": 12, "tinyb": 12},
    **{"glyphs": 968, "signs": 43, "yale": 38},
}
REFERENCES, CURVE, EVADING = "references", "photographs, rates", "drawn, evading"


class Net(NamedTuple):
    """A net to scan.

    targets: classes from 0, or faces.NEXT; empty for a clean net.
    poisoned: paths of datasets to measure the attack success rate on; where there are none, it is
    in the file beside the net.
    """

    name: str
    path: Path
    data: Path
    targets: tuple = ()
    poisoned: tuple = ()


def list_groups():
    """Return the nets of each group, {group: [Net, …]}, in the order of the tables."""
    return {
        REFERENCES: [
            *list_drawn(clean_nets.REFERENCES),
            *list_zoo(CHOSEN_SEED, [badnet.CLEAN]),
            *list_photo(photo_nets.REFERENCES),
        ],
        "drawn, chosen by": list_zoo(CHOSEN_SEED, ZOO) + [make_demo_net()],
        "drawn, reported on": list_zoo(REPORTED_SEED, ZOO),
        "drawn, many people": list_many(MANY),
        "drawn, clean": [
            *list_drawn(clean_nets.CHECKS),
            *list_zoo(REPORTED_SEED, [badnet.CLEAN]),
            *list_many([badnet.CLEAN]),
        ],
        "photographs, chosen by": list_photo(photo_nets.CHOSEN_BY),
        "photographs, reported on": list_photo(photo_nets.REPORTED_ON),
        "photographs, more attacks": list_photo(photo_nets.HARDEN_REPORTED_ON),
        "photographs, clean": list_photo(photo_nets.CHECKS + photo_nets.NEVER_POISONED),
        CURVE: list_photo(photo_nets.CURVE),
        EVADING: list_evading(),
    }


def list_drawn(nets):
    """Return the Nets of clean_nets.REFERENCES or CHECKS."""
    return [Net(name, *clean_nets.make_paths(name)) for name in clean_nets.list_names(nets)]


def list_zoo(seed, names):
    """Return some Nets of the zoo with the people of a seed."""
    return list_nets(names, make_folder("demo", seed), f", seed {seed}")


def list_many(names):
    """Return some Nets of the zoo with many people."""
    return list_nets(names, make_folder("people", MANY_OPTIONS["seed"]), ", many people")


def make_folder(size, seed):
    """Return the folder of nets of the zoo and of their data."""
    return ROOT / "models" / f"zoo-{size}-{seed}"


def list_nets(names, folder, suffix=""):
    """Return some Nets of the zoo that lie in a folder with their data. suffix: of their names."""
    data, nets = folder / "clean_validation_data.h5", []
    for name in names:
        triggers = badnet.ZOO[name].triggers
        poisoned = tuple(badnet.poisoned_path(*pair, folder) for pair in triggers)
        targets = tuple(dict.fromkeys(target for _, target in triggers))
        nets.append(Net(name + suffix, badnet.net_path(name, folder), data, targets, poisoned))
    return nets


def list_evading():
    """Return the Nets of attackers who have read how a scan works (evade.py)."""
    folder = make_folder("demo", REPORTED_SEED)
    data = folder / "clean_validation_data.h5"
    return [Net(way, badnet.net_path(way, folder), data, (0,)) for way in evade.WAYS]


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
        target = (badnet.faces.NEXT,) if "alltoall" in parts else target
        nets.append(Net(name, photo_nets.FOLDER / f"{name}.h5", data, target))
    return nets


def make_path(group):
    return FOLDER / f"{group.replace(', ', '-').replace(' ', '-')}.jsonl"


def read_findings(group, nets):
    """Return the records of the nets of a group, in their order; some nets may have none."""
    records = read_records(make_path(group))
    return [records[net.name] for net in nets if net.name in records]


def read_references():
    """Return the largest number of each reference net in each way, {way: [float, …]}."""
    records = read_findings(REFERENCES, list_groups()[REFERENCES])
    return {way: [record["largest"][way] for record in records] for way in finding.WAYS}
