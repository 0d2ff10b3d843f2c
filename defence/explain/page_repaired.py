"""The page of repair.py --report: how the repair went, and whether the BadNet looks backdoored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from defence.explain import outcome, page, page_judged, plots, tables
from defence.explain.finding_words import describe_finding

if TYPE_CHECKING:
    from defence.base.limits import Name
    from defence.beyond.finding import Finding
    from defence.judge.record import RepairRecord

TONES = {"backdoor": "alarm", "nothing": "calm"}  # of a finding


def write_repaired_page(
    path: Name,
    record: RepairRecord,
    finding: Finding | None,
    seconds: dict[str, float],
    class_names: list[str] | None,
) -> None:
    """Write the page. finding: about the BadNet, if it was scanned.  seconds: for each step."""
    (_, *steps), *rows = tables.list_steps(record)
    badnet, data, held_out = record.badnet, record.data, record.holdout
    sources = {
        "BadNet": badnet["file"],
        "BadNet, SHA-256": badnet["sha256"],
        "dataset": f"{data['file']}, {data['images']} images",
        "dataset, SHA-256": data["sha256"],
        "options": ", ".join(f"{name} {value}" for name, value in record.settings.items()),
        "seconds": f"{seconds['total']:.1f}",
    }
    page.write_page(
        path,
        "repaired.html",
        title=f"{badnet['file']}: the repair",
        finding=list(describe_finding(finding, class_names, hardened=True)) if finding else [],
        tone=TONES.get(finding.finding, "open") if finding else "open",
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
        no_proof=" ".join(outcome.describe_outcome(record)),
        provenance=page.describe_provenance(**sources),
    )
