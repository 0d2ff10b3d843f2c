"""From an untrusted image file to the input of a net."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from defence.base.errors import InputError
from defence.base.files import read_file
from defence.base.limits import DEFAULT_MAX_BYTES, Name, check_fits
from defence.base.text import first_line
from defence.load.guard_image import check_parts, check_tags

if TYPE_CHECKING:
    from PIL import Image

IMAGE_FORMATS = ("PNG", "JPEG")  # Pillow's names
MORE_FORMATS = ("WEBP", "BMP", "GIF")  # only on demand: every decoder may have security holes
ORIENTATION = 0x0112  # the number of this EXIF tag; its values, as names of Image.Transpose:
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
HEX_EXIF = "Raw profile type exif"  # of a PNG: EXIF as ImageMagick writes it
TURNED = ("exif", HEX_EXIF, "xmp", "XML:com.adobe.xmp")  # metadata that tell the orientation


def read_image(
    path: Name, max_bytes: int = DEFAULT_MAX_BYTES, formats: Sequence[str] = IMAGE_FORMATS
) -> Image.Image:
    """Decode the image file at `path`. Return and raise what decode_image does."""
    return decode_image(read_file(path, max_bytes), path, max_bytes, formats)


def decode_image(
    contents: bytes,
    path: Name,
    max_bytes: int = DEFAULT_MAX_BYTES,
    formats: Sequence[str] = IMAGE_FORMATS,
) -> Image.Image:
    """Decode an image file, or an animation's first frame, and apply its EXIF rotation.

    contents: the file's bytes, at most `max_bytes`.  path: its name, for messages.
    max_bytes: of memory; a pixel takes up to twelve until it is an input of a net.
    formats: of IMAGE_FORMATS and MORE_FORMATS; the file's first bytes tell its format.
    Raise InputError where the file is not such an image, is cut short, or too large to decode.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # they are counted below
    check_parts(contents, path, max_bytes)
    try:
        with Image.open(io.BytesIO(contents), formats=tuple(formats)) as opened:
            width, height = opened.size
            size = 12 * width * height
            check_fits(path, f"{width}×{height} pixels", size, max_bytes)
            opened.load()
            # Converted here, where the error of a damaged palette is caught.
            image = opened.convert("RGBA") if opened.mode == "P" else opened
            return _turn_upright(image, path, max_bytes)
    except InputError:
        raise
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path}: not a {' or '.join(formats)} image") from error
    except Exception as error:  # a damaged file can make Pillow raise any exception
        raise InputError(f"{path}: the image is damaged: {first_line(error)}") from error


def _turn_upright(image: Image.Image, path: Name, max_bytes: int) -> Image.Image:
    """Return a copy of an image, turned as its metadata say, and without them.

    ImageOps.exif_transpose turns it the same way, but writes all tags anew, which unfolds them.
    """
    from PIL import Image

    if "exif" not in image.info and (text := image.info.get(HEX_EXIF)):
        image.info["exif"] = bytes.fromhex("".join(text.split("\n")[3:]))
    check_tags(image.info.get("exif", b""), path, max_bytes)
    turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    upright = image.transpose(Image.Transpose[turn]) if turn else image.copy()
    for name in TURNED:
        upright.info.pop(name, None)
    return upright


def make_input(image: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Turn a Pillow image of any size and mode into the input of a net, without alpha.

    shape: (height, width, channels) of the net; channels is 1 (grey) or 3 (RGB).
    Return float32 (height, width, channels), 0..255, resized bicubically where the size differs.
    """
    from PIL import Image

    height, width, channels = shape
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 255
        image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32).reshape(shape)
