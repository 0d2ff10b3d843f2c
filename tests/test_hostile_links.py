"""Hostile files that point at other files or contradict themselves are refused."""

import io
import shutil
import struct
import zipfile

import h5py
import numpy as np
import pytest
from hostile import FORMATS, KERNELS, SECRET, copy_net, edit_hdf5, replace, write_archive

import utils

# ------------------------------------------------------------------------------- other files


def external_link(group, key):
    group[key] = h5py.ExternalLink("elsewhere.h5", "/kernel")


def soft_link(group, key):
    group[key] = h5py.SoftLink("/somewhere")


def external_storage(group, key):
    group.create_dataset(key, (3, 3, 40, 60), "f4", external=[("secret", 0, 86_400)])


def virtual(group, key):
    layout = h5py.VirtualLayout((3, 3, 40, 60), "f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "kernel", (3, 3, 40, 60))
    group.create_virtual_dataset(key, layout)


def loop(group, key):
    group[key] = group.parent


def twice(group, key):
    group[key] = np.zeros((3, 3, 40, 60), "f4")
    group["again"] = group[key]


ELSEWHERE = {
    external_link: "is a soft or external link",
    soft_link: "is a soft or external link",
    external_storage: "is stored in another file",
    virtual: "is stored in another file",
    loop: "is a second name of another object",
    twice: "is a second name of another object",
}


def test_h5py_follows_the_links_refused_below(tmp_path):
    secret = np.frombuffer(SECRET[:64], "f4")
    (tmp_path / "secret").write_bytes(SECRET)
    with h5py.File(tmp_path / "elsewhere.h5", "w") as file:
        file["kernel"] = secret
    with h5py.File(tmp_path / "evil.h5", "w") as file:
        file["link"] = h5py.ExternalLink("elsewhere.h5", "/kernel")
        file.create_dataset("stored", (16,), "f4", external=[(str(tmp_path / "secret"), 0, 64)])
        layout = h5py.VirtualLayout((16,), "f4")
        layout[:] = h5py.VirtualSource("elsewhere.h5", "kernel", (16,))
        file.create_virtual_dataset("virtual", layout)
    with h5py.File(tmp_path / "evil.h5") as file:
        for name in ("link", "stored", "virtual"):
            assert np.array_equal(file[name][:], secret), name


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("put", ELSEWHERE, ids=lambda put: put.__name__)
def test_a_model_that_reads_elsewhere(put, suffix, good, check_refused, tmp_path):
    check_refused(replace(copy_net(good, tmp_path, suffix), put), ELSEWHERE[put])


@pytest.mark.parametrize("name", ["data", "label", "unread"])
@pytest.mark.parametrize("put", ELSEWHERE, ids=lambda put: put.__name__)
def test_a_dataset_that_reads_elsewhere(put, name, good, check_refused, tmp_path):
    path = shutil.copy(good / "data.h5", tmp_path / "evil.h5")
    with h5py.File(path, "r+") as file:
        file["unread"] = 1
    check_refused(replace(path, put, name), ELSEWHERE[put], data=True)


# ---------------------------------------------------------------------------------------- zip


ARCHIVES = {
    "path traversal": ({"../canary": "x"}, "contains '../canary'"),
    "absolute path": ({"/tmp/canary": "x"}, "contains '/tmp/canary'"),
    "assets": ({"assets/vocabulary.txt": "x"}, "contains 'assets/vocabulary.txt'"),
    "many members": ({f"{i}": "" for i in range(70_000)}, "not a .keras archive"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_of_other_members(kind, good, check_refused, tmp_path):
    extra, words = ARCHIVES[kind]
    archive = zipfile.ZipFile(good / "b.keras")
    members = {name: archive.read(name) for name in archive.namelist()}
    members.pop("metadata.json")
    check_refused(write_archive(tmp_path / "evil.keras", {**members, **extra}), words)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_of_tricks(good, check_refused, tmp_path):
    path, archive = tmp_path / "evil.keras", zipfile.ZipFile(good / "b.keras")
    config, weights = (archive.read(name) for name in ("config.json", "model.weights.h5"))
    evil = config.replace(b"Activation", b"LambdaHere")
    twice = [("config.json", config), ("model.weights.h5", weights), ("config.json", evil)]
    check_refused(write_archive(path, twice), "contains 'config.json' more than once")

    zeros = {"config.json": b" " * 50_000_000 + config, "model.weights.h5": weights}
    check_refused(write_archive(path, zeros, zipfile.ZIP_DEFLATED), "is compressed")
    long = {"config.json": b" " * 9_000_000 + config, "model.weights.h5": weights}
    check_refused(write_archive(path, long), "JSON is longer")

    # The directory declares 3 GB for a few bytes.
    write_archive(path, {"config.json": config, "model.weights.h5": weights})
    contents = bytearray(path.read_bytes())
    entry = contents.rindex(b"PK\1\2")
    contents[entry + 24 : entry + 28] = (3 * 2**30).to_bytes(4, "little")
    path.write_bytes(contents)
    check_refused(path, "GB of memory")
    contents[entry + 24 : entry + 28] = (len(weights) + 10**6).to_bytes(4, "little")
    path.write_bytes(contents)
    check_refused(path, "compressed or encrypted")

    write_archive(path, {"config.json": config, "model.weights.h5": weights})
    contents = bytearray(path.read_bytes())
    contents[contents.rindex(b"PK\1\2") + 8] |= 1  # "encrypted"
    path.write_bytes(contents)
    check_refused(path, "compressed or encrypted")
    check_refused(write_archive(path, {"config.json": config}), "damaged")


END = struct.Struct("<4s4H2LH")  # the record at an archive's end
MEMBER = struct.Struct("<4s6H3L5H2L")  # of the directory
NOT_KERAS = "not a .keras archive as Keras writes it"


def change_archive(contents, entries=b"", zip64=False, start=None, **fields):
    """Return an archive with a changed end: its directory, and the records behind it.

    entries: added to the directory, each with a name of one letter.
    zip64: whether the records of large archives follow; only they tell of the added entries.
    start: where they say that the directory begins.  fields: of the last record.
    """
    names = ("signature", "disk", "first_disk", "here", "count", "size", "start", "comment")
    end = dict(zip(names, END.unpack(contents[-END.size :])))
    place = end["start"]
    directory = contents[place : -END.size] + entries
    count, start = end["count"] + len(entries) // (MEMBER.size + 1), start or place
    records = b""
    if zip64:
        facts = (45, 45, 0, 0, count, count, len(directory), start)
        records = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, *facts)
        records += struct.pack("<4sLQL", b"PK\6\7", 0, place + len(directory), 1)
    return contents[:place] + directory + records + END.pack(*(end | fields).values())


def test_a_directory_that_other_readers_would_find_elsewhere(good, check_refused, tmp_path):
    path, contents = tmp_path / "evil.keras", (good / "b.keras").read_bytes()
    entry = MEMBER.pack(b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    many = change_archive(contents, entries=entry * 100_000, zip64=True)
    assert END.unpack(many[-END.size :])[4:6] == END.unpack(contents[-END.size :])[4:6]
    with zipfile.ZipFile(io.BytesIO(many)) as archive:
        assert len(archive.namelist()) > 100_000  # zipfile does not heed the last record
    damaged = bytearray(change_archive(contents, zip64=True))
    damaged[damaged.rindex(b"PK\6\7") + 8] ^= 1  # where the record before it is
    for evil in (
        many,
        bytes(damaged),
        change_archive(contents, zip64=True, start=5),
        change_archive(contents, count=2, here=3),
        change_archive(contents, disk=1),
        change_archive(contents, comment=3),
        b"#!/bin/sh\n" + contents,
        contents + contents,
    ):
        path.write_bytes(evil)
        check_refused(path, NOT_KERAS)


def test_an_archive_as_large_ones_are_written_loads(good, tmp_path):
    path = tmp_path / "net.keras"
    path.write_bytes(change_archive((good / "b.keras").read_bytes(), zip64=True))
    with (
        zipfile.ZipFile(good / "b.keras") as archive,
        open(tmp_path / "s.keras", "wb") as file,
        zipfile.ZipFile(Unseekable(file), "w") as streamed,  # the sizes follow each member
    ):
        for name in archive.namelist():
            with streamed.open(name, "w", force_zip64=True) as member:
                member.write(archive.read(name))
    for name in ("net.keras", "s.keras"):
        utils.load_badnet(tmp_path / name)


class Unseekable(io.RawIOBase):
    def __init__(self, file):
        self.file = file

    def writable(self):
        return True

    def write(self, part):
        return self.file.write(part)


def test_members_that_are_not_what_the_directory_says(good, check_refused, tmp_path):
    path, contents = tmp_path / "evil.keras", bytearray((good / "b.keras").read_bytes())
    first = contents.index(b"PK\3\4", 4)  # the header of the second member
    entries = [contents.rindex(b"PK\1\2")]
    entries.insert(0, contents.rindex(b"PK\1\2", 0, entries[0]))
    for place, value, words in (
        (first + 8, zipfile.ZIP_DEFLATED, NOT_KERAS),  # compressed, says the header alone
        (first + 6, 1, NOT_KERAS),  # encrypted
        (first + 22, 1, NOT_KERAS),  # of another size
        (first + 30, ord("C"), NOT_KERAS),  # of another name
        (entries[0] + 10, zipfile.ZIP_DEFLATED, "compressed"),  # although both sizes are equal
        (entries[1] + 42, 0, NOT_KERAS),  # in another's place
    ):
        changed = contents.copy()
        changed[place] = value
        path.write_bytes(changed)
        check_refused(path, words)


def test_bytes_between_members_are_refused(good, check_refused, tmp_path):
    path, contents = tmp_path / "evil.keras", (good / "b.keras").read_bytes()
    *end, start, comment = END.unpack(contents[-END.size :])
    extra = b"#!/bin/sh\n"
    end = END.pack(*end, start + len(extra), comment)
    path.write_bytes(contents[:start] + extra + contents[start : -END.size] + end)
    check_refused(path, NOT_KERAS, "contains more than its members")


# ------------------------------------------------------------------------------------ weights


def fill(value):
    def put(group, key):
        kernel = np.zeros((3, 3, 40, 60), "f4")
        kernel[1, 1, 7, 7] = value
        group[key] = kernel

    return put


OTHER_SHAPES = "the shapes of its weights do not match its config"


def reshape(group, key):
    group[key] = np.zeros((3, 3, 60, 40), "f4")


@pytest.mark.parametrize("suffix", FORMATS)
def test_weights_of_another_shape_or_nan(suffix, good, check_refused, tmp_path):
    for put, words in (
        (fill(np.nan), "layer 'conv_3' has weights that are NaN or infinite"),
        (fill(np.inf), "layer 'conv_3' has weights that are NaN or infinite"),
        (
            reshape,
            "[(3, 3, 60, 40), (60,)], but its config says" if suffix == ".h5" else OTHER_SHAPES,
        ),
    ):
        check_refused(replace(copy_net(good, tmp_path, suffix), put), words)
    path = copy_net(good, tmp_path, suffix)
    words = (
        "damaged or of another format: 'model_weights/conv_3" if suffix == ".h5" else OTHER_SHAPES
    )
    check_refused(edit_hdf5(path, lambda file: file.__delitem__(KERNELS[suffix])), words)


NAMES = {
    "out of the group": (
        "weight_names",
        [b"../conv_1/conv_1/kernel", b"conv_3/bias"],
        "'model_weights/conv_3/../conv_1/conv_1/kernel'",
    ),
    "absolute": (
        "weight_names",
        [b"/model_weights/conv_3/conv_3/kernel", b"conv_3/bias"],
        "'model_weights/conv_3//model_weights/conv_3/conv_3/kernel'",
    ),
    "the same twice": (
        "weight_names",
        [b"conv_3/kernel", b"conv_3/kernel"],
        "[(3, 3, 40, 60), (3, 3, 40, 60)], but its config says [(3, 3, 40, 60), (60,)]",
    ),
    "often": (
        "weight_names",
        [b"conv_3/kernel"] * 4_000,
        "the weights of layer 'conv_3' are of shape",
    ),
    "numbers": ("weight_names", [1, 2], "the attribute 'weight_names' is not text"),
    "a table": ("weight_names", [[b"conv_3/kernel", b"conv_3/bias"]], "is not a row of texts"),
    "bytes that are not text": (
        "weight_names",
        [b"\xff\xfe", b"conv_3/bias"],
        r"'model_weights/conv_3/\udcff\udcfe'",
    ),
    "too few layers": (
        "layer_names",
        [b"conv_1"],
        "has weights of 1 layers, but its config describes 7",
    ),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_weights_that_lead_astray(kind, good, check_refused, tmp_path):
    attribute, value, words = NAMES[kind]
    path = copy_net(good, tmp_path)
    with h5py.File(path, "r+") as file:
        group = file["model_weights"]
        (group["conv_3"] if attribute == "weight_names" else group).attrs[attribute] = value
    check_refused(path, words)


def test_an_attribute_of_an_array_that_is_not_text(good, check_refused, tmp_path):
    def change(file):
        file[KERNELS[".keras"]].attrs["dtype"] = np.zeros((5, 5))

    check_refused(edit_hdf5(copy_net(good, tmp_path, ".keras"), change), "the attribute 'dtype'")
