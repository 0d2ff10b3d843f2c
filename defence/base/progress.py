"""What a command says on stderr while it works: remarks, warnings, progress bars."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from defence.base.text import escape

T = TypeVar("T")
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Leave out remarks and progress bars from now on, or not. Warnings and errors always show."""
    global _quiet
    _quiet = quiet


def say(line: str) -> None:
    """Print a remark on stderr, above the progress bar if one is shown."""
    if not _quiet:
        print_line(line)


def warn(line: str) -> None:
    """Print a warning on stderr."""
    print_line(f"warning: {line}")


def print_line(line: object) -> None:
    """Print a line on stderr, even under --quiet."""
    print(escape(line), file=sys.stderr, flush=True)


def track(sequence: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield from `sequence` and show a progress bar on stderr if that is a terminal."""
    if _quiet or not sys.stderr.isatty():
        yield from sequence
        return
    from rich.console import Console  # here, because nothing else needs rich
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(sequence, total, description=description)
