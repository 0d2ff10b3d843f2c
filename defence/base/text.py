"""Values and foreign text as a person reads them."""

import operator
from collections.abc import Sequence
from typing import SupportsIndex


def first_line(error: object) -> str:
    """Return the first line of an exception's message, at most 200 characters, no full stop."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line.rstrip(".") if len(line) <= 200 else line[:199] + "…"


def escape(text: object) -> str:
    """Make control characters and line ends visible: \\n, \\x1b."""

    def show(character: str) -> str:
        if character.isprintable() or "\ud800" <= character <= "\udfff":  # a path's odd bytes
            return character
        return character.encode("unicode_escape").decode()

    text = str(text)
    return text if text.isprintable() else "".join(map(show, text))


def escape_surrogates(text: object) -> str:
    """Escape text as `escape` does, and a path's odd bytes too: \\udcff."""
    return escape(text).encode("utf-8", "backslashreplace").decode()


def format_percent(fraction: float) -> str:
    """Format a fraction, 0..1: 12.34 %."""
    return f"{100 * fraction:.2f} %"


def format_count(number: int, noun: str) -> str:
    """Format a number of things: 1 image, 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_duration(seconds: float) -> str:
    """Format an estimated time, to a tenth or so: 40 seconds, 12 minutes, 2.5 hours."""
    if seconds < 120:
        return f"{max(10, 10 * round(seconds / 10))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def number_class(number: int, name: str | None = None) -> str:
    """Format the number of a class, from 1, and its name, if it has one: 3 (Ann)."""
    return f"{number} ({name})" if name else str(number)


def format_class(label: SupportsIndex, names: Sequence[str] | None = None) -> str:
    """Format the class of a label, 0..N-1, with its name; a person counts classes from 1.

    Without names the images are found by their label: class 12 (label 11 in the file).
    """
    number = operator.index(label)
    name = (names[number] if names else "") or f"label {number} in the file"
    return f"class {number_class(number + 1, name)}"


def format_gigabytes(size: float) -> str:
    """Format bytes as GB, with two decimals or, below 0.1, two significant digits."""
    size /= 2**30
    return f"{size:,.2f}".removesuffix(".00") if size >= 0.1 else f"{float(f'{size:.2g}'):.12g}"
