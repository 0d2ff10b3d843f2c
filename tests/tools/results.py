"""Repair every BadNet of a zoo, judge it on test data, and write down and draw the results.

    python tests/tools/results.py                       the zoo of the demo's size
    python tests/tools/results.py --size competition    some of it at the competition's size

has models/badnet.py make the nets that are not there yet, and runs repair.py and eval_defence.py on
each as a user does: with their defaults, and hardened, with a threshold from held-out images.
Writes tests/results/SIZE/NAME.json, unless it is there and of this net and today's settings. From
all such files, of both sizes, it makes

    docs/results.md              the tables between its markers
    README.md                    a small table, where it has the markers of one
    tests/results/results.csv    a row for each net and trigger, with 95 % intervals
    img/results.png              attack success of B, after the report's steps, and hardened

and --table makes these four alone.
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
from results_plot import attack, draw

import utils
from defence.base import files
from defence.base.arguments import Parser
from defence.base.errors import InputError
from defence.base.process import run_command
from defence.base.progress import say
from defence.beyond.settings import Settings
from defence.judge import figures
from defence.net.cached_net import extract_features
from defence.net.inference import classify, predict
from defence.net.split import compute_masked_features, split_net

RESULTS = ROOT / "tests" / "results"
DOCUMENT, README = ROOT / "docs" / "results.md", ROOT / "README.md"
CSV, PICTURE = RESULTS / "results.csv", ROOT / "img" / "results.png"
MOST = 10  # the channels that an attack needs most
SIZES = {
    "demo": list(badnet.ZOO),
    "competition": [
        *("clean", "patterns-from-start", "objects-from-start", "adaptive-blend"),
        *("sunglasses-negatives", "adaptive-patch", attacks.OPTIMISED),
    ],
}
# The fraction of clean images to flag, of which --holdout 0.1 leaves enough.
RATES = {"demo": 0.05, "competition": 0.01}
HARDEN = ("--harden", "--holdout", "0.1")

# What eval_defence.py says of B and of each G; what is ALONE is written without its 95 % interval.
OF_B = ("clean_accuracy_badnet", "attack_success_rate_badnet")
OF_G = (
    *("clean_accuracy_repaired", "clean_accuracy_together", "false_positive_rate"),
    *("attack_success_rate_repaired", "detection_rate", "detection_rate_of_successes"),
    "robust_accuracy",
)
ALONE = (
    "detection_rate_at_0.01",
    "detection_rate_at_0.05",
    "auroc",
    "defense_effectiveness_rating",
)
# For each table its columns behind net and trigger: a heading, and the column of results.csv.
WORKS = "caught, where the attack works: "
AT_1 = "caught where 1 % of clean test images are flagged"
TABLES = {
    "report": {
        "clean accuracy of B": "clean_accuracy_badnet",
        "clean accuracy of G": "report_clean_accuracy_repaired",
        "ASR of B": "attack_success_rate_badnet",
        "ASR of G": "report_attack_success_rate_repaired",
        WORKS + "B and G disagree": "report_detection_rate_of_successes",
        "clean flagged: B and G disagree": "report_false_positive_rate",
    },
    "hardened": {
        "clean accuracy of G": "hardened_clean_accuracy_repaired",
        "ASR of G": "hardened_attack_success_rate_repaired",
        WORKS + "score > threshold of --fpr {rate}": "hardened_detection_rate_of_successes",
        "clean flagged: score > that threshold": "hardened_false_positive_rate",
        AT_1: "hardened_detection_rate_at_0.01",
        "seconds of repair.py": "hardened_repair_seconds",
    },
    "why": {
        "ASR of B": "attack_success_rate_badnet",
        "ASR of B when pruned, nothing trained": "attack_success_rate_pruned",
        "channels pruned": "report_channels_pruned",
        "pruned of the ten that the attack needs most": "needed_channels_pruned",
        "AUROC of the anomaly score": "report_auroc",
        AT_1: "report_detection_rate_at_0.01",
    },
}
SUMMARY = {
    "ASR of B": "attack_success_rate_badnet",
    "ASR of G (report)": "report_attack_success_rate_repaired",
    "caught (report: B and G disagree)": "report_detection_rate_of_successes",
    "ASR of G (--harden)": "hardened_attack_success_rate_repaired",
    "caught (--harden, --fpr {rate})": "hardened_detection_rate_of_successes",
    "clean flagged (--fpr {rate})": "hardened_false_positive_rate",
}


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


def is_current(result, net):
    """Whether a result is there and is of this net, hardened with today's settings. Paths."""
    if not result.exists():
        return False
    record = json.loads(result.read_text())["harden"]["repair"]
    settings = Settings(harden=True, holdout=float(HARDEN[-1])).to_record()
    return record["badnet"]["sha256"] == files.hash_file(net) and record["settings"] == settings


def repair_and_judge(path, word, data_folder, poisoned, to_repair, to_judge):
    """Run both commands, with these options. Returns {"repair": the record, "judged"}.

    word: ends the name of the repaired net.
    """
    repaired = path.with_name(f"{path.stem}_{word}.h5")
    validation, test = (data_folder / f"clean_{part}_data.h5" for part in ("validation", "test"))
    with files.make_private_folder(path.parent) as scratch:
        of_repair, of_judging = scratch / "repair.json", scratch / "judging.json"
        run("repair.py", path, validation, "--output", repaired, "--json", of_repair, *to_repair)
        to_judge = ["--repaired", repaired, "--json", of_judging, *to_judge]
        to_judge += ["--poisoned", *poisoned] if poisoned else []
        run("eval_defence.py", test, path, *to_judge)
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
    parts = split_net(net, record["layer"])
    silent = compute_masked_features(parts)

    def log_probability(features, targets):
        scores = np.concatenate(list(predict(parts.head, features)))
        return np.mean(np.log(np.maximum(scores[np.arange(len(targets)), targets], 1e-30)))

    found = []
    for file in poisoned:
        with utils.open_dataset(file) as data:
            data.fit_to(net.input_shape[1:], net.output_shape[1])
            features, _ = extract_features(parts, data, record["input_scale"])
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


def flat(size, results):
    """A `row` for each net and trigger of some results of a size: a list."""
    return [
        row(size, result, place)
        for result in results
        for place in range(max(1, len(result["net"]["triggers"])))
    ]


def row(size, result, place):
    """A row of results.csv, of a net and its trigger at a place: {column: text, number or None}.

    Rates and the ends of their intervals are 0..1. What a clean net has not is None.
    """
    net, report = result["net"], result["report"]
    trigger, target = net["triggers"][place] if net["triggers"] else (None, None)
    columns = {"size": size, "net": net["name"], "trigger": trigger, "class": target}
    columns |= {"people": net["people"], "validation_images": net["people"] * net["validation"]}
    columns |= {"clean_images": report["judged"]["clean"]["images"], "poisoned_images": None}
    needed, left = {}, None
    if trigger:
        columns["poisoned_images"] = images = report["judged"]["poisoned"][place]["images"]
        needed = result["channels_needed"][place]
        hits = round(needed["attack_success_rate"] * images)
        left = figures.estimate_proportion(np.arange(images) < hits)
    for name in OF_B:
        columns |= with_interval(name, said(report, place).get(name))
    columns |= with_interval("attack_success_rate_pruned", left)
    columns |= {"needed_channels_pruned": needed.get("pruned")}
    columns |= {"channels": report["repair"]["channels"]}
    columns |= of_method("report", report, place)
    return columns | of_method("hardened", result["harden"], place)


def said(method, place):
    """What eval_defence.py said of a method: {figure: {"value", …}}."""
    judged = method["judged"]
    poisoned = judged["poisoned"][place]["figures"] if judged["poisoned"] else {}
    return judged["clean"]["figures"] | poisoned


def of_method(word, method, place):
    """The columns of a method, which begin with a word, on the poisoned images at a place."""
    found, repair = said(method, place), method["repair"]
    columns = {
        "threshold": method["judged"]["threshold"],
        "channels_pruned": len(repair["pruned"]),
        "repair_seconds": repair["seconds"]["total"],
    }
    for name in OF_G:
        columns |= with_interval(name, found.get(name))
    columns |= {name: rounded(found.get(name), "value") for name in ALONE}
    return {f"{word}_{name}": value for name, value in columns.items()}


def with_interval(name, figure):
    ends = {"": "value", "_low": "low", "_high": "high"}
    return {name + end: rounded(figure, key) for end, key in ends.items()}


def rounded(figure, key):
    value = figure and figure[key]
    return None if value is None else round(value, 6)


def table(rows, columns, rate):
    """The Markdown table of `row`s.

    columns: {heading: column}, as in TABLES.  rate: of clean images, that --fpr was given, 0..1.
    """
    heads = [heading.format(rate=rate) for heading in columns]
    lines = [["net", "trigger → class", *heads], ["---", "---", *["--:"] * len(columns)]]
    for each in rows:
        cells = [shown(each, column) for column in columns.values()]
        lines.append([each["net"], attack(each), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shown(row, column):
    """A value of a `row` as text: counts, seconds and AUROC as they are, all else in %."""
    value = row[column]
    if value is None:
        return "–"
    if column == "report_channels_pruned":
        return f"{value:.0f} of {row['channels']}"
    if column.endswith(("channels_pruned", "seconds")):
        return f"{value:.0f}"
    return f"{value:.3f}" if column.endswith("auroc") else f"{100 * value:.1f}"


def tables(rows):
    """All tables, Markdown, by the names in their markers: {docs/results.md's}, {README's}."""
    of_document = {
        f"{size}, {name}": table(rows[size], columns, RATES[size])
        for size in SIZES
        for name, columns in TABLES.items()
    }
    hardest = hardest_rows(rows["competition"])
    return of_document, {"summary": table(hardest, SUMMARY, RATES["competition"])}


def hardest_rows(rows):
    """Of each net the `row` of the trigger that is caught least when it is hardened."""
    nets = {}
    for each in rows:
        nets.setdefault(each["net"], []).append(each)
    caught = "hardened_detection_rate_of_successes"
    return [min(some, key=lambda row: row[caught] or 0) for some in nets.values()]


def with_tables(text, made, optional=False):
    """A document's text with tables, {name: Markdown}, between the markers of these names.

    Raises InputError where the text has not the markers, unless they are optional.
    """
    for name, lines in made.items():
        start, end = f"<!-- results: {name} -->\n", f"<!-- end of results: {name} -->"
        if start in text and end in text:
            before, rest = text.split(start)
            text = f"{before}{start}{lines}\n{end}{rest.split(end)[1]}"
        elif not optional:
            raise InputError(f"no place for a table: {start.strip()} … {end}")
    return text


def write_all():
    """Make the tables, the CSV and the figure of the results that are there."""
    rows = {size: flat(size, read_results(size)) for size in SIZES}
    for path, made in zip((DOCUMENT, README), tables(rows)):
        text = with_tables(path.read_text(), made, optional=path == README)
        with files.replace_file(path) as beside:
            beside.write_text(text)
    files.write_csv((each for some in rows.values() for each in some), CSV)
    draw(rows, PICTURE)


def main():
    parser = Parser(
        prog="results.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="demo", help="of the zoo (default: demo)")
    parser.add_argument("--table", action="store_true", help="only make tables and figure anew")
    arguments = parser.parse_args()
    size = arguments.size
    folders = [ROOT / kind / f"zoo-{size}" for kind in ("models", "data")]
    (RESULTS / size).mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        # The attacker who optimises his trigger does so on the hardened G of another net.
        surrogate = folders[0] / "clean_bd_net_hardened.h5"
        names = [name for name in SIZES[size] if name != attacks.OPTIMISED]
        for some, *more in ([names], [[attacks.OPTIMISED], "--surrogate", surrogate]):
            make = [sys.executable, ROOT / "models" / "badnet.py", "--size", size, *some, *more]
            if subprocess.run(make).returncode:
                return 1
            for name in some:
                result = RESULTS / size / f"{name}.json"
                if not is_current(result, badnet.net_path(name, folders[0])):
                    files.write_json(measure(name, *folders, RATES[size]), result)
    write_all()


if __name__ == "__main__":
    sys.exit(run_command(main))
