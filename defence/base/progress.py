"""What a command prints: results on stdout; remarks, warnings and progress bars on stderr.

Only process.py prints too, the error that ends a command. Both escape what they print, so that no
file sends commands to the terminal.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

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


def print_result(*texts: object, sep: str = "\n", file: TextIO | None = None) -> None:
    """Print lines, or cells with another `sep`, on stdout or to an open text file."""
    print(*map(escape, texts), sep=sep, file=file)


def track(sequence: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield from `sequence` and show a progress bar on stderr if that is a terminal."""
    if _quiet or not sys.stderr.isatty():
        yield from sequence
        return
    from rich.console import Console  # here, because nothing else needs rich
    from rich.progress import Progress, TextColumn

    # A file's name is not Rich's markup, in which [red] is a colour and :x: an emoji.
    title = TextColumn("{task.description}", style="progress.description", markup=False)
    columns = (title, *Progress.get_default_columns()[1:])
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(sequence, total, description=escape(description))
