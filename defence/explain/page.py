"""Pages: one HTML file that stands alone, of what judging found or of a repair.

The pages themselves are templates in pages/. Names of files and classes are hostile text: Jinja2
escapes all that it is given, and the page forbids itself scripts and the network.
"""

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import io
import shlex
import sys
from pathlib import Path

import numpy as np

from defence.base import files
from defence.base.text import escape_surrogates
from defence.judge.record import VERSION

PAGES = Path(__file__).parent / "pages"
LIBRARIES = ("tensorflow", "keras", "onnxruntime", "numpy")
COMMAND = 500  # characters of the command, shown
SIDE = 128  # pixels of an image on a page, at most
SHOWN_SIDE = 112  # CSS pixels of its longer side
DIM = 0.25  # how bright an image is where the trigger is not


@dataclasses.dataclass
class Image:
    """An image of a page: its address, which holds it all, and its size in CSS pixels."""

    address: str
    width: int
    height: int
    pixels: bool = False  # whether each of its few pixels is to be seen


def write_page(path, template, **told):
    """Write a page into a file. template: its name in pages/.  told: what it tells."""
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
    page = environment.get_template(template)
    text = page.render(style=Markup(style), policy=Markup(policy), **told)
    with files.replace_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def make_visible(value):
    """A value as a page shows it: no character that hides, turns or breaks text."""
    from markupsafe import Markup

    if value is None or isinstance(value, Markup) or not isinstance(value, str):
        return value
    return escape_surrogates(value)


def describe_provenance(**more):
    """What a page says of where it comes from: [(name, value), …], those of `more` first."""
    versions = [f"this tool {VERSION}"]
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    if len(command) > COMMAND:
        command = command[:COMMAND] + " …"
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return [
        *more.items(),
        ("command", command),
        ("versions", ", ".join(versions)),
        ("made", now),
    ]


# --------------------------------------------------------------------------------------- images


def make_image(pixels):
    """An Image of pixels, (height, width, channels) or (height, width), 0..255; none others."""
    from PIL import Image as Pillow

    pixels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    if pixels.ndim == 3:
        pixels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0]
    made = Pillow.fromarray(pixels)
    made.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    made.save(file, "PNG")
    grown = SHOWN_SIDE / max(made.size)
    width, height = (max(1, round(grown * side)) for side in made.size)
    return Image(make_address("image/png", file.getvalue()), width, height, pixels=grown > 1)


def make_lit_image(pixels, places):
    """An Image that is dark but where `places`, (height, width), 0..1, is large."""
    return make_image(pixels * (DIM + (1 - DIM) * places[..., None]))


def make_chart(svg, size):
    """An Image of a chart, SVG as bytes. size: its width and height in inches."""
    return Image(make_address("image/svg+xml", svg), *(round(96 * side) for side in size))


def make_address(kind, contents):
    return f"data:{kind};base64,{base64.b64encode(contents).decode()}"
