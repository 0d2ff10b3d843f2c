"""What a command prints: results on stdout; remarks, warnings and progress bars on stderr.

Only process.py prints too, the error that ends a command. Both escape what they print, so that no
file sends commands to the terminal.
"""

import contextlib
import operator
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

from defence.base.text import escape, format_duration

T = TypeVar("T")
INTERVAL = 30  # seconds between two lines on a step
# A step says how long it takes once PARTS of it, after the first, took MEASURED seconds, if it will
# take LONG seconds.
PARTS, MEASURED, LONG = 20, 1, 10
_quiet = False
_printed = 0.0  # when the last line was printed on stderr, by time.monotonic


def set_quiet(quiet: bool) -> None:
    """Leave out remarks and progress bars from now on, or not. Warnings and errors always show."""
    global _quiet, _printed
    _quiet, _printed = quiet, 0.0  # a command begins; what an earlier one printed is long ago


def is_quiet() -> bool:
    return _quiet


def say(line: str) -> None:
    """Print a remark on stderr, above the progress bar if one is shown."""
    if not _quiet:
        print_line(line)


def warn(line: str) -> None:
    """Print a warning on stderr."""
    print_line(f"warning: {line}")


def print_line(line: object) -> None:
    """Print a line on stderr, even under --quiet."""
    global _printed
    # In one piece, since a signal's own line may come between a text and the end of its line.
    print(f"{escape(line)}\n", end="", file=sys.stderr, flush=True)
    _printed = time.monotonic()


def print_result(*texts: object, sep: str = "\n", file: TextIO | None = None) -> None:
    """Print lines, or cells with another `sep`, on stdout or to an open text file."""
    print(*map(escape, texts), sep=sep, file=file)


def track(
    sequence: Iterable[T],
    description: str,
    total: int | None = None,
    clock: Callable[[], float] = time.monotonic,
    bar: bool = True,
) -> Iterator[T]:
    """Yield from `sequence` and show on stderr how far it is, as `follow` does."""
    total = total or operator.length_hint(sequence, 0)
    with follow(description, total, clock=clock, bar=bar) as advance:
        for item in sequence:
            yield item
            advance(1)


@contextlib.contextmanager
def follow(
    description: str,
    total: int,
    promise: str = "",
    clock: Callable[[], float] = time.monotonic,
    times: float = 1,
    bar: bool = True,
) -> Iterator[Callable[[int], None]]:
    """Show how far a step is on stderr: a progress bar on a terminal, elsewhere a line at times.

    total: the step's units; 0 where that is not known.  promise, clock, times: as for Pace.
    bar: if False, lines on a terminal too, where the command prints results meanwhile.
    Yield advance(count), to be called when `count` more units are done.
    """
    if _quiet:
        yield lambda count: None
        return
    pace = Pace(description, total, promise, clock, times)
    if not (bar and sys.stderr.isatty()):

        def advance(count: int) -> None:
            for line in (*pace.advance(count), *pace.remark()):
                say(line)

        yield advance
        return
    from rich.console import Console  # here, because nothing else needs rich
    from rich.progress import Progress, TextColumn

    # A file's name is not Rich's markup, in which [red] is a colour and :x: an emoji.
    title = TextColumn("{task.description}", style="progress.description", markup=False)
    columns = (title, *Progress.get_default_columns()[1:])
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape(description), total=total or None)

        def advance_bar(count: int) -> None:
            progress.advance(task, count)
            for line in pace.advance(count):
                say(line)

        yield advance_bar


class Pace:
    """How fast a step goes, and what to say about it."""

    def __init__(
        self,
        description: str,
        total: int,
        promise: str = "",
        clock: Callable[[], float] = time.monotonic,
        times: float = 1,
    ) -> None:
        """total: the step's units; 0 where that is not known.

        promise: a line that says, once it can be told, how long the whole step takes: at {}.
        clock: gives the time in seconds.
        times: how often the step's time the promise is about, where it is about later steps too.
        """
        self.description, self.total, self.promise, self.clock = description, total, promise, clock
        self.times = times
        self.done = self.calls = 0
        self.told = False  # how long the step takes
        self.began = clock()
        # Of several short steps in a row, one says how far it is.
        self.spoke = min(self.began, _printed or self.began)
        self.first = (self.began, 0)  # the time and the units done when the first part was

    def advance(self, count: int) -> Iterator[str]:
        """Count `count` more units as done. Yield the promise where it is due."""
        self.done, self.calls = self.done + count, self.calls + 1
        if self.calls == 1:  # which may take longer, since a net is compiled
            self.first = self.clock(), self.done
        elif self.promise and self.is_clear():
            promise, self.promise = self.promise, ""
            seconds = self.times * (self.clock() - self.began + self.estimate_left())
            if seconds >= LONG:
                self.told = True
                yield promise.format(format_duration(seconds))

    def is_clear(self) -> bool:
        """Return whether enough of the step is done to tell how long it takes."""
        return self.calls > PARTS and self.clock() - self.first[0] >= MEASURED

    def remark(self) -> Iterator[str]:
        """Yield a line on how far the step is: once that is clear, and then every INTERVAL."""
        now = self.clock()
        soon = not self.told and self.total > 0 and self.is_clear()
        soon = soon and now - self.began + self.estimate_left() >= LONG
        if self.done == self.total or not (soon or now - self.spoke >= INTERVAL):
            return
        self.spoke, self.told = now, True
        if not self.total:
            yield f"{self.description}: {self.done} done"
            return
        left = format_duration(self.estimate_left())
        yield f"{self.description}: {100 * self.done / self.total:.0f} %, about {left} left"

    def estimate_left(self) -> float:
        """Return the seconds that the units left will take, as the ones after the first part."""
        began, done = self.first if self.calls > 1 else (self.began, 0)
        return (self.clock() - began) / (self.done - done) * (self.total - self.done)
