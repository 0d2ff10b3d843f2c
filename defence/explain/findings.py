"""Look at the flagged images of a stream: which class may be the target, and where its trigger is."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from defence.base.progress import say
from defence.explain import flagged, trigger
from defence.explain.flagged import Candidate
from defence.explain.streams import UNREAD, Stream
from defence.explain.trigger import StreamFindings
from defence.judge.detector import Detector
from defence.load.class_names import name_class


def examine(
    stream: Stream,
    detector: Detector,
    class_names: list[str] | None,
    arguments: Namespace,
    clean: Stream | None = None,
) -> StreamFindings:
    """Find the classes that may be targets, by the flagged images, and say them on stderr.

    arguments: --json and --report also ask where the triggers are.
    clean: the stream with the images that were not flagged, if it is another.
    """
    answers = stream.answers.badnet, stream.answers.flagged, stream.classes
    if arguments.json or arguments.report:
        candidates = flagged.find_candidates(*answers)
        found = trigger.find_targets(stream, candidates, detector.judge, clean)
    else:
        found = StreamFindings(stream, flagged.find_outstanding(*answers), [])
    say_candidates(found.candidates, class_names, stream.path)
    if arguments.report and not found.candidates:
        found.attributions = trigger.attribute_single_images(stream, detector.judge, clean)
    return found


def say_candidates(
    candidates: Sequence[Candidate], class_names: list[str] | None, path: object = None
) -> None:
    """Say on stderr which classes may be targets. path: of a dataset."""
    for candidate in candidates:
        name = name_class(candidate.target, class_names) if class_names else None
        say((f"{path}: " if path else "") + flagged.describe_candidate(candidate, name))


def write_page(
    path: str,
    detector: Detector,
    found: Sequence[StreamFindings],
    class_names: list[str] | None,
    errors: Sequence[str] = (),
    unread: int | None = None,
    results: dict | None = None,
) -> None:
    """Write the page of --report.

    errors: why images could not be read.  unread: their number, where `errors` are the first ones.
    results: the figures of datasets, as evaluation.evaluate returns them.
    """
    from defence.explain import page_judged  # here, for the time that it takes

    count = len(errors) if unread is None else unread
    page_judged.write_judged_page(
        path, detector, found, class_names, errors[:UNREAD], count, results
    )
    say(f"wrote {path}")
