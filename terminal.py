"""The terminal: options, messages, progress, Ctrl-C, exit status."""

import argparse
import functools
import math
import os
import shutil
import signal
import sys
from pathlib import Path

MEMORY = 2**30  # bytes, the default of --max-memory
MESSAGE = 1_000  # characters of an error that are shown; a hostile file can make it long


class InputError(Exception):
    """The input or the call is wrong. The message is one line that names the file."""


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def at_least(smallest, kind=float, above=False, most=math.inf):
    """A type for argparse: a finite number of `kind`, from `smallest` (or above it) to `most`."""
    wanted = "a whole number" if kind is int else "a number"
    wanted += f" above {smallest}" if above else f" of at least {smallest}"
    wanted += f" and at most {most}" if most < math.inf else ""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (smallest <= value <= most and value < math.inf) or (above and value == smallest):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def memory_option(parser):
    """Add --max-memory, in GB, to a parser; `max_memory` is in bytes."""
    in_bytes = at_least(0, above=True)
    parser.add_argument(
        "--max-memory",
        metavar="GB",
        type=lambda text: int(in_bytes(text) * 2**30),
        default=MEMORY,
        help="refuse a file of which one thing (a net's weights, a layer's output, the features "
        "of a data set, a picture …) would take more memory (default: 1)",
    )


def command(main):
    """Run `main()` as a command and return its exit status: 0 done, 1 failed, 2 wrong input.

    Ctrl-C and SIGTERM remove what is half written and end the process with 128 + the signal's
    number. They end it at once: an exception thrown into the middle of TensorFlow may be caught,
    or printed, by whatever runs at that moment.
    """
    name = Path(sys.argv[0]).name
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.stdout.reconfigure(errors="surrogateescape")  # a path is printed as the bytes it is
    try:
        return main() or 0
    except InputError as error:
        print(f"{name}: error: {printable(error)[:MESSAGE]}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of stdout, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if sys.flags.dev_mode:  # python -X dev: show where
            raise
        kind = "" if isinstance(error, OSError | MemoryError) else f"{type(error).__name__}: "
        print(f"{name}: error: {kind}{printable(one_line(error))}", file=sys.stderr)
        return 1


unfinished = set()  # Paths of the folders in which files are being written


def _stop(number, _frame):
    for folder in unfinished:
        shutil.rmtree(folder, ignore_errors=True)
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
    os._exit(128 + number)


def one_line(error):
    """The first line of what an exception says, at most 200 characters, without a full stop."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line.rstrip(".") if len(line) <= 200 else line[:199] + "…"


def printable(text):
    """A text with what could steer a terminal, or end a line, made visible: \\n, \\x1b."""

    def show(character):
        if character.isprintable() or "\ud800" <= character <= "\udfff":  # a path's odd bytes
            return character
        return character.encode("unicode_escape").decode()

    return "".join(map(show, str(text)))


@functools.cache
def _console():
    from rich.console import Console  # here, because --help need not wait for it

    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def say(line):
    """Print a remark on stderr, above the progress bar if one is shown."""
    _console().print(printable(line), markup=False)


def track(sequence, description, total=None):
    """Yield from `sequence` while a bar on stderr, on a terminal only, shows how far it is."""
    if not _console().is_terminal:
        yield from sequence
        return
    from rich.progress import Progress

    with Progress(console=_console(), transient=True) as progress:
        yield from progress.track(sequence, total, description=description)
