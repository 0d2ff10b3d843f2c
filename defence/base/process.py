"""The life of a command's process: its exit status, Ctrl-C, and how it ends."""

import codecs
import contextlib
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from defence.base.begin import describe_missing
from defence.base.errors import InputError, WorkError
from defence.base.progress import is_quiet
from defence.base.text import escape, first_line

MESSAGE_LENGTH = 1_000  # characters of an error that are shown; a hostile file can make it long

# What a person or a batch system sends, and what ends a process that does not handle it. Faults are
# the system's; Python turns SIGPIPE and SIGXFSZ (a file beyond `ulimit -f`) into an OSError.
_NAMES = (
    *("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM"),
    *("SIGVTALRM", "SIGPROF", "SIGPOLL", "SIGPWR", "SIGBREAK"),
)
STOP_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]

unfinished_folders: set[Path] = set()  # folders in which files are being written
saved_files: dict[Path, None] = {}  # that this process wrote, in their order
stderr = 2  # its file descriptor, which startup.py moves while it holds back what others write
_unsaved = ""  # what is true where a signal comes before the first of them


def run_command(main: Callable[[], int | None], unsaved: str = "") -> int:
    """Run `main()` as a command and return its exit status: 0 done, 1 failed, 2 wrong input.

    STOP_SIGNALS, such as Ctrl-C, remove unfinished files and end the process with 128 + the number.
    They end it at once, because TensorFlow may catch or print an exception that is thrown into it,
    and say what they leave.  unsaved: in words, where no file is written yet.
    """
    global _unsaved
    _unsaved = unsaved
    name = escape(Path(sys.argv[0]).name)
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # whoever started the process closed it
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
    for number in STOP_SIGNALS:
        always = number in (signal.SIGINT, signal.SIGTERM)
        if always or signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _stop)
    # On a terminal an odd byte of a path might begin a command to it; a program wants it as it is.
    errors = "backslashreplace" if sys.stdout.isatty() else _escape_unencodable.__name__
    sys.stdout.reconfigure(errors=errors)  # type: ignore[union-attr]
    if not sys.flags.dev_mode:  # libraries warn about each other; as errors they would end the work
        warnings.simplefilter("ignore")
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except InputError as error:
        print(f"{name}: error: {escape(error)[:MESSAGE_LENGTH]}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of stdout, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if sys.flags.dev_mode:  # python -X dev: show where
            raise
        plain = isinstance(error, WorkError | OSError | MemoryError)
        kind = "" if plain else f"{type(error).__name__}: "
        problem = kind + first_line(error)
        if isinstance(error, ModuleNotFoundError):
            problem = describe_missing(error)
        print(f"{name}: error: {escape(problem)}", file=sys.stderr)
        return 1


def exit_now(status: int) -> None:
    """End the process at once with a status. All output is written by now.

    Python takes a while to take itself apart, and whoever judges one image waits for it.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    if "ray" in sys.modules:
        sys.exit(status)  # which ends Ray's processes
    os._exit(status)


def _escape_unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Give stdout a path's odd bytes as they are, and escapes for all else it cannot encode."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)


codecs.register_error(_escape_unencodable.__name__, _escape_unencodable)


def _stop(number: int, _frame: FrameType | None) -> None:
    for folder in list(unfinished_folders):
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # the terminal is gone
        if os.isatty(stderr):
            os.write(stderr, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
        if not is_quiet():
            os.write(stderr, f"{_describe_stop(number)}\n".encode("ascii", "backslashreplace"))
    os._exit(128 + number)


def _describe_stop(number: int) -> str:
    """Say that a signal ended the command, and which files it leaves."""
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    saved = ", ".join(escape(path) for path in saved_files if path.exists())
    left = f"; saved: {saved}" if saved else _unsaved and f"; {_unsaved}"
    return f"{escape(Path(sys.argv[0]).name)}: {what}{left}"
