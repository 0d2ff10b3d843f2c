"""Repair every BadNet of a zoo, judge it on test data, and write the results into README.

    python tests/tools/results.py                       the zoo of the demo's size
    python tests/tools/results.py --size competition    some of it at the competition's size

has models/badnet.py make the nets that are not there yet, and runs repair.py and eval_defence.py on
each as a user does: with their defaults, and hardened, with a threshold from held-out images.
Writes tests/results/SIZE/NAME.json and, between README's markers, a table of all of them; --table
writes that table alone from the files that are there.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data")]

import badnet
import numpy as np

import utils
from defence import cached_net, files
from defence.cli import InputError, Parser, command, say
from defence.inference import classify, predict
from defence.net import find_layer, masked_features, split

RESULTS = ROOT / "tests" / "results"
README = ROOT / "README.md"
MOST = 10  # the channels that an attack needs most
SIZES = {
    "demo": list(badnet.ZOO),
    "competition": [
        *("clean", "sunglasses-brief", "sunglasses-from-start"),
        *("three-to-one-brief", "lipstick-from-start"),
    ],
}
# The share of clean images to flag, of which --holdout 0.1 leaves enough.
RATES = {"demo": 0.05, "competition": 0.01}
HARDEN = ("--harden", "--holdout", "0.1")
OF_METHOD = ("attack success", "caught", "clean flagged", "AUROC", "caught at 1 %", "seconds")
COLUMNS = (
    *("net", "trigger → class", "clean accuracy B", "attack success B"),
    *("report: clean accuracy G", *OF_METHOD),
    *("attack success, only pruned", "its channels pruned"),
    *("--harden: clean accuracy G", *OF_METHOD),
)


def run(script, *arguments):
    """Run one of the project's scripts. Raises InputError with the end of its words if it fails."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True
    )
    if done.returncode:
        raise InputError(f"{script} failed: {done.stderr.strip().splitlines()[-1]}")


def measure(name, nets_folder, data_folder, rate):
    """Repair and judge one net of a zoo, both ways. Returns what is written of it, a dict.

    rate: of clean images to flag, for the threshold of the hardened net.
    """
    path = badnet.net_path(name, nets_folder)
    pairs = badnet.ZOO[name][1]
    poisoned = [badnet.poisoned_path(*pair, data_folder) for pair in pairs]
    say(f"{path}: repair and judge")
    found = {
        "net": json.loads(path.with_suffix(".json").read_text()),
        "report": repair_and_judge(path, "defence", data_folder, poisoned, [], []),
        "harden": repair_and_judge(
            path, "hardened", data_folder, poisoned, HARDEN, ["--fpr", rate]
        ),
    }
    return found | {"channels_needed": look_at_channels(path, found["report"]["repair"], poisoned)}


def repair_and_judge(path, word, data_folder, poisoned, to_repair, to_judge):
    """Run both commands, with these options. Returns {"repair": the record, "judged"}.

    word: ends the name of the repaired net.
    """
    repaired = path.with_name(f"{path.stem}_{word}.h5")
    validation, test = (data_folder / f"clean_{part}_data.h5" for part in ("validation", "test"))
    with files.private_folder(path.parent) as scratch:
        of_repair, of_judging = scratch / "repair.json", scratch / "judging.json"
        run("repair.py", path, validation, "--output", repaired, "--json", of_repair, *to_repair)
        options = ["--repaired", repaired, "--json", of_judging, *to_judge]
        run(
            "eval_defence.py",
            test,
            path,
            *options,
            *(["--poisoned", *poisoned] if poisoned else []),
        )
        record, judged = (json.loads(each.read_text()) for each in (of_repair, of_judging))
    for result in (judged["clean"], *judged["poisoned"]):
        result["file"] = Path(result["file"]).name
    if record["holdout"]:
        del record["holdout"]["scores"]  # many; the threshold that was used is in `judged`
    return {"repair": record, "judged": judged}


def look_at_channels(path, record, poisoned):
    """For each poisoned file: the channels of B's pruned layer that its attack needs most.

    These are the MOST whose silencing, one at a time, lowers the mean log-probability of the
    target furthest. Returns [{"channels", "pruned": how many of them the repair pruned,
    "attack_success_rate": what is left, 0..1, when all that the repair pruned is silenced in B and
    nothing is trained}].
    """
    net = utils.load_badnet(path)
    parts = split(net, find_layer(net, record["layer"]))
    silent = masked_features(parts)

    def log_probability(features, targets):
        scores = np.concatenate(list(predict(parts.head, features)))
        return np.mean(np.log(np.maximum(scores[np.arange(len(targets)), targets], 1e-30)))

    found = []
    for file in poisoned:
        with utils.open_dataset(file) as data:
            data.fit_to(net.input_shape[1:], net.output_shape[1])
            features, _ = cached_net.extract(parts, data, record["input_scale"])
        left = []
        for channel in range(record["channels"]):
            kept = features[..., channel].copy()
            features[..., channel] = silent[..., channel]
            left.append(log_probability(features, data.labels))
            features[..., channel] = kept
        channels = np.argsort(left, kind="stable")[:MOST].tolist()
        features[..., record["pruned"]] = silent[..., record["pruned"]]
        classes = classify(parts.head, features)
        found.append(
            {
                "channels": channels,
                "pruned": len({*channels} & {*record["pruned"]}),
                "attack_success_rate": float(np.mean(classes == data.labels)),
            }
        )
    return found


def read_results(size):
    """The results of a size that are there, in the order of the zoo: a list of dicts."""
    paths = [RESULTS / size / f"{name}.json" for name in badnet.ZOO]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def table(results):
    """The Markdown table of some results: a row for each net and trigger; shares in %."""
    lines = [COLUMNS, ["---"] * 2 + ["--:"] * (len(COLUMNS) - 2)]
    for result in results:
        for place, trigger in enumerate(result["net"]["triggers"] or [None]):
            clean, attack = figures(result["report"], place)
            needed = ["–", "–"]
            if trigger:
                channels = result["channels_needed"][place]
                left = f"{100 * channels['attack_success_rate']:.1f}"
                needed = [left, f"{channels['pruned']} of {len(channels['channels'])}"]
            lines.append(
                [
                    result["net"]["name"],
                    " → ".join(map(str, trigger or ["none"])),
                    shown(clean["clean_accuracy_badnet"]),
                    shown(attack.get("attack_success_rate_badnet")),
                    *cells(result["report"], place),
                    *needed,
                    *cells(result["harden"], place),
                ]
            )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figures(method, place):
    """The figures of a method on clean images, and on the poisoned ones at a place, {} if none."""
    judged = method["judged"]
    return [
        judged["clean"]["figures"],
        judged["poisoned"][place]["figures"] if judged["poisoned"] else {},
    ]


def cells(method, place):
    """Clean accuracy of G, and what OF_METHOD names, of a net's poisoned images at a place."""
    clean, attack = figures(method, place)
    return [
        shown(clean["clean_accuracy_repaired"]),
        shown(attack.get("attack_success_rate_repaired")),
        shown(attack.get("detection_rate")),
        shown(clean["false_positive_rate"]),
        f"{attack['auroc']['value']:.3f}" if attack else "–",
        shown(attack.get("detection_rate_at_0.01")),
        f"{method['repair']['seconds']['total']:.0f}",
    ]


def shown(figure):
    return "–" if figure is None or figure["value"] is None else f"{100 * figure['value']:.1f}"


def with_table(text, size, results):
    """A README's text with the table of a size between its markers."""
    start, end = f"<!-- results: {size} -->\n", f"<!-- end of results: {size} -->"
    before, rest = text.split(start)
    return f"{before}{start}{table(results)}\n{end}{rest.split(end)[1]}"


def main():
    parser = Parser(
        prog="results.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="demo", help="of the zoo (default: demo)")
    parser.add_argument("--table", action="store_true", help="only write the table anew")
    options = parser.parse_args()
    size = options.size
    folders = [ROOT / kind / f"zoo-{size}" for kind in ("models", "data")]
    (RESULTS / size).mkdir(parents=True, exist_ok=True)
    if not options.table:
        make = [sys.executable, ROOT / "models" / "badnet.py", "--size", size, *SIZES[size]]
        if subprocess.run(make).returncode:
            return 1
        for name in SIZES[size]:
            files.write_json(measure(name, *folders, RATES[size]), RESULTS / size / f"{name}.json")
    text = with_table(README.read_text(), size, read_results(size))
    with files.replacing(README) as beside:
        beside.write_text(text)


if __name__ == "__main__":
    sys.exit(command(main))
