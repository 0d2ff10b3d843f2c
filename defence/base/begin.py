"""What a script runs before its imports: on any Python 3, without a package or other code of ours.

So this file keeps to what Python 3.6 reads.
"""

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OLDEST = (3, 10)


def begin(needs: str) -> None:
    """Let Ctrl-C end the imports without a word, and end a script that cannot run with one line.

    needs: the versions of Python that the script needs.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # until run_command takes over
    if sys.version_info < OLDEST:
        version = ".".join(map(str, sys.version_info[:2]))
        _fail(f"this is Python {version}, which is too old; use {needs}; type: {list_commands()}")
    if not sys.flags.dev_mode:  # python -X dev: show where
        sys.excepthook = _explain_missing


def describe_missing(error: ModuleNotFoundError) -> str:
    """Say which package is not installed, and what to type."""
    return f"{error.name} is not installed for this Python; type: {list_commands()}"


def list_commands() -> str:
    """Return what to type for an environment that has the packages, as README.md says."""
    folder = "" if os.getcwd() == str(ROOT) else f"cd {shlex.quote(str(ROOT))} && "
    activate = ". .venv/bin/activate"
    install = "python -m pip install -r requirements.txt"
    inside, old = sys.prefix != sys.base_prefix, sys.version_info < OLDEST
    if inside and not old:
        return folder + install
    if not inside and (ROOT / ".venv" / "bin" / "activate").exists():
        return folder + activate
    python = "python3.12" if old else "python3"
    return f"{folder}{python} -m venv --clear .venv && {activate} && {install}"


def _explain_missing(kind: type, error: BaseException, trace: Any) -> None:
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("defence"):
        _fail(describe_missing(error))
    sys.__excepthook__(kind, error, trace)


def _fail(problem: str) -> None:
    sys.exit(f"{os.path.basename(sys.argv[0])}: error: {problem}")
