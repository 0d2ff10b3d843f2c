"""The tables that the commands print about a repair and about judged datasets, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from defence.base.text import escape, format_count, format_percent
from defence.beyond.finding import Finding
from defence.explain import finding_words, outcome
from defence.judge import figures
from defence.judge.detector import name_rule
from defence.judge.record import STEPS

if TYPE_CHECKING:
    from defence.judge.record import RepairRecord

# The label of each figure. {rule} flags.
CLEAN = {
    "clean_accuracy_badnet": "clean accuracy of B",
    "clean_accuracy_repaired": "clean accuracy of G",
    "clean_accuracy_together": "clean accuracy of the two together",
    "false_positive_rate": "false-positive rate ({rule})",
}
POISONED = {
    "attack_success_rate_badnet": "attack success rate on B",
    "attack_success_rate_repaired": "attack success rate on G",
    "detection_rate": "detection rate ({rule})",
    "detection_rate_of_successes": "… of successful attacks",
    "detection_rate_at_0.01": "… if 1 % of these clean are flagged",
    "detection_rate_at_0.05": "… if 5 % of these clean are flagged",
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
        for label, figure in label_figures(result["figures"], results["threshold"]):
            lines.append(f"  {label:<38}{format_cells(figure)}")
    return lines


def label_figures(values: dict, threshold: float | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (label, figure) of each figure, with the rule that flags in the label.

    values: {name: figure}, as figures.py computes them.  threshold: as for detector.is_flagged.
    """
    for name, label in (CLEAN | POISONED).items():
        if name in values:
            yield label.format(rule=name_rule(threshold)), values[name]
    if expected := values.get("expected_false_positive_rate"):
        flag = f"--fpr {expected['fpr']:g}"
        beside = "false_positive_rate" in values
        yield f"… expected with {flag}" if beside else f"false-positive rate ({flag})", expected


def choose_held_out(record: RepairRecord) -> dict[str, Any]:
    """Return the figures of held-out images that are of the rule that flags.

    A hardened G is used with --fpr. It answers many clean images otherwise than B, so that the
    figures of their disagreement would only alarm.
    """
    held_out, by_disagreement = record.holdout or {}, set[str]()
    if record.is_hardened():
        by_disagreement = {"false_positive_rate", "clean_accuracy_together"}
    return {name: value for name, value in held_out.items() if name not in by_disagreement}


def format_cells(figure: dict) -> str:
    """Format a figure and its interval as the columns of a table."""
    if figure["value"] is None:
        return f"{'none':>12}"
    is_rate = "hits" in figure or "fpr" in figure  # and not an area
    show = format_percent if is_rate else "{:.4f}".format
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
        for label, figure in label_figures(choose_held_out(record), None):
            yield f"  {label:<38}{format_cells(figure)}"
        yield describe_rate(held_out)
        yield from outcome.describe_loss(record)
    else:
        yield NOT_HELD_OUT
    if record.finding:
        yield from finding_words.describe_finding(
            Finding(**record.finding), class_names, hardened=True
        )
    yield from outcome.describe_outcome(record)


def describe_rate(held_out: dict) -> str:
    """Say which --fpr the held-out images allow, and what a lower one needs."""
    rate, usual = held_out["expected_false_positive_rate"]["fpr"], figures.USUAL_RATE
    advice = f"eval_defence.py --fpr {rate:g} flags by the anomaly score, not by disagreement."
    if rate > usual:
        advice += f" --fpr {usual:g} needs {figures.count_needed(usual)} held-out images."
    return advice


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
