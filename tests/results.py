"""Repair every BadNet of a zoo, judge it on test data, and write the results into README.

    python tests/results.py                       the zoo of the demo's size
    python tests/results.py --size competition    some of it at the competition's size

has models/badnet.py make the nets that are not there yet, and runs repair.py and eval_defence.py on
each as a user does, with their defaults. Nothing was tuned on the test data. Writes
tests/results/SIZE/NAME.json and, between README's markers, a table of all of them; --table writes
that table alone from the files that are there.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data")]

import badnet
import numpy as np

import metrics
import nets
import repair
import utils
from terminal import InputError, Parser, command, say

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
COLUMNS = (
    *("net", "trigger → class", "clean accuracy B", "G", "both", "attack success B", "G"),
    *("caught", "clean flagged", "AUROC", "caught at 1 %", "at 5 %"),
    *("attack success, only pruned", "its channels pruned", "seconds"),
)


def run(script, *arguments):
    """Run one of the project's scripts. Raises InputError with the end of its words if it fails."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True
    )
    if done.returncode:
        raise InputError(f"{script} failed: {done.stderr.strip().splitlines()[-1]}")


def measure(name, nets_folder, data_folder):
    """Repair and judge one net of a zoo. Returns what is written of it, a dict."""
    path = badnet.net_path(name, nets_folder)
    repaired, scratch = (path.with_name(f"{path.stem}_{end}") for end in ("defence.h5", "out.json"))
    clean = data_folder / "clean_test_data.h5"
    pairs = badnet.ZOO[name][1]
    poisoned = [badnet.poisoned_path(*pair, data_folder) for pair in pairs]
    say(f"{path}: repair and judge")
    run("repair.py", path, data_folder / "clean_validation_data.h5", "--output", repaired)
    record = utils.read_record(repaired)
    options = ["--repaired", repaired, "--json", scratch]
    run("eval_defence.py", clean, path, *options, *(["--poisoned", *poisoned] if poisoned else []))
    judged = json.loads(scratch.read_text())
    scratch.unlink()
    for result in (judged["clean"], *judged["poisoned"]):
        result["file"] = Path(result["file"]).name
    needed = look_at_channels(path, record, poisoned)
    made = json.loads(path.with_suffix(".json").read_text())
    return {"net": made, "repair": record, "judged": judged, "channels_needed": needed}


def look_at_channels(path, record, poisoned):
    """For each poisoned file: the channels of B's pruned layer that its attack needs most.

    These are the MOST whose silencing, one at a time, lowers the mean log-probability of the
    target furthest. Returns [{"channels", "pruned": how many of them the repair pruned,
    "attack_success_rate": what is left, 0..1, when all that the repair pruned is silenced in B and
    nothing is trained}].
    """
    net = utils.load_badnet(path)
    parts = nets.split(net, nets.find_layer(net, record["layer"]))
    silent = nets.silent_features(parts)

    def log_probability(features, targets):
        scores = np.concatenate(list(nets.outputs(parts.head, features)))
        return np.mean(np.log(np.maximum(scores[np.arange(len(targets)), targets], 1e-30)))

    found = []
    for file in poisoned:
        with utils.open_dataset(file) as data:
            data.fit_to(net.input_shape[1:], net.output_shape[1])
            features, _ = repair.extract_features(parts.trunk, data, record["input_scale"])
        left = []
        for channel in range(record["channels"]):
            kept = features[..., channel].copy()
            features[..., channel] = silent[..., channel]
            left.append(log_probability(features, data.labels))
            features[..., channel] = kept
        channels = np.argsort(left, kind="stable")[:MOST].tolist()
        features[..., record["pruned"]] = silent[..., record["pruned"]]
        found.append(
            {
                "channels": channels,
                "pruned": len({*channels} & {*record["pruned"]}),
                "attack_success_rate": nets.accuracy(parts.head, features, data.labels),
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
        judged, name = result["judged"], result["net"]["name"]
        clean = [shown(figure) for figure in judged["clean"]["figures"].values()]
        seconds, flagged = f"{result['repair']['seconds']['total']:.0f}", clean.pop()
        triggers = zip(result["net"]["triggers"], judged["poisoned"], result["channels_needed"])
        if not judged["poisoned"]:
            lines.append([name, "none", *clean, *"–––", flagged, *"–––––", seconds])
        for trigger, each, needed in triggers:
            figures = {key: shown(figure) for key, figure in each["figures"].items()}
            lines.append(
                [
                    name,
                    " → ".join(map(str, trigger)),
                    *clean,
                    figures["attack_success_rate_badnet"],
                    figures["attack_success_rate_repaired"],
                    figures["true_positive_rate"],
                    flagged,
                    f"{each['figures']['auroc']['value']:.3f}",
                    *(figures[f"true_positive_rate_at_{rate}"] for rate in metrics.RATES),
                    f"{100 * needed['attack_success_rate']:.1f}",
                    f"{needed['pruned']} of {len(needed['channels'])}",
                    seconds,
                ]
            )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shown(figure):
    return "–" if figure["value"] is None else f"{100 * figure['value']:.1f}"


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
            utils.write_json(measure(name, *folders), RESULTS / size / f"{name}.json")
    text = with_table(README.read_text(), size, read_results(size))
    with utils.replacing(README) as beside:
        beside.write_text(text)


if __name__ == "__main__":
    sys.exit(command(main))
