"""The page of repair.py --report: how the repair went, and whether the BadNet looks backdoored."""

from defence import finding, page, page_judged, plots, tables


def write(path, record, found, seconds, called):
    """Write the page.

    record: the RepairRecord.  found: the Finding about the BadNet, or None.  seconds: {step: s}.
    called: names of the classes, or None.
    """
    (_, *steps), *rows = tables.after_each_step(record)
    badnet, data = record.badnet, record.data
    made_of = {
        "BadNet": badnet["file"],
        "BadNet, SHA-256": badnet["sha256"],
        "dataset": f"{data['file']}, {data['images']} images",
        "dataset, SHA-256": data["sha256"],
        "options": ", ".join(f"{name} {value}" for name, value in record.settings.items()),
        "seconds": f"{seconds['total']:.1f}",
    }
    page.write(
        path,
        "repaired.html",
        title=f"{badnet['file']}: the repair",
        finding=list(finding.in_words(found, called)) if found else [],
        tone={"backdoor": "alarm", "nothing": "calm"}.get(found and found.finding, "open"),
        pruned=f"{len(record.pruned)} of {record.channels} channels of {record.layer}",
        steps=steps,
        rows=rows,
        costs=list(tables.costs(record)),
        charts=[(alt, page.chart(*each)) for alt, each in plots.repaired(record, found)],
        figures=list(page_judged.table(record.holdout)) if record.holdout else [],
        held_out=record.holdout["images"] if record.holdout else 0,
        not_held_out=tables.NOT_HELD_OUT,
        no_proof=tables.no_proof(record),
        provenance=page.provenance(**made_of),
    )
