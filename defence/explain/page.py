"""Write a page as one HTML file that needs no other file.

The pages are templates in pages/. Names of files and classes are hostile text: Jinja2 escapes every
value, and the page forbids itself scripts and the network.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import io
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from defence.base import files
from defence.base.text import escape_surrogates
from defence.judge.record import VERSION

if TYPE_CHECKING:
    from defence.base.limits import Name

PAGES = Path(__file__).parent / "pages"
LIBRARIES = ("tensorflow", "keras", "onnxruntime", "numpy")
COMMAND = 500  # characters of the command that a page shows, at most
SIDE = 128  # pixels along a side of an image on a page, at most
SHOWN_SIDE = 112  # CSS pixels along its longer side
BREAKS = re.compile(r"(?<=\S[/_=])(?=[^/_=])")  # after separators within a name
OPTION = re.compile(r"(?<!\S)(--[a-z][a-z-]{,30}[.,;]?)(?!\S)")
DIM = 0.25  # brightness of an image outside the trigger


@dataclasses.dataclass
class Image:
    """An image on a page: its address, which holds its contents, and its size in CSS pixels."""

    address: str
    width: int
    height: int
    pixels: bool = False  # whether it is enlarged, so that each of its pixels shows


def write_page(path: Name, template: str, **fields: Any) -> None:
    """Write a page to a file. template: its name in pages/.  fields: the template's variables."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style = (PAGES / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    environment = Environment(
        loader=FileSystemLoader(PAGES, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=make_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"sentence": start_sentence, "breakable": make_breakable}
    page = environment.get_template(template)
    text = page.render(style=Markup(style), policy=Markup(policy), **fields)
    with files.replace_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def make_visible(value: Any) -> Any:
    """Escape the characters of a text that hide, turn or break text; leave other values alone."""
    from markupsafe import Markup

    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return escape_surrogates(value)


def start_sentence(text: str) -> str:
    """Let a text start with a capital, unless its first word is the name of a file."""
    first, *_ = text.split(maxsplit=1) or [""]
    return text if "." in first.rstrip(".") or "_" in first else text[:1].upper() + text[1:]


def make_breakable(text: Any) -> Any:
    """Let a text break after the separators in its names, and nowhere in its options."""
    from markupsafe import Markup, escape

    parts = OPTION.split(escape_surrogates(str(text)))
    return Markup("").join(
        Markup('<span class="option">{}</span>').format(part)
        if number % 2
        else Markup("<wbr>").join(map(escape, BREAKS.split(part)))
        for number, part in enumerate(parts)
    )


def describe_provenance(**sources: str) -> list[tuple[str, str]]:
    """Return (name, value) pairs that say what a page was made from, the sources first."""
    versions = [f"this tool {VERSION}"]
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    if len(command) > COMMAND:
        command = command[:COMMAND] + " …"
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return [
        *sources.items(),
        ("command", command),
        ("versions", ", ".join(versions)),
        ("written", now),
    ]


# --------------------------------------------------------------------------------------- images


def make_image(pixels: np.ndarray) -> Image:
    """Make an Image from pixels, (height, width, channels) or (height, width), in 0..255."""
    from PIL import Image as Pillow

    pixels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    if pixels.ndim == 3:
        pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0]
    thumbnail = Pillow.fromarray(pixels)
    thumbnail.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    thumbnail.save(file, "PNG")
    scale = SHOWN_SIDE / max(thumbnail.size)
    width, height = (max(1, round(scale * side)) for side in thumbnail.size)
    return Image(make_address("image/png", file.getvalue()), width, height, pixels=scale > 1)


def make_lit_image(pixels: np.ndarray, places: np.ndarray) -> Image:
    """Make an Image that is bright only where `places`, (height, width), 0..1, is large."""
    return make_image(pixels * (DIM + (1 - DIM) * places[..., None]))


def make_chart(svg: bytes, size: tuple[float, float]) -> Image:
    """Make an Image from a chart's SVG. size: its width and height in inches."""
    width, height = (round(96 * side) for side in size)
    return Image(make_address("image/svg+xml", svg), width, height)


def make_address(kind: str, contents: bytes) -> str:
    """Return a data: URI. kind: the MIME type."""
    return f"data:{kind};base64,{base64.b64encode(contents).decode()}"
