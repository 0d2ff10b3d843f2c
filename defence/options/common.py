"""Options that both commands have."""

import importlib.util
from pathlib import Path
from typing import Any

from defence.base.errors import InputError


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
        help="names of the classes, one per line, to show beside their numbers (default: "
        "labels.txt beside MODEL, if it exists)",
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
