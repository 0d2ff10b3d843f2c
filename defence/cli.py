"""The command line: options, messages, progress, Ctrl-C, exit status."""

import argparse
import codecs
import contextlib
import dataclasses
import math
import os
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path

DEFAULT_MAX_BYTES = 2**30  # of --max-memory
MESSAGE_LENGTH = 1_000  # characters of an error that are shown; a hostile file can make it long


class InputError(Exception):
    """The input or the call is wrong. The message is one line that names the file."""


class WorkError(Exception):
    """The work failed, though the input is valid. The message is one line."""


# --------------------------------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def __init__(self, **options):
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # a value, such as -1..1: no option

    def parse_known_args(self, *arguments, **options):
        self._has_negative_number_optionals.clear()  # -0 is an option, and -1 a value still
        return super().parse_known_args(*arguments, **options)

    def error(self, message):
        if " -" in message.partition("unrecognized arguments:")[2]:
            message += "; a file of that name is ./-…"
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


def setting(default, kind, what):
    """A field of a dataclass of settings, which `add_settings` makes an option of.

    kind: the option's type, for argparse.  what: its help.
    """
    return dataclasses.field(default=default, metadata={"kind": kind, "what": what})


def add_settings(group, settings):
    """Add an option to a group of a parser for each `setting` that a dataclass itself declares."""
    for field in dataclasses.fields(settings):
        if field.name in settings.__annotations__ and "kind" in field.metadata:
            group.add_argument(
                "--" + field.name.replace("_", "-"),
                metavar="N",
                type=field.metadata["kind"],
                default=field.default,
                help=f"{field.metadata['what']} (default: {field.default})",
            )


def take_settings(settings, arguments):
    """Make a dataclass of settings from the parsed options of the same names."""
    names = [field.name for field in dataclasses.fields(settings)]
    return settings(**{name: getattr(arguments, name) for name in names})


def add_general(parser, version):
    """Add --max-memory, in GB, whose value, `max_bytes`, is in bytes, --quiet and --version."""
    group = parser.add_argument_group("general")
    group.add_argument(
        "--quiet", action="store_true", help="no remarks and no progress on stderr, only warnings"
    )
    group.add_argument("--version", action="version", version=f"%(prog)s {version}")
    in_gb = at_least(0, above=True)
    group.add_argument(
        "--max-memory",
        dest="max_bytes",
        metavar="GB",
        type=lambda text: int(in_gb(text) * 2**30),
        default=DEFAULT_MAX_BYTES,
        help="refuse a file that needs more memory than this for any one thing, such as a net's "
        "weights, a layer's output, a picture; features that need more go to disk (default: 1)",
    )


# ---------------------------------------------------------------------------------- exit status


def command(main):
    """Run `main()` as a command and return its exit status: 0 done, 1 failed, 2 wrong input.

    Ctrl-C and SIGTERM remove unfinished files and end the process with 128 + the signal's number.
    They end it at once: an exception thrown into the middle of TensorFlow may be caught, or
    printed, by whatever runs at that moment.
    """
    name = Path(sys.argv[0]).name
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # it was closed by whoever started the process
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.stdout.reconfigure(errors=_as_it_can.__name__)
    if not sys.flags.dev_mode:  # of libraries about each other; as errors they would end the work
        warnings.simplefilter("ignore")
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except InputError as error:
        print(f"{name}: error: {printable(error)[:MESSAGE_LENGTH]}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of stdout, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if sys.flags.dev_mode:  # python -X dev: show where
            raise
        plain = isinstance(error, WorkError | OSError | MemoryError)
        kind = "" if plain else f"{type(error).__name__}: "
        print(f"{name}: error: {kind}{printable(one_line(error))}", file=sys.stderr)
        return 1


def leave(status):
    """End the process at once with a status: all is written by now.

    Python takes itself apart at the end, and whoever judges one picture waits for that.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # what nobody reads any more
            stream.flush()
    if "ray" in sys.modules:
        sys.exit(status)  # which ends its processes
    os._exit(status)


def _as_it_can(error):
    """What stdout gets for what it cannot encode: a path's odd bytes as they are, else escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)


codecs.register_error(_as_it_can.__name__, _as_it_can)

unfinished_folders = set()  # Paths of the folders in which files are being written


def _stop(number, _frame):
    for folder in unfinished_folders:
        shutil.rmtree(folder, ignore_errors=True)
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
    os._exit(128 + number)


# ------------------------------------------------------------------------------------- messages


def one_line(error):
    """The first line of an exception's message, at most 200 characters, without a full stop."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line.rstrip(".") if len(line) <= 200 else line[:199] + "…"


def printable(text):
    """A text whose control characters and line ends are made visible: \\n, \\x1b."""

    def show(character):
        if character.isprintable() or "\ud800" <= character <= "\udfff":  # a path's odd bytes
            return character
        return character.encode("unicode_escape").decode()

    text = str(text)
    return text if text.isprintable() else "".join(map(show, text))


def encodable(text):
    """A text as `printable` gives it, and a path's odd bytes visible, too: \\udcff."""
    return printable(text).encode("utf-8", "backslashreplace").decode()


def percent(fraction):
    """A fraction, 0..1, as text: 12.34 %."""
    return f"{100 * fraction:.2f} %"


def counted(number, noun):
    """A number of things as text: 1 image, 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def gigabytes(size):
    """So many bytes as text, in GB: to two digits after the point, or two that are not zero."""
    size /= 2**30
    return f"{size:,.2f}".removesuffix(".00") if size >= 0.1 else f"{float(f'{size:.2g}'):.12g}"


def be_quiet(quiet):
    """Whether remarks and progress bars are left out from now on; warnings and errors never are."""
    global _quiet
    _quiet = quiet


_quiet = False


def say(line):
    """Print a remark on stderr, above the progress bar if one is shown."""
    if not _quiet:
        tell(line)


def warn(line):
    """Print a warning on stderr."""
    tell(f"warning: {line}")


def tell(line):
    """Print a line on stderr, even if all is to be quiet."""
    print(printable(line), file=sys.stderr, flush=True)


def track(sequence, description, total=None):
    """Yield from `sequence`; show a progress bar on stderr if that is a terminal."""
    if _quiet or not sys.stderr.isatty():
        yield from sequence
        return
    from rich.console import Console  # here, because nothing else needs rich
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(sequence, total, description=description)
