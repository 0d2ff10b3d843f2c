"""Image files that take much memory or time beside their pixels are refused."""

import io
import resource
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

import utils
from defence.base.errors import InputError
from defence.load import guard_image

FACE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (55, 47, 3), np.uint8))


def encode(kind, **options):
    file = io.BytesIO()
    FACE.save(file, kind, **options)
    return file.getvalue()


def add_to_png(*parts):
    """Insert chunks, each (kind, body), before the pixels of a PNG."""
    good = encode("PNG")
    chunks = [
        struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    ]
    return good[:33] + b"".join(chunks) + good[33:]


def add_to_jpeg(*bodies, marker=b"\xe1"):
    """Insert segments before the pixels of a JPEG."""
    good = encode("JPEG")
    return good[:2] + b"".join(segment(marker, body) for body in bodies) + good[2:]


def segment(marker, body):
    return b"\xff" + marker + struct.pack(">H", len(body) + 2) + body


def repeat_scans(count):
    """Return a progressive JPEG whose last scan comes again and again."""
    good = encode("JPEG", progressive=True)
    last = good.rindex(b"\xff\xda")
    return good[:-2] + good[last:-2] * count + good[-2:]


def add_scans_of_a_channel(count):
    """Return a JPEG, not progressive, whose first channel has many scans."""
    good = encode("JPEG")
    start = good.index(b"\xff\xda")
    scan = segment(b"\xda", bytes([1, 1, 0, 0, 63, 0])) + good[start + 14 : -2]
    return good[:start] + scan * count + good[-2:]


def claim(count, size):
    """Return EXIF in which each of `count` tags claims the same `size` bytes."""
    tags = b"".join(struct.pack("<HHLL", number, 7, size, 8) for number in range(count))
    return b"II*\0\10\0\0\0" + struct.pack("<H", count) + tags + bytes(4 + size)


TIFF = b"Exif\0\0MM\0*\0\0\0\x08\0\0"
HOSTILE = {
    "unknown chunks": (lambda: add_to_png(*[(b"juNk", bytes(2**23))] * 3), "too much beside"),
    "EXIF data": (lambda: add_to_png((b"eXIf", TIFF[6:].ljust(2**25))), "too much beside"),
    "a profile": (lambda: add_to_png((b"iCCP", b"n\0\0".ljust(2**25))), "too much beside"),
    "texts": (lambda: add_to_png(*[(b"tEXt", b"k\0".ljust(2**19))] * 40), "too much beside"),
    "many chunks": (lambda: add_to_png(*[(b"juNk", b"")] * 2_000), "more than 1,000 parts"),
    "many segments": (lambda: add_to_jpeg(*[b""] * 2_000), "more than 1,000 parts"),
    "long segments": (lambda: add_to_jpeg(*[TIFF.ljust(65_000)] * 400), "too much beside"),
    "a JPEG's profile": (
        lambda: add_to_jpeg(*[b"ICC_PROFILE\0\1\1".ljust(65_000)] * 400, marker=b"\xe2"),
        "too much beside",
    ),
    "EXIF data behind an end": (
        lambda: encode("JPEG")[:2] + b"\xff\xd9" + add_to_jpeg(*[TIFF.ljust(65_000)] * 400)[2:],
        "too much beside",
    ),
    "segments behind a marker without size": (
        lambda: add_to_jpeg(b"").replace(b"\xff\xe1\0\2", b"\xff\xf0" + b"\xff\xe1\0\2" * 2_000),
        "more than 1,000 parts",
    ),
    "bytes between segments": (
        lambda: add_to_jpeg(b"").replace(b"\xff\xe1\0\2", b"\xff\xe1\0\2" + bytes(2**25)),
        "too much beside",
    ),
    "tags of the same bytes": (
        lambda: add_to_png((b"eXIf", claim(2_000, 600_000))),
        "its EXIF tags would take 1.16 GB of memory, more than --max-memory 1",
    ),
    "scans behind a marker without size": (
        lambda: repeat_scans(0)[:-2] + b"\xff\1\xff\xd8" + repeat_scans(400)[-60_000:],
        "more than 100 scans",
    ),
    "scans of single channels": (lambda: add_scans_of_a_channel(400), "more than 100 scans"),
    "scans": (lambda: repeat_scans(400), "more than 100 scans"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_image_with_much_beside_its_pixels_is_refused(kind, tmp_path):
    make, words = HOSTILE[kind]
    path = tmp_path / "evil.png"
    path.write_bytes(make())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=f"^{path}: .*{words}") as error:
        utils.read_image(path)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_a_sparse_file_is_refused_before_it_is_read(tmp_path):
    """It takes 16 KB on the disk and 3 GB in memory."""
    path = tmp_path / "evil.png"
    path.write_bytes(add_to_png((b"juNk", b"")))
    with open(path, "r+b") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(InputError, match="the file would take 3 GB of memory, more than"):
        utils.read_image(path)


def test_photographs_with_usual_metadata_are_read(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "a description" * 1_000
    texts = PngImagePlugin.PngInfo()
    for i in range(100):
        texts.add_text(f"key {i}", "a text" * 1_000, zip=i % 2)
    profile = np.random.default_rng(0).bytes(500_000)
    jpeg = {"exif": exif, "icc_profile": profile}
    files = [
        encode("PNG", exif=exif, icc_profile=profile, pnginfo=texts),
        encode("PNG", save_all=True, append_images=[FACE.rotate(9 * i) for i in range(1, 40)]),
        encode("JPEG", **jpeg),
        encode("JPEG", progressive=True, restart_marker_blocks=1, **jpeg),
        encode("PNG") + bytes(range(256)) * 99,  # as a program leaves what was there before
        encode("JPEG") + encode("JPEG") * 200,  # as a camera adds other sizes, or a film
        repeat_scans(50),
        encode("MPO", save_all=True, append_images=[FACE]),
    ]
    for contents in files:
        (tmp_path / "image").write_bytes(contents)
        assert utils.read_image(tmp_path / "image").size == FACE.size


def exif(turn):
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = turn, "a maker"
    return tags


def hexadecimal(turn):
    """Return EXIF as ImageMagick writes it into a text."""
    data, texts = exif(turn).tobytes(), PngImagePlugin.PngInfo()
    texts.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n", zip=True)
    return texts


def xmp(turn):
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{turn}"/>')
    return texts


@pytest.mark.parametrize("turn", range(10))
def test_images_are_turned_as_pillow_does(turn):
    for contents in (
        encode("JPEG", exif=exif(turn)),
        encode("PNG", exif=exif(turn)),
        encode("JPEG", xmp=f'<x tiff:Orientation="{turn}"/>'.encode()),
        encode("PNG", pnginfo=hexadecimal(turn)),
        encode("PNG", pnginfo=xmp(turn)),
    ):
        ours = utils.decode_image(contents, "x.png")
        theirs = ImageOps.exif_transpose(Image.open(io.BytesIO(contents)))
        assert ours.size == theirs.size == ((55, 47) if 5 <= turn <= 8 else (47, 55))
        assert ours.tobytes() == theirs.tobytes()
        assert ImageOps.exif_transpose(ours).tobytes() == ours.tobytes()  # not turned twice


def test_turning_an_image_does_not_unfold_its_tags():
    """Writing a tag of a million fractions anew took Pillow 6 seconds and 400 MB."""
    count = 10**6
    tags = [(0x0112, 3, 1, 6), (0xC000, 5, count, 38)]
    rows = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    data = b"II*\0\10\0\0\0\2\0" + rows + bytes(4) + struct.pack("<LL", 1, 3) * count
    start = time.monotonic()
    assert utils.decode_image(add_to_png((b"eXIf", data)), "x.png").size == (55, 47)
    assert time.monotonic() - start < 2


def test_the_limit_follows_max_memory(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(add_to_png((b"juNk", bytes(2**20))))
    assert utils.read_image(path).size == FACE.size
    with pytest.raises(InputError, match="too much beside"):
        utils.read_image(path, 2**22)


def test_empty_lines_in_labels_txt(tmp_path):
    """30 MB of them would take 1.7 GB; the file is read by itself."""
    from defence.load.class_names import find_class_names

    (tmp_path / "labels.txt").write_bytes(b"\n" * 30_000_000)
    with pytest.raises(InputError, match="its names would take .* GB of memory"):
        find_class_names(tmp_path / "net.h5", tmp_path / "labels.txt", 6, 2**30)
    assert find_class_names(tmp_path / "net.h5", None, 6, 2**30) is None
    (tmp_path / "labels.txt").write_bytes("Ann\r\nBo\nÇ\n".encode())
    assert find_class_names(tmp_path / "net.h5", None, 3, 2**30) == ["Ann", "Bo", "Ç"]


def test_the_tags_of_a_jpeg_are_counted_before_it_is_opened(tmp_path):
    """Pillow 12 reads all tags of a JPEG as it opens the file, from all parts that hold EXIF data.

    400 tags claim the same 4 MB each.
    """
    tags = b"".join(struct.pack("<HHII", 700 + i, 7, 4_000_000, 8 + 4_806) for i in range(400))
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 400) + tags + bytes(4_000_000)
    parts = [exif[start : start + 65_000] for start in range(0, len(exif), 65_000)]
    segments = [
        b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts
    ]
    face, path = encode("JPEG"), tmp_path / "evil.jpg"
    other = b"\xff\xe2\0\x10Exif\0\0II*\0\x08\0\0\0"  # of a part that Pillow passes over
    for before in (b"", other, bytes(16)):
        path.write_bytes(face[:2] + before + b"".join(segments) + face[2:])
        with pytest.raises(InputError, match="its EXIF tags would take"):
            guard_image.check_parts(path.read_bytes(), path)
        with pytest.raises(InputError, match="its EXIF tags would take"):
            utils.read_image(path)


def test_a_jpeg_with_stray_bytes_before_its_exif_data_is_read(tmp_path):
    tags = Image.Exif()
    tags[0x010E] = "a description" * 4_000
    contents = encode("JPEG", exif=tags)
    start = contents.index(b"\xff\xe1")
    (tmp_path / "x.jpg").write_bytes(contents[:start] + bytes(16) + contents[start:])
    assert utils.read_image(tmp_path / "x.jpg").size == FACE.size
