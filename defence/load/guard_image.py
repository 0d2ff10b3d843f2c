"""What a PNG or JPEG file may contain beside its pixels. guard.py has the list of all guards.

Pillow reads every part of a file, some of them several times: 10 MB of the smallest parts took it
300 MB, 100 MB of EXIF data 0.8 GB. It decodes all scans of a progressive JPEG one after the other.
"""

import re
import struct
from collections.abc import Iterator

from defence.base.errors import InputError
from defence.base.limits import DEFAULT_MAX_BYTES, Name, check_fits

BESIDE = 2**24  # bytes beside the pixels: profiles, EXIF data, texts, thumbnails
COPIES = 10  # that Pillow makes of them
PARTS = 1_000  # besides those that hold pixels
PIXEL_PARTS = 10**6  # Pillow writes 64 KB of pixels into one, others 8 KB
SCANS = 100  # of a JPEG; usual progressive ones have 10
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
EXIF = b"Exif\0\0"  # the first bytes of a part of a JPEG that has EXIF data
PIXELS = {b"IDAT", b"fdAT", b"fcTL"}  # parts of a PNG, the last two of its animation
SCAN, END, APP1 = 0xDA, 0xD9, 0xE1  # markers of a JPEG
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of an image's size and channels
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
ALONE = {0x01, 0xC8, 0xD8, END, *range(0xF0, 0xFE)}  # markers that no size follows
MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)  # after a scan's data


def check_parts(contents: bytes, path: Name, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
    """Raise InputError where a PNG or JPEG has much beside its pixels, or many scans.

    contents: the file's bytes.  path: for messages.  max_bytes: of memory.
    """
    list_parts = _list_png if contents.startswith(PNG) else _list_jpeg
    beside, counts, exif_parts = 0, {True: 0, False: 0}, []
    limits = {True: PIXEL_PARTS if list_parts is _list_png else SCANS, False: PARTS}
    for has_pixels, size, exif in list_parts(contents):
        exif_parts.append(exif)
        counts[has_pixels] += 1
        beside += 0 if has_pixels else size
        if counts[has_pixels] > limits[has_pixels]:
            what = "scans or parts with pixels" if has_pixels else "parts beside its pixels"
            raise InputError(f"{path}: the image has more than {limits[has_pixels]:,} {what}")
        if beside > BESIDE or COPIES * beside > max_bytes:
            raise InputError(
                f"{path}: the image has too much beside its pixels, such as EXIF data or a "
                "profile; save it without"
            )
    # Pillow reads the tags of a JPEG as it opens the file.
    check_tags(b"".join(exif_parts), path, max_bytes)


def check_tags(exif: bytes, path: Name, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
    """Raise InputError where EXIF tags could claim more than `max_bytes` together.

    Before version 13, Pillow copies all that each tag claims, even if all claim the same bytes.
    """
    exif = re.sub(rb"^(Exif\0\0){1,2}", b"", exif)
    order = "<" if exif[:2] == b"II" else ">"
    (start,) = struct.unpack(f"{order}I", exif[4:8].ljust(4, b"\0"))
    (tags,) = struct.unpack(f"{order}H", exif[start : start + 2].ljust(2, b"\0"))
    check_fits(path, "its EXIF tags", tags * len(exif), max_bytes)


def _list_png(contents: bytes) -> Iterator[tuple[bool, int, bytes]]:
    """Yield (whether it holds pixels, size, no EXIF data) of each part of a PNG, until its end."""
    place, kind = len(PNG), b""
    while place + 8 <= len(contents) and kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", contents, place)
        yield kind in PIXELS, size, b""
        place += 12 + size


def _list_jpeg(contents: bytes) -> Iterator[tuple[bool, int, bytes]]:
    """Yield (whether it is a scan, size, EXIF data) of each part; nothing for another file.

    Before the first scan Pillow reads on behind an end, and reads bytes between parts one by one.
    A scan of all channels is the only one, except in a progressive JPEG: what follows is not read.
    """
    place, scans = len(JPEG) if contents.startswith(JPEG) else len(contents), 0
    frame, channels = 0, b""
    while (marker := MARKER.search(contents, place)) and not (scans and marker[1][0] == END):
        between, kind = 0 if scans else marker.start(1) - 1 - place, marker[1][0]
        place, size, exif = marker.end(), 0, b""
        if between:
            yield False, between, b""
        if kind in FRAMES:
            frame, channels = kind, contents[place + 7 : place + 8]
        whole = frame not in PROGRESSIVE and channels == contents[place + 2 : place + 3]
        if kind not in ALONE:
            (size,) = struct.unpack(">H", contents[place : place + 2].rjust(2, b"\0"))
            if kind == APP1 and contents.startswith(EXIF, place + 2):
                exif = contents[place + 2 + len(EXIF) : place + size]
            place += max(2, size)
        scans += kind == SCAN
        yield kind == SCAN, size, exif
        if kind == SCAN and whole:
            return
    if not scans:
        yield False, max(0, len(contents) - place), b""
