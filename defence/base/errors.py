"""The two errors that a command reports as one line."""


class InputError(Exception):
    """The input or the call is wrong: exit status 2. The message, one line, names the file."""


class WorkError(Exception):
    """The work failed, though the input is valid: exit status 1. The message is one line."""
