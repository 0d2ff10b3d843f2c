"""What the commands print of a repair and of judged datasets: tables as text."""

from defence.base.text import escape, format_count, format_percent
from defence.beyond import finding
from defence.judge.record import STEPS

# What each figure is called.
CLEAN = {
    "clean_accuracy_badnet": "clean accuracy of B",
    "clean_accuracy_repaired": "clean accuracy of G",
    "clean_accuracy_together": "clean accuracy of the two together",
    "false_positive_rate": "false-positive rate (clean flagged)",
}
POISONED = {
    "attack_success_rate_badnet": "attack success rate on B",
    "attack_success_rate_repaired": "attack success rate on G",
    "detection_rate": "detection rate (poisoned flagged)",
    "detection_rate_of_successes": "… of those that the attack works on",
    "detection_rate_at_0.01": "… where 1 % of clean are flagged",
    "detection_rate_at_0.05": "… where 5 % of clean are flagged",
    "robust_accuracy": "robust accuracy of G",
    "auroc": "AUROC of the anomaly score",
    "defense_effectiveness_rating": "defense effectiveness rating",
}
NOT_HELD_OUT = (
    "No images were held out (--holdout 0.1): accuracies after training are optimistically biased."
)


def format_evaluation(results):
    """The results of judged datasets, as in eval_defence.py's JSON, as one table."""
    lines = [results["rule"], f"{'':<52}   95 % interval"]
    for of_data in (results["clean"], *results["poisoned"]):
        rate = of_data["images"] / of_data["seconds"]
        lines.append(
            f"{escape(of_data['file'])}: {format_count(of_data['images'], 'image')}, "
            f"{rate:.0f} a second"
        )
        for name, label in (CLEAN | POISONED).items():
            if name in of_data["figures"]:
                lines.append(f"  {label:<38}{format_cells(of_data['figures'][name])}")
    return "\n".join(lines)


def format_cells(figure):
    """A figure and its interval, as the columns of a table."""
    if figure["value"] is None:
        return f"{'none':>12}"
    show = (
        "{:.4f}".format if "hits" not in figure else format_percent
    )  # an area is not a fraction of n
    value, low, high = (figure.get(key) for key in ("value", "low", "high"))
    return f"{show(value):>12}" + ("" if low is None else f"   {show(low)} .. {show(high)}")


def format_summary(record, seconds, class_names):
    """The closing table of a repair.

    record: RepairRecord.  seconds: {step: s}.  called: the classes' names, or None.
    """
    rows = list_steps(record)
    width = max(len(row[0]) for row in rows)
    table = [row[0].ljust(width) + "".join(cell.rjust(12) for cell in row[1:]) for row in rows]
    spent = [f"{step.replace('_', '-')} {s:.1f}" for step, s in seconds.items() if s >= 0.05]
    return "\n".join(
        [
            f"pruned {len(record.pruned)} of {record.channels} channels of {record.layer}; pixels "
            f"{record.input_scale}",
            *table,
            f"seconds: {', '.join(spent)}",
            *list_remarks(record, class_names),
        ]
    )


def list_steps(record):
    """Accuracy and attack success after each step of a repair: rows of text, the first the steps'.

    record: RepairRecord.
    """
    accuracy, rates = record.accuracy, record.attack_success_rate
    steps = [step for step in STEPS if step in accuracy]
    rows = [("", *(step.replace("_", "-") for step in steps))]
    rows.append(("validation accuracy", *(format_percent(accuracy[step]) for step in steps)))
    for name in rates["before"]:
        rows.append(
            (f"attack success, {name}", *(format_percent(rates[step][name]) for step in steps))
        )
    return rows


def list_remarks(record, class_names):
    """What clean data alone tells of a repair, and what it does not: lines of text."""
    yield from list_costs(record)
    if held_out := record.holdout:
        yield f"on {format_count(held_out['images'], 'held-out image')}:{'95 % interval':>46}"
        for name, label in CLEAN.items():
            yield f"  {label:<38}{format_cells(held_out[name])}"
    else:
        yield NOT_HELD_OUT
    if record.finding:
        yield from finding.describe_finding(finding.Finding(**record.finding), class_names)
    yield describe_limits(record)


def list_costs(record):
    """What a repair cost, as far as clean data tell: lines of text."""
    accuracy, moved = record.accuracy, record.moved
    silent = sum(record.mean_activation[channel] == 0 for channel in record.pruned)
    yield (
        f"accuracy cost of pruning: {format_percent(accuracy['before'] - accuracy['pruned'])}; {silent} "
        f"of the {len(record.pruned)} pruned channels never fired"
    )
    yield (
        f"G disagrees with B on {format_percent(moved['answers'])} of the validation images; its weights "
        f"moved by {format_percent(moved['weights'])}"
    )


def describe_limits(record):
    """What a repair does not prove."""
    where = "in channels that clean images use, it survives unnoticed"
    if "hardened" in record.accuracy:
        where = "a trigger unlike any change of picture that was trained on may survive"
    return f"This does not prove that the backdoor is gone: {where}."
