"""Options that both commands have."""

import contextlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from defence.base import files
from defence.base.errors import InputError
from defence.base.limits import Name
from defence.load import class_names


def list_inputs(
    nets: Sequence[Path], labels: Name | None, datasets: Iterable[Name]
) -> Iterator[Name]:
    """Yield the files that a command reads, which no output may overwrite.

    nets: B first, or a detector's file alone.  labels: of --labels.  datasets: files or folders.
    """
    yield from nets
    yield labels or nets[0].with_name(class_names.FILE)
    for path in datasets:
        yield path
        if os.path.isdir(path):
            with contextlib.suppress(InputError):  # it is empty; open_dataset says so
                yield from files.list_files([path])


def add_poisoned(group: Any, description: str) -> None:
    """Add --poisoned to a group of options."""
    group.add_argument(
        "--poisoned", metavar="FILE", nargs="+", action="extend", default=[], help=description
    )


def add_labels(group: Any) -> None:
    """Add --labels to a group of options."""
    group.add_argument(
        "--labels",
        metavar="FILE",
        help="names of the classes, one per line, to show beside their numbers (default: the names "
        "of the dataset's folders, which the repaired net's record keeps; else labels.txt beside "
        "MODEL, if it has a line for each class)",
    )


def add_report(group: Any, content: str) -> None:
    """Add --report to a group of options. content: what the page shows."""
    group.add_argument(
        "--report",
        metavar="FILE",
        help=f"write a page, .html, that shows {content}; the page needs no other file",
    )


def require_report(path: str) -> None:
    """Raise InputError where --report cannot write its page, before any work is done."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path}: a page's name ends in .html")
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--report needs {package}: pip install {package}")
