"""The tables that the commands print about a repair and about judged datasets, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from defence.base.text import escape, format_count, format_percent
from defence.beyond import finding
from defence.judge.record import STEPS

if TYPE_CHECKING:
    from defence.judge.record import RepairRecord

# The label of each figure.
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
    "detection_rate_of_successes": "… of successful attacks",
    "detection_rate_at_0.01": "… where 1 % of clean are flagged",
    "detection_rate_at_0.05": "… where 5 % of clean are flagged",
    "robust_accuracy": "robust accuracy of G",
    "auroc": "AUROC of the anomaly score",
    "defense_effectiveness_rating": "defense effectiveness rating",
}
NOT_HELD_OUT = (
    "No images were held out (--holdout 0.1): accuracies after training are optimistically biased."
)


def format_evaluation(results: dict) -> list[str]:
    """Format the results of judged datasets, as in eval_defence.py's JSON, as lines of a table."""
    lines = [results["rule"], f"{'':<52}   95 % interval"]
    for result in (results["clean"], *results["poisoned"]):
        rate = result["images"] / result["seconds"]
        lines.append(
            f"{result['file']}: {format_count(result['images'], 'image')}, {rate:.0f} a second"
        )
        for name, label in (CLEAN | POISONED).items():
            if name in result["figures"]:
                lines.append(f"  {label:<38}{format_cells(result['figures'][name])}")
    return lines


def format_cells(figure: dict) -> str:
    """Format a figure and its interval as the columns of a table."""
    if figure["value"] is None:
        return f"{'none':>12}"
    show = format_percent if "hits" in figure else "{:.4f}".format  # an area has no hits
    cell, low = f"{show(figure['value']):>12}", figure.get("low")
    return cell if low is None else f"{cell}   {show(low)} .. {show(figure['high'])}"


def format_summary(
    record: RepairRecord, seconds: dict[str, float], class_names: list[str] | None
) -> list[str]:
    """Format the closing table of a repair as lines. seconds: for each step."""
    rows = list_steps(record)
    width = max(len(row[0]) for row in rows)
    table = [row[0].ljust(width) + "".join(cell.rjust(12) for cell in row[1:]) for row in rows]
    times = [f"{step.replace('_', '-')} {s:.1f}" for step, s in seconds.items() if s >= 0.05]
    return [
        f"pruned {len(record.pruned)} of {record.channels} channels of {record.layer}; pixels "
        f"{record.input_scale}",
        *table,
        f"seconds: {', '.join(times)}",
        *list_remarks(record, class_names),
    ]


def list_steps(record: RepairRecord) -> list[tuple[str, ...]]:
    """Return rows of text: a header, then accuracy and attack success after each step."""
    accuracy, rates = record.accuracy, record.attack_success_rate
    steps = [step for step in STEPS if step in accuracy]
    rows: list[tuple[str, ...]] = [("", *(step.replace("_", "-") for step in steps))]
    rows.append(("validation accuracy", *(format_percent(accuracy[step]) for step in steps)))
    for name in rates["before"]:
        rows.append(
            (
                f"attack success, {escape(name)}",
                *(format_percent(rates[step][name]) for step in steps),
            )
        )
    return rows


def list_remarks(record: RepairRecord, class_names: list[str] | None) -> Iterator[str]:
    """Yield lines of text on what clean data tells about a repair, and what it does not."""
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


def list_costs(record: RepairRecord) -> Iterator[str]:
    """Yield lines of text on what a repair cost, as far as clean data tells."""
    accuracy, moved = record.accuracy, record.moved
    silent = sum(record.mean_activation[channel] == 0 for channel in record.pruned)
    cost = format_percent(accuracy["before"] - accuracy["pruned"])
    yield (
        f"accuracy cost of pruning: {cost}; {silent} of the {len(record.pruned)} pruned channels "
        "never fired"
    )
    yield (
        f"G disagrees with B on {format_percent(moved['answers'])} of the validation images; "
        f"its weights moved by {format_percent(moved['weights'])}"
    )


def describe_limits(record: RepairRecord) -> str:
    """Say what a repair does not prove."""
    reason = "in channels that clean images use, it survives unnoticed"
    if "hardened" in record.accuracy:
        reason = "a trigger unlike every image change in the training may survive"
    return f"This does not prove that the backdoor is gone: {reason}."
