"""Pictures: files of other people, decoded with care, and made the input of a net."""

import numpy as np

from defence.base.errors import InputError
from defence.base.files import require_file
from defence.base.limits import DEFAULT_MAX_BYTES, check_fits
from defence.base.text import first_line

IMAGE_FORMATS = ("PNG", "JPEG")  # as Pillow calls them
MORE_FORMATS = ("WEBP", "BMP", "GIF")  # only if asked for: each decoder may have holes of its own


def read_image(path, max_bytes=DEFAULT_MAX_BYTES, formats=IMAGE_FORMATS):
    """Decode a picture's file. Returns and raises what decode_picture does."""
    return decode_image(require_file(path), path, max_bytes, formats)


def decode_image(file, path, max_bytes=DEFAULT_MAX_BYTES, formats=IMAGE_FORMATS):
    """Decode a picture's file. Returns a Pillow image, turned as its EXIF rotation says.

    file: its path, or a binary file open to read.  path: its name, for messages.
    max_bytes: of memory; a pixel takes up to twelve of them until it is an input of a net.
    formats: of PICTURE_FORMATS and MORE_FORMATS. The file's first bytes tell which it is, not its
    name; of an animation the first frame is decoded.
    Raises InputError where the file is not such a picture, is cut short, or too large to decode.
    """
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # they are counted below
    try:
        with Image.open(file, formats=formats) as picture:
            width, height = picture.size
            size = 12 * width * height
            check_fits(path, f"{width}×{height} pixels", size, max_bytes)
            picture.load()
            if picture.mode == "P":  # here, where a damaged palette is noticed
                picture = picture.convert("RGBA")
            return ImageOps.exif_transpose(picture)
    except InputError:
        raise
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path}: not a {' or '.join(formats)} picture") from error
    except Exception as error:  # Pillow raises whatever the damage leads to
        raise InputError(f"{path}: the picture is damaged: {first_line(error)}") from error


def make_input(picture, shape):
    """Make a Pillow image of any size and mode the input of a net.

    shape: (height, width, channels) of the net; channels is 1 (grey) or 3 (RGB). Alpha is dropped.
    Returns float32 (height, width, channels), 0..255, resized bicubically where the size differs.
    """
    from PIL import Image

    height, width, channels = shape
    if picture.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
        picture = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
    picture = picture.convert("RGB" if channels == 3 else "L")
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture, np.float32).reshape(shape)
