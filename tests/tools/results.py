"""Repair every BadNet of a zoo, judge it on test data, record the results and draw them.

    python tests/tools/results.py                       the zoo of the demo's size
    python tests/tools/results.py --size competition    some of it at the competition's size

First models/badnet.py makes the missing nets. Then repair.py and eval_defence.py run on each net as
a user runs them: with their defaults, and hardened, with a threshold from held-out images. A net's
results are a line of tests/results/SIZE.jsonl. A net whose line is of this file and of today's
settings is not measured again. From the lines of both sizes, it makes

    tests/results/tables-SIZE.md               the tables of a size, between their markers
    docs/results.md                            a small table, between its markers
    tests/results/results.csv                  a row for each net and trigger, with 95 % intervals
    img/results.png                            attack success rates of B, of G, and of G hardened

--table makes only these.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data")]

import attacks
import badnet
import numpy as np
from records import RESULTS, read_records, write_record, write_tables
from results_plot import draw
from results_tables import make_rows, make_tables, round_figure

import utils
from defence.base import files
from defence.base.arguments import Parser
from defence.base.errors import InputError
from defence.base.process import run_command
from defence.base.progress import say
from defence.beyond.settings import Settings
from defence.judge import detector
from defence.net.cached_net import extract_features
from defence.net.inference import classify, predict
from defence.net.split import compute_masked_features, split_net

CSV, FIGURE = RESULTS / "results.csv", ROOT / "img" / "results.png"
NEEDED = 10  # channels that an attack needs most
SIZES = {
    "demo": list(badnet.ZOO),
    "competition": [
        *("clean", "patterns-from-start", "objects-from-start", "adaptive-blend"),
        *("sunglasses-negatives", "adaptive-patch", attacks.OPTIMISED),
    ],
}
DOCUMENTS = [
    ROOT / "docs" / "results.md",
    *(RESULTS / f"tables-{size}.md" for size in SIZES),
]
# Fraction of clean images to flag; --holdout 0.1 keeps enough images for it.
RATES = {"demo": 0.05, "competition": 0.01}
HARDEN = ("--harden", "--holdout", "0.1")

# What a record keeps of a repair's record.
REPAIR_KEYS = (
    *("tool_version", "libraries", "badnet", "data", "settings", "input_scale"),
    *("layer", "channels", "pruned", "accuracy", "moved", "seconds"),
)


def run_script(script, *arguments):
    """Run a script of the project. Raise InputError with its last line if it fails."""
    process = subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True
    )
    if process.returncode:
        raise InputError(f"{script} failed: {process.stderr.strip().splitlines()[-1]}")


# ------------------------------------------------------------------------------------- measuring


def measure(name, nets_folder, data_folder, rate):
    """Repair and judge a net of a zoo, both ways. Return its record, a dict.

    rate: fraction of clean images to flag, for the threshold of the hardened net.
    """
    path = badnet.net_path(name, nets_folder)
    pairs = badnet.ZOO[name][1]
    poisoned = [badnet.poisoned_path(*pair, data_folder) for pair in pairs]
    say(f"{path}: repair and judge")
    report = repair_and_judge(path, "defence", data_folder, poisoned, [], [])
    hardened = repair_and_judge(path, "hardened", data_folder, poisoned, HARDEN, ["--fpr", rate])
    return {
        "name": name,
        "score": detector.name_score(hardened=True),
        "net": json.loads(path.with_suffix(".json").read_text()),
        "report": report,
        "harden": hardened,
        "channels_needed": find_needed_channels(path, report["repair"], poisoned),
    }


def is_current(record, net):
    """Return whether a record is of this net's file, with today's settings and anomaly score.

    record: dict, or None where there is none.  net: Path.
    """
    if record is None:
        return False
    repair = record["harden"]["repair"]
    settings = Settings(harden=True, holdout=float(HARDEN[-1])).to_record()
    same_score = record.get("score") == detector.name_score(hardened=True)
    same_net = repair["badnet"]["sha256"] == files.hash_file(net)
    return same_score and same_net and repair["settings"] == settings


def repair_and_judge(path, word, data_folder, poisoned, repair_options, judging_options):
    """Run both commands with these options. Return {"repair": its record, "judged"}, shortened.

    word: ending of the repaired net's name.
    """
    repaired = path.with_name(f"{path.stem}_{word}.h5")
    validation, test = (data_folder / f"clean_{part}_data.h5" for part in ("validation", "test"))
    judging_options = [*judging_options, "--poisoned", *poisoned] if poisoned else judging_options
    with files.make_private_folder(path.parent) as scratch:
        outputs = scratch / "repair.json", scratch / "judging.json"
        options = "--output", repaired, "--json", outputs[0], *repair_options
        run_script("repair.py", path, validation, *options)
        options = "--repaired", repaired, "--json", outputs[1], *judging_options
        run_script("eval_defence.py", test, path, *options)
        repair, judged = (json.loads(output.read_text()) for output in outputs)
    return {"repair": shorten_repair(repair), "judged": shorten_judged(judged)}


def shorten_repair(repair):
    """Return a repair's record without its long lists, and with a brief finding."""
    short = {key: repair[key] for key in REPAIR_KEYS}
    short["accuracy"] = {
        step: value for step, value in repair["accuracy"].items() if not isinstance(value, list)
    }
    if repair.get("finding"):
        finding = repair["finding"]
        short["finding"] = {key: finding[key] for key in ("finding", "p_value", "targets")}
    return short


def shorten_judged(judged):
    """Return eval_defence.py's record without paths and counts, rounded to six decimals."""
    ends = ("value", "low", "high")

    def shorten(dataset):
        shown = {
            name: {end: round_figure(figure, end) for end in ends if end in figure}
            for name, figure in dataset["figures"].items()
        }
        return {
            "file": Path(dataset["file"]).name,
            "images": dataset["images"],
            "figures": shown,
        }

    return {
        "threshold": judged["threshold"],
        "clean": shorten(judged["clean"]),
        "poisoned": [shorten(dataset) for dataset in judged["poisoned"]],
    }


def find_needed_channels(path, repair, poisoned):
    """Find the channels of B's pruned layer that each attack needs most.

    These are the NEEDED channels whose masking, one at a time, lowers the mean log-probability of
    the target most. Return, for each file of `poisoned`, {"channels", "pruned": how many of them
    the repair pruned, "attack_success_rate": 0..1, of B with all pruned channels masked and nothing
    trained}.
    """
    net = utils.load_badnet(path)
    parts = split_net(net, repair["layer"])
    masked = compute_masked_features(parts)

    def compute_log_probability(features, targets):
        scores = np.concatenate(list(predict(parts.head, features)))
        return np.mean(np.log(np.maximum(scores[np.arange(len(targets)), targets], 1e-30)))

    attacks_needs = []
    for file in poisoned:
        with utils.open_dataset(file) as data:
            data.fit_to(net.input_shape[1:], net.output_shape[1])
            features, _ = extract_features(parts, data, repair["input_scale"])
        log_probabilities = []
        for channel in range(repair["channels"]):
            values = features[..., channel].copy()
            features[..., channel] = masked[..., channel]
            log_probabilities.append(compute_log_probability(features, data.labels))
            features[..., channel] = values
        channels = np.argsort(log_probabilities, kind="stable")[:NEEDED].tolist()
        features[..., repair["pruned"]] = masked[..., repair["pruned"]]
        classes = classify(parts.head, features)
        attacks_needs.append(
            {
                "channels": channels,
                "pruned": len({*channels} & {*repair["pruned"]}),
                "attack_success_rate": float(np.mean(classes == data.labels)),
            }
        )
    return attacks_needs


# -------------------------------------------------------------------------------------- commands


def read_results(size):
    """Return the records of a size, in the order of the zoo."""
    records = read_records(RESULTS / f"{size}.jsonl")
    return [records[name] for name in badnet.ZOO if name in records]


def write_all():
    """Write the tables, the CSV and the figure of the recorded results."""
    rows = {size: make_rows(size, read_results(size)) for size in SIZES}
    write_tables(make_tables(rows, RATES), DOCUMENTS)
    files.write_csv((row for size in SIZES for row in rows[size]), CSV)
    draw(rows, FIGURE)


def main():
    parser = Parser(
        prog="results.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="demo", help="of the zoo (default: demo)")
    parser.add_argument("--table", action="store_true", help="only write tables, CSV and figure")
    arguments = parser.parse_args()
    size, path = arguments.size, RESULTS / f"{arguments.size}.jsonl"
    folders = [ROOT / kind / f"zoo-{size}" for kind in ("models", "data")]
    if not arguments.table:
        # The attacker who optimises a trigger does so on the hardened G of another net.
        surrogate = folders[0] / "clean_bd_net_hardened.h5"
        names = [name for name in SIZES[size] if name != attacks.OPTIMISED]
        for group, *options in ([names], [[attacks.OPTIMISED], "--surrogate", surrogate]):
            command = [ROOT / "models" / "badnet.py", "--size", size, *group, *options]
            if subprocess.run([sys.executable, *command]).returncode:
                return 1
            for name in group:
                net = badnet.net_path(name, folders[0])
                if not is_current(read_records(path).get(name), net):
                    write_record(measure(name, *folders, RATES[size]), path)
    write_all()


if __name__ == "__main__":
    sys.exit(run_command(main))
