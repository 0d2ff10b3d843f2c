"""The page of repair.py --report: how the repair went, and whether the BadNet looks backdoored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from defence.explain import outcome, page, page_judged, plots, tables
from defence.explain.finding_words import describe_finding

if TYPE_CHECKING:
    from defence.base.limits import Name
    from defence.beyond.finding import Finding
    from defence.judge.record import RepairRecord

TONES = {"backdoor": "alarm", "nothing": "calm"}  # of a finding
NOT_SCANNED = "The BadNet was not scanned for a backdoor (repair.py --scan or --harden does so)."


def write_repaired_page(
    path: Name,
    record: RepairRecord,
    finding: Finding | None,
    seconds: dict[str, float],
    class_names: list[str] | None,
    advice: str,
) -> None:
    """Write the page.

    finding: about the BadNet, if it was scanned.  seconds: for each step.
    advice: as outcome.describe_next returns it.
    """
    (_, *steps), *rows = tables.list_steps(record)
    badnet, data, held_out = record.badnet, record.data, record.holdout
    tone, lines = describe_verdict(record, finding, class_names)
    sources = {
        "BadNet": badnet["file"],
        "BadNet, SHA-256": badnet["sha256"],
        "dataset": f"{data['file']}, {data['images']} images",
        "dataset, SHA-256": data["sha256"],
        "options": " ".join(list_options(record.settings)),
        "seconds": f"{seconds['total']:.1f}",
    }
    page.write_page(
        path,
        "repaired.html",
        title=f"{badnet['file']}: the repair",
        tone=tone,
        lines=[*lines, advice],
        pruned=f"{len(record.pruned)} of {record.channels} channels of {record.layer}",
        steps=steps,
        rows=rows,
        costs=list(tables.list_costs(record)),
        charts=[
            (alt, page.make_chart(*chart))
            for alt, chart in plots.draw_repair_charts(record, finding, class_names)
        ],
        figures=list(page_judged.list_figures(tables.choose_held_out(record), None)),
        held_out=held_out["images"] if held_out else 0,
        rate=tables.describe_rate(held_out) if held_out else "",
        not_held_out=tables.NOT_HELD_OUT,
        provenance=page.describe_provenance(**sources),
    )


def list_options(settings: dict[str, Any]) -> Iterator[str]:
    """Yield the options of a repair's steps, without those of steps that did not run."""
    steps = {
        "harden": [name for name in settings if name.startswith("harden_")],
        "retrain_epochs": ["retrain_learning_rate"],
        "rounds": ["epochs", "learning_rate"],
    }
    unused = {name for step in steps if not settings.get(step) for name in steps[step]}
    for name, value in settings.items():
        if name in unused or (name in ("harden", "holdout") and not value):
            continue
        option = f"--{name.replace('_', '-')}"
        yield option if value is True else f"{option} {value}"


def describe_verdict(
    record: RepairRecord, finding: Finding | None, class_names: list[str] | None
) -> tuple[str, list[str]]:
    """Return the page's first words: ("alarm", "open" or "calm", lines of text).

    What poisoned images show comes before what a scan suspects. Where they fool the BadNet, a scan
    that finds nothing is no comfort.
    """
    outcomes = outcome.describe_outcome(record)
    found = list(describe_finding(finding, class_names, hardened=True)) if finding else []
    if outcome.find_left(record):
        return "alarm", [*outcomes, *found]
    tone = TONES.get(finding.finding, "open") if finding else "open"
    before = record.attack_success_rate["before"].values()
    if any(rate > outcome.CARRIES for rate in before):
        return "open" if tone == "calm" else tone, [*outcomes, *found]
    return tone, [*(found or [NOT_SCANNED]), *outcomes]
