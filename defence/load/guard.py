"""Check the content of an untrusted file before a library that trusts it reads it.

The guards are in six files. This is the order in which they run:

guard.py, for any file
    check_fits         (base/limits.py) what the file declares takes at most --max-memory
    inspect_file       reading what it declares takes little more address space than that
    open_archive       .keras: three known members, uncompressed, none twice, nothing beside them

guard_hdf5.py, for an HDF5 file
    check_heaps        the heaps of texts have an end
    rehearse           reading it has an end, and does not crash the process
    check_links        one tree, no link to another file
    check_stored       an array is as large in the file as declared; known filters only
    read_text          an attribute is one text
    read_texts         it is text, and not longer than JSON may be

guard.py, for JSON text
    parse_json         short, no NaN

guard_model.py, for the weights of a Keras model
    read_shapes        the arrays of its weights, by check_links and check_stored

guard_config.py, for the config of a Keras model
    check_config       allowed layers and activations only, each in its place; numbers, names and
                       calls of layers within bounds

guard_model.py, for the net
    limit_weights      no weight is allocated beyond --max-memory while Keras builds the net
    check_classifier   one image in, a row of class scores out
    check_outputs      one row for one image; no layer's output for it is beyond --max-memory,
                       also, after check_finite, in a nested model or behind plain arithmetic
    check_shapes       the file's arrays have the shapes of the net's weights
    check_finite       no weight is NaN or infinite
    check_prepared     the layers that prepare an image give the declared shapes for one image
    check_step_fits    (beyond/memory.py) no training step is beyond --max-memory

guard_onnx.py, for a detector's .onnx file
    check_onnx         one image in, a detector's answers out; allowed operators only, no other
                       file, no output for one image beyond --max-memory

guard_image.py, for an image
    check_parts        little beside its pixels, few scans
    check_tags         its EXIF tags cannot claim more than --max-memory

images.decode_image also counts an image's pixels, and record.parse_record guards repair records.
A guard raises InputError, one line that begins with the file's name.
"""

import contextlib
import json
import struct
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from defence.base.errors import InputError
from defence.base.limits import DEFAULT_MAX_BYTES, Name, check_fits
from defence.base.text import first_line

TEXT_LENGTH = 2**23  # characters; the config of keras.applications.EfficientNetV2L has 964,217
MEMBERS = {"metadata.json", "config.json", "model.weights.h5"}
# The records at an archive's end, up to the comment, which Keras does not write: the last one, and
# two before it in a large archive (ZIP64). And a member's header. The names are PKWARE's.
END, LOCATOR, END_64 = "<4s4H2LH", "<4sLQL", "<4sQ2H2L4Q"
HEADER = "<4s5H3L2H"
NOT_KERAS = "not a .keras archive as Keras writes it"


@contextlib.contextmanager
def inspect_file(path: Name, max_bytes: int = DEFAULT_MAX_BYTES) -> Iterator[None]:
    """Run a block that reads declarations of a file; turn any exception into an InputError.

    On Linux the block may take little more than `max_bytes` of address space. That bounds the
    memory that a library allocates on its own, which the other guards cannot check.
    """
    try:
        with _limit_address_space(max_bytes):
            yield
    except (InputError, ModuleNotFoundError):  # h5py itself may be absent
        raise
    except Exception as error:  # libhdf5, h5py and zipfile can raise any exception
        if isinstance(error, MemoryError) or "allocat" in str(error):
            problem = "reading it takes more memory than --max-memory allows"
            raise InputError(f"{path}: {problem}") from error
        raise InputError(f"{path}: damaged or of another format: {first_line(error)}") from error


@contextlib.contextmanager
def _limit_address_space(max_bytes: int) -> Iterator[None]:
    try:
        import resource

        with open("/proc/self/statm") as sizes:
            used = int(sizes.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = used + max_bytes + 2**28  # room for what Python itself needs: without it, it may crash
    most = most if soft == resource.RLIM_INFINITY else min(soft, most)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def open_archive(
    file: BinaryIO, path: Name, max_bytes: int = DEFAULT_MAX_BYTES
) -> Iterator[zipfile.ZipFile]:
    """Open a .keras file: a ZipFile with members of MEMBERS, as Keras writes them.

    file: the archive, a binary file open to read.  path: its name, for messages.
    """
    start = _find_directory(file, path)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        for member in members:
            name = member.filename
            if name not in MEMBERS:
                raise InputError(f"{path}: {NOT_KERAS}: contains {name!r}")
            if names.count(name) > 1:
                raise InputError(f"{path}: {NOT_KERAS}: contains {name!r} more than once")
            check_fits(path, name, member.file_size, max_bytes)
            stored = member.compress_type == zipfile.ZIP_STORED
            if not stored or member.compress_size != member.file_size or member.flag_bits & 1:
                raise InputError(f"{path}: {name} is compressed or encrypted; Keras does neither")
        _check_headers(file, path, members, start)
        yield archive


def _find_directory(file: BinaryIO, path: Name) -> int:
    """Return where the directory of an archive begins. Raise InputError unless it is a small one.

    Only the records at the end count, and each must be where zipfile looks for it: otherwise
    another reader, or another version of zipfile, would find other members.
    """
    length = file.seek(0, 2)
    sizes = [struct.calcsize(record) for record in (END_64, LOCATOR, END)]
    file.seek(-min(sum(sizes), length), 2)
    tail = file.read().rjust(sum(sizes), b"\0")
    end_64, locator, end = (
        struct.unpack_from(record, tail, sum(sizes[:number]))
        for number, record in enumerate((END_64, LOCATOR, END))
    )
    signature, disk, first_disk, here, count, size, start, comment = end
    stop = length - sizes[2]
    valid = signature == b"PK\5\6" and comment == 0
    if locator[0] == b"PK\6\7":  # what it leads to overrules the last record
        stop -= sizes[0] + sizes[1]
        disks, (disk, first_disk, here, count, size, start) = locator[3], end_64[4:]
        valid &= end_64[0] == b"PK\6\6" and locator[1:3] == (0, stop) and disks == 1
    valid &= (disk, first_disk) == (0, 0) and here == count <= len(MEMBERS)
    if not valid or size > 1_000 or start + size != stop:
        raise InputError(f"{path}: {NOT_KERAS}")
    return start


def _check_headers(file: BinaryIO, path: Name, members: list[zipfile.ZipInfo], start: int) -> None:
    """Raise InputError unless members follow each other, with headers that say what zipfile read.

    zipfile believes the directory, but other readers the headers.  start: of the directory.
    """
    place, gaps = 0, {0}  # where the member before ended, and what may lie behind it
    for member in sorted(members, key=lambda member: member.header_offset):
        file.seek(member.header_offset)
        header = file.read(struct.calcsize(HEADER)).ljust(struct.calcsize(HEADER), b"\0")
        signature, _, flags, method, _, _, _, stored, size, length, extra = struct.unpack(
            HEADER, header
        )
        late = (flags | member.flag_bits) & 8  # its sizes come behind it
        sizes = {member.file_size, 0xFFFFFFFF} | ({0} if late else set())
        same = signature == b"PK\3\4" and file.read(length) == member.filename.encode()
        same &= method == member.compress_type and not flags & 1 and {stored, size} <= sizes
        if not same or member.header_offset - place not in gaps:
            raise InputError(f"{path}: {NOT_KERAS}: {member.filename} is not as declared")
        place = member.header_offset + len(header) + length + extra + member.file_size
        gaps = {12, 16, 20, 24} if late else {0}
    if start - place not in gaps:
        raise InputError(f"{path}: {NOT_KERAS}: contains more than its members")


def parse_json(text: str | bytes, path: Name) -> Any:
    """Parse JSON of at most TEXT_LENGTH characters. Raise InputError if that fails."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    if len(text) > TEXT_LENGTH:
        raise InputError(f"{path}: its JSON is longer than {TEXT_LENGTH:,} characters")
    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: its JSON cannot be read") from error
