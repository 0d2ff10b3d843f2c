"""The page of repair.py --report: how the repair went, and whether the BadNet looks backdoored."""

from defence.beyond import finding
from defence.explain import page, page_judged, plots, tables


def write_repaired_page(path, record, found, seconds, class_names):
    """Write the page.

    record: the RepairRecord.  found: the Finding about the BadNet, or None.  seconds: {step: s}.
    called: names of the classes, or None.
    """
    (_, *steps), *rows = tables.list_steps(record)
    badnet, data = record.badnet, record.data
    made_of = {
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
        finding=list(finding.describe_finding(found, class_names)) if found else [],
        tone={"backdoor": "alarm", "nothing": "calm"}.get(found and found.finding, "open"),
        pruned=f"{len(record.pruned)} of {record.channels} channels of {record.layer}",
        steps=steps,
        rows=rows,
        costs=list(tables.list_costs(record)),
        charts=[
            (alt, page.make_chart(*each)) for alt, each in plots.draw_repair_charts(record, found)
        ],
        figures=list(page_judged.list_figures(record.holdout)) if record.holdout else [],
        held_out=record.holdout["images"] if record.holdout else 0,
        not_held_out=tables.NOT_HELD_OUT,
        no_proof=tables.describe_limits(record),
        provenance=page.describe_provenance(**made_of),
    )
