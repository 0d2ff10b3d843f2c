"""The list of the detectors' files that this user made: the files that may judge for B and G.

A detector's file beside B and G names the nets that it was made from, but whoever wrote it could
name any nets and let it answer anything. So a file judges in the place of B and G only if its
SHA-256 is in a list that nobody else can write.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from defence.base.progress import warn

LIST = Path("badnet-defence", "exported-detectors")  # in the folder of this user's state


def find_list() -> Path:
    """Return the path of the list, after the XDG Base Directory Specification."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / LIST


def add_export(contents: bytes) -> None:
    """Put the SHA-256 of a detector's file in the list, or warn where that fails."""
    try:
        if is_export(contents):
            return
        path = find_list()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(path, flags, 0o600), "w") as file:
            file.write(f"{hashlib.sha256(contents).hexdigest()}\n")
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        warn(f"the list of exported detectors cannot be written ({error}); Keras will judge")


def is_export(contents: bytes) -> bool:
    """Return whether the list has a detector's file, by its SHA-256.

    A list that another user owns or may write counts as empty.
    """
    try:
        with open(path := find_list()) as file:
            status = os.fstat(file.fileno())
            mine = not hasattr(os, "getuid") or status.st_uid == os.getuid()
            if stat.S_ISREG(status.st_mode) and mine and not status.st_mode & 0o022:
                return hashlib.sha256(contents).hexdigest() in file.read().split()
    except (FileNotFoundError, RuntimeError):
        return False
    except (OSError, UnicodeDecodeError) as error:
        warn(f"{find_list()}: cannot be read: {error}")
        return False
    warn(f"{path}: another user owns it or may write it, so it is not used; delete it")
    return False
