"""Examine the flagged images of a stream: find the classes that may be targets, and triggers."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from defence.base.progress import say
from defence.explain import flagged, natural, trigger
from defence.explain.streams import UNREAD
from defence.load.class_names import name_class

if TYPE_CHECKING:
    from defence.explain.flagged import Candidate
    from defence.explain.streams import Stream
    from defence.explain.trigger import StreamFindings
    from defence.judge.detector import Detector


def examine(
    stream: Stream,
    detector: Detector,
    class_names: list[str] | None,
    arguments: Namespace,
    clean: Stream | None = None,
) -> StreamFindings:
    """Find the classes that may be targets from the flagged images, and say them on stderr.

    arguments: the command's; --json and --report take the evidence too. The classes are the same
    with any options.
    clean: the stream that holds the unflagged images, if another.
    """
    answers, written = stream.answers, bool(arguments.json or arguments.report)
    candidates = flagged.find_candidates(answers.badnet, answers.flagged, stream.classes)
    twin = natural.make_asker(arguments, detector.class_names or class_names)
    findings = trigger.find_targets(stream, candidates, detector.judge, clean, written, twin)
    if not findings.candidates:
        findings.suspect = flagged.find_suspect(candidates)
    say_candidates(findings.candidates, class_names, stream.path)
    if findings.suspect:
        name = name_class(findings.suspect.target, class_names) if class_names else None
        say_about(stream.path, flagged.describe_suspect(findings.suspect, name))
    if arguments.report and not findings.candidates:
        findings.attributions = trigger.attribute_single_images(stream, detector.judge, clean)
    return findings


def say_candidates(
    candidates: Sequence[Candidate], class_names: list[str] | None, path: object = None
) -> None:
    """Say on stderr which classes may be targets. path: the dataset's, where there is one."""
    for candidate in candidates:
        name = name_class(candidate.target, class_names) if class_names else None
        say_about(path, flagged.describe_candidate(candidate, name))


def say_about(path: object, text: str) -> None:
    """Say a text on stderr. path: of the dataset that it is about, where there is one."""
    say((f"{path}: " if path else "") + text)


def write_page(
    path: str,
    detector: Detector,
    findings_list: Sequence[StreamFindings],
    class_names: list[str] | None,
    errors: Sequence[str] = (),
    unread: int | None = None,
    results: dict | None = None,
) -> None:
    """Write the page of --report.

    errors: why images could not be read.  unread: their number, where `errors` has only the first.
    results: the figures of datasets, as evaluation.evaluate returns them.
    """
    from defence.explain import page_judged  # here, because the import takes time

    count = len(errors) if unread is None else unread
    page_judged.write_judged_page(
        path, detector, findings_list, class_names, errors[:UNREAD], count, results
    )
    say(f"wrote {path}")
