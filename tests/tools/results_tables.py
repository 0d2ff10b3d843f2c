"""The rows of results.csv and the tables of results.py, made from its records."""

import numpy as np
from records import format_table, name_class

from defence.judge import figures

# Figures of eval_defence.py: of B, of each G, and those whose 95 % intervals the CSV leaves out.
B_FIGURES = ("clean_accuracy_badnet", "attack_success_rate_badnet")
G_FIGURES = (
    *("clean_accuracy_repaired", "clean_accuracy_together", "false_positive_rate"),
    *("attack_success_rate_repaired", "detection_rate", "detection_rate_of_successes"),
    "robust_accuracy",
)
VALUES_ONLY = (
    "detection_rate_at_0.01",
    "detection_rate_at_0.05",
    "auroc",
    "defense_effectiveness_rating",
)
# Columns of each table after net and trigger: heading, and column of results.csv.
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


# ------------------------------------------------------------------------------------------ rows


def make_rows(size, records):
    """Return a row for each net and trigger of a size's records."""
    return [
        make_row(size, record, number)
        for record in records
        for number in range(max(1, len(record["net"]["triggers"])))
    ]


def make_row(size, record, number):
    """Return a row of results.csv, {column: text, number or None}.

    number: of the trigger, from 0.  Rates and the ends of their intervals are 0..1. What a clean
    net does not have is None.
    """
    net, report = record["net"], record["report"]
    trigger, target = net["triggers"][number] if net["triggers"] else (None, None)
    number_of_class = None if target is None else name_class(target)
    columns = {"size": size, "net": net["name"], "trigger": trigger, "class": number_of_class}
    columns |= {"people": net["people"], "validation_images": net["people"] * net["validation"]}
    columns |= {"clean_images": report["judged"]["clean"]["images"], "poisoned_images": None}
    needed, pruned_rate = {}, None
    if trigger:
        columns["poisoned_images"] = images = report["judged"]["poisoned"][number]["images"]
        needed = record["channels_needed"][number]
        hits = round(needed["attack_success_rate"] * images)
        pruned_rate = figures.estimate_proportion(np.arange(images) < hits)
    for name in B_FIGURES:
        columns |= split_interval(name, get_figures(report, number).get(name))
    columns |= split_interval("attack_success_rate_pruned", pruned_rate)
    columns |= {"needed_channels_pruned": needed.get("pruned")}
    columns |= {"channels": report["repair"]["channels"]}
    columns |= make_method_columns("report", report, number)
    return columns | make_method_columns("hardened", record["harden"], number)


def get_figures(method, number):
    """Return eval_defence.py's figures of a method and a trigger: {name: {"value", …}}."""
    judged = method["judged"]
    poisoned = judged["poisoned"][number]["figures"] if judged["poisoned"] else {}
    return judged["clean"]["figures"] | poisoned


def make_method_columns(word, method, number):
    """Return the columns of a method for a trigger; their names begin with a word."""
    named, repair = get_figures(method, number), method["repair"]
    columns = {
        "threshold": method["judged"]["threshold"],
        "channels_pruned": len(repair["pruned"]),
        "repair_seconds": repair["seconds"]["total"],
    }
    for name in G_FIGURES:
        columns |= split_interval(name, named.get(name))
    columns |= {name: round_figure(named.get(name), "value") for name in VALUES_ONLY}
    return {f"{word}_{name}": value for name, value in columns.items()}


def split_interval(name, figure):
    """Return the columns of a figure: its value and the ends of its interval."""
    ends = {"": "value", "_low": "low", "_high": "high"}
    return {name + ending: round_figure(figure, key) for ending, key in ends.items()}


def round_figure(figure, key):
    """Return a value of a figure with six decimals, or None where there is none."""
    value = figure and figure[key]
    return None if value is None else round(value, 6)


# ---------------------------------------------------------------------------------------- tables


def make_table(rows, columns, rate):
    """Return the Markdown table of rows.

    columns: {heading: column}, as in TABLES.  rate: --fpr's, 0..1.
    """
    heads = ["net", "trigger → class", *(heading.format(rate=rate) for heading in columns)]
    alignments = ["---", "---", *["--:"] * len(columns)]
    cells = [
        [row["net"], name_attack(row), *(format_cell(row, column) for column in columns.values())]
        for row in rows
    ]
    return format_table(heads, alignments, cells)


def format_cell(row, column):
    """Return a row's value as text: counts, seconds and AUROC as they are, other values in %."""
    value = row[column]
    if value is None:
        return "–"
    if column == "report_channels_pruned":
        return f"{value:.0f} of {row['channels']}"
    if column.endswith(("channels_pruned", "seconds")):
        return f"{value:.0f}"
    return f"{value:.3f}" if column.endswith("auroc") else f"{100 * value:.1f}"


def make_tables(rows, rates):
    """Return all tables, {name in the markers: Markdown}.

    rows: {size: rows}.  rates: {size: --fpr's, 0..1}.
    """
    tables = {
        f"{size}, {name}": make_table(rows[size], columns, rates[size])
        for size in rows
        for name, columns in TABLES.items()
    }
    hardest = find_hardest_rows(rows["competition"])
    return tables | {"summary": make_table(hardest, SUMMARY, rates["competition"])}


def find_hardest_rows(rows):
    """Return, for each net, the row of the trigger with the lowest detection rate, hardened."""
    nets = {}
    for row in rows:
        nets.setdefault(row["net"], []).append(row)
    column = "hardened_detection_rate_of_successes"
    return [min(triggers, key=lambda row: row[column] or 0) for triggers in nets.values()]


def name_attack(row):
    """Return the trigger and the target of a row, as tables and figure show them."""
    return f"{row['trigger']} → {row['class']}" if row["trigger"] else "none"
