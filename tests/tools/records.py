"""Recorded results, one line of JSON for each net, and the documents that show tables of them."""

import json
from pathlib import Path

from defence.base import files
from defence.base.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "results"


def read_records(path):
    """Return the records of a file, {name: dict}. A file that does not exist has none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def write_record(record, path):
    """Write a record, a dict with a "name", in place of the record of that name or at the end."""
    records = read_records(path) | {record["name"]: record}
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replace_file(path) as temporary:
        temporary.write_text("".join(f"{json.dumps(line)}\n" for line in records.values()))


def name_class(target):
    """Return a target as tables show it, from 1. target: class from 0, or faces.NEXT."""
    return target if isinstance(target, str) else str(target + 1)


def format_table(heads, alignments, rows):
    """Return a Markdown table. heads, alignments: of the columns.  rows: lists of texts."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, alignments, *rows))


def find_markers(text, name):
    """Return the lines before and after a table in a document's text, or None where one misses."""
    markers = f"<!-- results: {name} -->\n", f"<!-- end of results: {name} -->"
    return markers if all(marker in text for marker in markers) else None


def fill_tables(text, tables):
    """Return a document's text with each table between its markers, where it has them.

    tables: {name: Markdown}.
    """
    for name, table in tables.items():
        if markers := find_markers(text, name):
            start, end = markers
            before, after = text.split(start)
            text = f"{before}{start}{table}\n{end}{after.split(end)[1]}"
    return text


def write_tables(tables, paths):
    """Write tables into documents, between their markers.

    tables: {name: Markdown}.  Raise InputError where no document has a table's markers.
    """
    texts = {path: path.read_text() for path in paths}
    for name in tables:
        if not any(find_markers(text, name) for text in texts.values()):
            places = ", ".join(path.name for path in paths)
            raise InputError(f"no markers of the table {name!r} in {places}; add them to one")
    for path, text in texts.items():
        with files.replace_file(path) as temporary:
            temporary.write_text(fill_tables(text, tables))
