"""Print the outcome of a repair or a scan, and write the files that the options ask for."""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from defence.base import files
from defence.base.errors import InputError
from defence.base.progress import print_line, print_result, say
from defence.explain import outcome, page_repaired, plots, sarif, tables
from defence.explain.finding_words import describe_finding
from defence.judge import backends
from defence.load.models import read_model

if TYPE_CHECKING:
    from defence.beyond.finding import Finding
    from defence.judge.record import RepairRecord
    from defence.load.models import ModelFile


def print_scan(
    finding: Finding, class_names: list[str] | None, badnet: ModelFile, arguments: Namespace
) -> None:
    """Write the files that the options ask for, and print the finding about the BadNet.

    arguments: as for print_repair.
    """
    if arguments.json:
        files.write_json(dataclasses.asdict(finding), arguments.json)
    if arguments.sarif:
        sarif.write_log(arguments.sarif, finding, class_names, badnet)
    print_result(*describe_finding(finding, class_names), file=choose_stream(arguments))


def print_repair(
    record: RepairRecord,
    finding: Finding | None,
    seconds: dict[str, float],
    class_names: list[str] | None,
    badnet: ModelFile,
    arguments: Namespace,
) -> None:
    """Write the files that the options ask for, and print the closing table.

    finding: about the BadNet, if it was scanned.  seconds: for each step.
    arguments: from options.repair.parse_repair; their `output` is G's file.
    """
    if arguments.json:
        extra = {"finding": finding and dataclasses.asdict(finding), "seconds": seconds}
        files.write_json(record.describe() | extra, arguments.json)
    if arguments.sarif and finding:
        sarif.write_log(arguments.sarif, finding, class_names, badnet)
    if arguments.plot:
        plots.plot_pruning_curve(record, arguments.plot)
    nets = backends.name_nets(badnet.path, Path(arguments.output))
    advice = outcome.describe_next(record, sys.argv, nets)
    if arguments.report:
        page_repaired.write_repaired_page(
            arguments.report, record, finding, seconds, class_names, advice
        )
    out = choose_stream(arguments)
    print_result(*tables.format_summary(record, seconds, class_names), file=out)
    print_result(f"Saved model: {arguments.output}", file=out)
    if arguments.detector and try_export(badnet, arguments):
        print_result(f"Saved detector: {arguments.detector}", file=out)
    else:
        backends.discard_detector(Path(arguments.output))
    if arguments.report:
        print_result(f"Saved page: {arguments.report}", file=out)
    show = print_line if outcome.find_left(record) else say  # a failure says it under --quiet, too
    show(advice)


def choose_stream(arguments: Namespace) -> TextIO:
    """Return where lines of text go: to stderr where a file goes to stdout."""
    return sys.stderr if files.STDOUT in (arguments.json, arguments.sarif) else sys.stdout


def try_export(badnet: ModelFile, arguments: Namespace) -> bool:
    """Write the detector of B and G, and return whether these nets allow it."""
    say("writing the detector's file")
    try:
        repaired = read_model(arguments.output, arguments.max_bytes)
        backends.export_detector(badnet, repaired, Path(arguments.detector))
    except InputError as error:
        say(f"{error}; eval_defence.py will judge with Keras")
        return False
    return True
