"""Names of classes: a text file with a name on each line, in the order of the labels."""

from pathlib import Path

from defence.base import files
from defence.base.errors import InputError
from defence.base.limits import check_fits
from defence.base.progress import say
from defence.base.text import format_count

FILE = "labels.txt"


def find_class_names(model, given, classes, max_bytes):
    """The names of a net's classes, [text, …], or None where there are none.

    model: the net's path.  given: the file that was named; if None it is labels.txt beside the
    net, which is passed over where it has not a line for each class.  classes: N.
    Raises InputError where the file that was named cannot be read, or has another number of lines.
    """
    path = Path(model).with_name(FILE) if given is None else Path(given)
    if given is None and not (path.is_file() and path.stat().st_size):
        return None
    names = read_class_names(path, max_bytes)
    if len(names) == classes:
        return names
    problem = f"{path}: has {format_count(len(names), 'name')}, and the net {classes} classes"
    if given is not None:
        raise InputError(problem)
    say(f"{problem}; not used")
    return None


def read_class_names(path, max_bytes):
    """The lines of a text file, UTF-8. Raises InputError where it cannot be read or is large."""
    files.require_file(path)
    try:
        check_fits(path, "its names", path.stat().st_size, max_bytes)
        lines = path.read_text("utf-8").split("\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror.lower()}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not a text in UTF-8") from error
    return [line.strip() for line in (lines[:-1] if lines[-1] == "" else lines)]


def name_class(verdict, names):
    """What a class that is printed, 1 to N + 1, is called."""
    return [*names, "poisoned"][verdict - 1]
