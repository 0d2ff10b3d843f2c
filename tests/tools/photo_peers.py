"""Compare our repair and our detector with published ones, on BadNets of photographs.

    python tests/tools/photo_peers.py gtsrb-vgg-82-glasses-0.05     all methods on a net
    python tests/tools/photo_peers.py --methods FT,ANP NAME …       some methods
    python tests/tools/photo_peers.py --all                         all nets and methods of tables
    python tests/tools/photo_peers.py --table                       only the tables

The nets are those of photo_nets.py. peer_repairs.py and peer_detectors.py say what the methods are.
Each gets the same clean images: nine tenths of the dataset's validation file to learn from, and the
held-out tenth for a detector's threshold. All figures are of the test file. Where a dataset has
none, half of the validation file stands in for it, and the methods get the other half.

Relearning is fine-tuning on a few poisoned images among clean training images. A repaired net that
relearns the backdoor sooner than a net that never had it still hides it. So two more methods are
measured: "B", and "clean", a clean net of photo_nets.py of the same dataset and architecture.

Each net and method has a line in tests/results/peers-photographs.jsonl. It is not measured again,
unless the net or the settings of our methods changed.
The tables go to tests/results/peers-photographs.md, and one to README.md and docs/results.md.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data"), str(ROOT / "tests" / "tools")]

import numpy as np
import photo_data
import photo_lists
import photo_nets
from attacks import as_input
from peer_detectors import DETECTORS, make_pair
from peer_repairs import REPAIRS
from peer_training import compile_gradient, copy_net, read_images
from photo_peers_tables import (
    BADNET,
    CLEAN,
    OURS,
    PAIRED,
    RELEARNED,
    REPORT,
    make_document,
    make_summary,
)
from records import RESULTS, read_records, write_record, write_tables

import utils
from defence.base import files
from defence.base.arguments import Parser
from defence.base.errors import InputError
from defence.base.process import run_command
from defence.base.progress import follow, say
from defence.base.startup import import_keras, make_reproducible
from defence.beyond.settings import Settings
from defence.judge import detector, figures
from defence.load.datasets import hold_out
from defence.net.inference import classify

DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "results.md"]
RECORDS, TABLES = (RESULTS / f"peers-photographs.{end}" for end in ("jsonl", "md"))
METHODS = [BADNET, CLEAN, *REPAIRS, *DETECTORS]
HOLDOUT, RATE = 0.1, 0.01
LIMIT = 1000  # clean and poisoned test images that a detector judges, at even distances
POISONED, BATCH = 16, 64  # in each step of relearning; of the images in the step
MOST_VICTIMS = 200  # training images among which those for relearning are sought
RELEARNING_RATE = 1e-4  # of Adam
REPORTED = "BadNets that served to choose nothing"
GROUPS = {
    "BadNets that were looked at": photo_lists.CHOSEN_BY + photo_lists.HARDEN_CHOSEN_BY,
    REPORTED: photo_lists.HARDEN_REPORTED_ON,
    "Those on which published methods were measured, too": photo_lists.COMPARED,
    "More of them, which err more often": photo_lists.REPORTED_ON,
    "BadNets at rising poison rates": photo_lists.CURVE,
}
STAGES = [  # of --all
    (photo_lists.HARDEN_REPORTED_ON, [BADNET, CLEAN, REPORT, OURS]),
    (photo_lists.CURVE, [BADNET, OURS]),
    (photo_lists.COMPARED, METHODS),
    (photo_lists.HARDEN_CHOSEN_BY, [BADNET, OURS]),
]


class Case:
    """A BadNet, the clean images for every method, and what the figures are measured on.

    clean: Dataset to learn from.  held_out: images.  test: (images, labels).
    poisoned, targets: the test images that the attack is for, and the classes that it wants.
    rates: of B, as measure_net returns them.
    All images are float32, 0..1.
    """

    def __init__(self, name, stack):
        """stack: an ExitStack that closes the dataset."""
        self.recipe, self.path = photo_nets.read_name(name), photo_nets.FOLDER / f"{name}.h5"
        if not self.path.exists():
            raise InputError(f"{self.path}: no such net; train it with photo_nets.py {name}")
        self.net = utils.load_badnet(self.path)
        classes = self.net.output_shape[1]
        data = stack.enter_context(utils.open_dataset(self.find_data("validation")))
        data.fit_to(self.net.input_shape[1:], classes)
        if self.find_data("test").exists():
            pixels, labels = photo_data.read_dataset(self.find_data("test"))
        else:
            data, test = hold_out(data, 0.5, seed=1)
            pixels, labels = test.take(np.ones(len(test), bool)).astype("uint8"), test.labels
        self.clean, held_out = hold_out(data, HOLDOUT, seed=0)
        self.held_out, _ = read_images(held_out)
        self.test = as_input(pixels), labels
        self.poisoned, self.targets = self.poison(pixels, labels)
        self.rates = measure_net(self.net, self)

    def find_data(self, split):
        return photo_data.make_path(self.recipe.dataset, split, photo_data.FOLDER)

    def poison(self, pixels, labels):
        """Return the images that the attack is for, poisoned, float32, 0..1, and their targets.

        pixels: uint8.
        """
        poisoned, targets = photo_nets.poison_unseen(self.path.stem, pixels, labels)
        return as_input(poisoned), targets

    def find_clean_net(self):
        """Return a clean net of the same dataset and architecture, or None where there is none."""
        start = f"{self.recipe.dataset}-{self.recipe.architecture}-"
        for name in photo_lists.CHECKS + photo_lists.NEVER_POISONED:
            if name.startswith(start):
                return utils.load_badnet(photo_nets.FOLDER / f"{name}.h5")
        return None


# -------------------------------------------------------------------------------------- measuring


def measure_net(net, case):
    """Return the clean accuracy of a net and its attack success rate, 0..1."""
    images, labels = case.test
    accuracy = float(np.mean(classify(net, images) == labels))
    return accuracy, float(np.mean(classify(net, case.poisoned) == case.targets))


def measure_repair(net, case):
    """Return the figures of a repaired net: {name: number}."""
    before, after = case.rates, measure_net(net, case)
    names = "clean_accuracy", "attack_success_rate"
    pairs = {
        f"{name}_{kind}": {"value": value}
        for kind, values in (("badnet", before), ("repaired", after))
        for name, value in zip(names, values)
    }
    rating = figures.rate_defense(pairs)["value"]
    return dict(zip(names, after)) | {"defense_effectiveness_rating": rating}


def relearn(net, case):
    """Return a net's attack success rate after so many steps of relearning, {"10": 0..1, …}.

    Each step has the same POISONED images, and other clean ones, of the training images.
    """
    net, rng = copy_net(net), np.random.default_rng(0)
    pixels, labels = photo_data.read_dataset(case.find_data("train"))
    chosen = rng.permutation(len(pixels))[:MOST_VICTIMS]
    poisoned, wanted = (part[:POISONED] for part in case.poison(pixels[chosen], labels[chosen]))
    one_hot = np.eye(net.output_shape[1], dtype=np.float32)
    adam = import_keras().optimizers.Adam(RELEARNING_RATE)
    gradient = compile_gradient(net, net.trainable_variables)
    rates = {}
    for step in range(1, max(RELEARNED) + 1):
        rows = rng.choice(len(pixels), BATCH - POISONED, replace=False)
        x = np.concatenate([poisoned, as_input(pixels[rows])])
        targets = one_hot[np.append(wanted, labels[rows])]
        adam.apply(gradient(x, targets), net.trainable_variables)
        if step in RELEARNED:
            rates[str(step)] = measure_net(net, case)[1]
    return rates


def measure_detector(score, case):
    """Return a detector's figures at RATE: {name: number}. score: of images, float (n,)."""
    held_out = score(case.held_out)
    threshold = figures.choose_threshold(held_out, RATE)
    if threshold is None:  # too few images for the rate
        threshold = held_out.max()
    clean, poisoned, targets = (
        values[np.unique(np.linspace(0, len(values) - 1, LIMIT).astype(int))]
        for values in (case.test[0], case.poisoned, case.targets)
    )
    works = classify(case.net, poisoned) == targets
    clean_scores, poisoned_scores = score(clean), score(poisoned)
    true_threshold = np.quantile(clean_scores, 1 - RATE)
    return {
        "detection_rate": float(np.mean(poisoned_scores[works] > threshold)),
        "false_positive_rate": float(np.mean(clean_scores > threshold)),
        "detection_rate_at_true_rate": float(np.mean(poisoned_scores[works] > true_threshold)),
    }


def measure(method, case):
    """Return a method's figures on a net, {name: number}; none where it does not apply."""
    make_reproducible(0)
    rng, start = np.random.default_rng(0), time.process_time()
    if method in DETECTORS:
        score = DETECTORS[method](case.net, *read_images(case.clean), rng)
        return measure_detector(score, case) if score else {}
    if method in REPAIRS:
        net = REPAIRS[method](case.net, case.clean, rng)
    else:
        net = case.net if method == BADNET else case.find_clean_net()
    if net is None:
        return {}
    record = {"seconds": round(time.process_time() - start, 1)}
    record |= measure_repair(net, case) | {"relearned": relearn(net, case)}
    if method in PAIRED:
        record |= measure_detector(make_pair(case.net, net, hardened=method == OURS), case)
    return record


def describe_settings(method):
    """Return what a record keeps of a method's settings: those of repair.py, which may change."""
    if method not in PAIRED:
        return {}
    hardened = method == OURS
    return {"score": detector.name_score(hardened), **Settings(harden=hardened).to_record()}


def make_record(name, method, case):
    """Measure a method on a net, and say so. Return the record."""
    figures_of_method = measure(method, case)
    say(f"{name}, {method}: {figures_of_method}")
    key = {"name": f"{name} {method}", "net": name, "method": method}
    facts = {"sha256": files.hash_file(case.path), "settings": describe_settings(method)}
    return key | facts | figures_of_method


# -------------------------------------------------------------------------------------- commands


def is_current(record):
    """Return whether a record is of today's settings."""
    return record.get("settings", {}) == describe_settings(record["method"])


def list_missing(names, methods):
    """Return {net: methods without a record of the net and settings as they are}, if any."""
    records, missing = read_records(RECORDS), {}
    for name in names:
        path = photo_nets.FOLDER / f"{name}.h5"
        sha256 = files.hash_file(path) if path.exists() else None
        for method in methods:
            record = records.get(f"{name} {method}", {"method": method})
            if not (sha256 and record.get("sha256") == sha256 and is_current(record)):
                missing.setdefault(name, []).append(method)
    return missing


def measure_missing(missing):
    """Measure methods on nets, and write a record of each. missing: {net: methods}."""
    with follow("methods", sum(map(len, missing.values()))) as advance:
        for name, methods in missing.items():
            with contextlib.ExitStack() as stack:
                case = Case(name, stack)
                for method in methods:
                    write_record(make_record(name, method, case), RECORDS)
                    advance(1)


def main():
    parser = Parser(
        prog="photo_peers.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", metavar="NAME", nargs="*", help="BadNet of photo_nets.py")
    add("--methods", metavar="METHOD,…", default=",".join(METHODS), help="(default: %(default)s)")
    add("--all", action="store_true", help="all nets and methods of the tables, in stages")
    add("--table", action="store_true", help="only write the tables")
    options = parser.parse_args()
    methods = options.methods.split(",")
    for method in methods:
        if method not in METHODS:
            parser.error(f"no method {method}; there are {', '.join(METHODS)}")
    if not (options.names or options.table or options.all):
        parser.error("no net to judge; give a NAME, --all or --table")
    if options.all and (options.names or methods != METHODS):
        parser.error("--all: takes no NAME and no --methods")
    for names, stage_methods in STAGES if options.all else [(options.names, methods)]:
        measure_missing(list_missing(names, stage_methods))
    all_records = read_records(RECORDS).values()
    records = list(filter(is_current, all_records))
    if others := len(all_records) - len(records):
        say(f"{others} records of other settings are left out of the tables")
    with files.replace_file(TABLES) as temporary:
        temporary.write_text(make_document(records, GROUPS))
    write_tables({"photographs": make_summary(records, GROUPS[REPORTED])}, DOCUMENTS)


if __name__ == "__main__":
    sys.exit(run_command(main))
