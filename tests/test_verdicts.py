"""The folder of verdicts and the images that are given: which row is about which contents."""

import os

import numpy as np
import pytest

pytest.importorskip("pyarrow")
import pyarrow.parquet
from pyarrow import fs

from defence.base.errors import InputError
from defence.explain import flagged, verdicts
from defence.judge import detector

CLASSES = 40


@pytest.fixture
def inside(tmp_path):
    """Return a folder of three files."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"\x89PNG" * i)
    return folder


def write_rows(folder, rows, name="0"):
    table = pyarrow.Table.from_pylist(rows, verdicts.SCHEMA)
    pyarrow.parquet.write_table(table, folder / f"{name}.parquet")


def open_screening(folder, keys):
    return verdicts.Screening(fs.LocalFileSystem(), keys, *verdicts.locate(folder))


def test_images_are_listed_once(inside):
    filesystem, keys = verdicts.list_images([inside, inside / "1.png", str(inside.parent)])
    rows = [verdicts.split_key(key) for key in keys]
    assert [row["path"] for row in rows] == sorted(str(path) for path in inside.iterdir())
    assert [row["size"] for row in rows] == [0, 4, 8]
    assert rows[2]["modified"] == (inside / "2.png").stat().st_mtime_ns // 1000
    assert verdicts.list_images([f"file://{inside}"]) == (filesystem, keys)


def test_other_contents_have_another_key(inside):
    path = inside / "1.png"
    _, (before,) = verdicts.list_images([path])
    changed = path.stat().st_mtime_ns
    path.write_bytes(b"five!")
    os.utime(path, ns=(changed, changed))
    _, (longer,) = verdicts.list_images([path])
    path.write_bytes(b"FIVE!")
    os.utime(path, ns=(changed, changed + 1))
    _, (later,) = verdicts.list_images([path])
    assert len({before, longer, later}) == 3


def test_a_key_tells_what_the_file_system_knows():
    for path in ("a|b.png", "a|1|2", "a\nb"):
        info = fs.FileInfo(path, fs.FileType.File, size=5, mtime_ns=7_000)
        row = verdicts.split_key(verdicts.make_key(info))
        assert (row["path"], row["size"], row["modified"]) == (path, 5, 7)
        row = verdicts.split_key(verdicts.make_key(fs.FileInfo(path, fs.FileType.File)))
        assert (row["path"], row["size"], row["modified"]) == (path, None, None)


def test_the_summary_counts_all_verdicts(tmp_path):
    """So do the classes that stand out. A null is an unread image or NaN."""
    rng = np.random.default_rng(0)
    badnet = np.concatenate([rng.integers(-1, CLASSES, 500), np.full(40, 2)])
    answers = detector.Answers(
        badnet, badnet, np.zeros(540, np.float32), (np.arange(540) >= 495) | (badnet < 0)
    )
    rows = [
        {"path": str(i), "key": str(i)} | row
        for i, row in enumerate(detector.describe_answers(answers, CLASSES))
    ]
    rows += [{"path": key, "key": key, "error": "not an image"} for key in ("x", "y", "z")]
    for part in (0, 1):
        write_rows(tmp_path, rows[part::2], part)
    screening = open_screening(tmp_path, [row["key"] for row in rows])
    counts, candidates = verdicts.summarise_verdicts(screening, CLASSES)
    poisoned = int(answers.flagged.sum())
    expected = {"images": 543, "poisoned": poisoned, "unread": 3, "untold": 0, "others": 0}
    assert counts == expected
    assert candidates == flagged.find_candidates(badnet, answers.flagged, CLASSES)
    assert candidates[0].target == 3 and candidates[0].stands_out


def test_only_the_given_images_count(tmp_path, capsys):
    """Not other rows in the folder; and an image without a row is unread."""
    classes = {"clean": 3, "flagged": CLASSES + 1, "other": CLASSES + 1, "broken": None}
    rows = [
        {"path": key, "key": key, "class": verdict, "badnet_class": verdict and 3}
        | {"repaired_class": verdict and 3, "error": None if verdict else f"{key}: damaged"}
        for key, verdict in classes.items()
    ]
    write_rows(tmp_path, rows)
    screening = open_screening(tmp_path, ["broken", "clean", "missing"])
    verdicts.note_unread({"missing": "no network"}, screening.target, screening.folder)
    (tmp_path / verdicts.NOTES / "0.json").write_text('{"missing": "cut o')
    counts, _ = verdicts.summarise_verdicts(screening, CLASSES)
    assert counts == {"images": 3, "poisoned": 0, "unread": 2, "untold": 1, "others": 2}
    verdicts.say_rest(screening, counts)
    warning, remark = capsys.readouterr().err.splitlines()
    assert "warning: 1 image could not be read for now, such as: no network" in warning
    assert "has 2 more verdicts: on other images" in remark
    nets = type("Nets", (), {"shape": (9, 8, 3), "classes": CLASSES})
    stream, errors = verdicts.read_stream(screening, nets)
    assert errors == ["no network", "broken: damaged"]
    assert len(stream.answers.flagged) == 1 and stream.name(0) == "clean"
    stream, errors = verdicts.read_stream(open_screening(tmp_path, ["flagged", "other"]), nets)
    assert errors == [] and stream.answers.flagged.tolist() == [True, True]


def test_failures_of_the_system_are_not_blamed_on_the_image(inside, monkeypatch):
    """Though Pillow meets them while it decodes."""

    def read(path):
        return verdicts.read_image(str(path), (9, 8, 3), fs.LocalFileSystem(), 10**9, ("PNG",))

    with pytest.raises(InputError, match="not a PNG image"):
        read(inside / "1.png")
    for error in (OSError(24, "Too many open files"), MemoryError("none left")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("PIL.Image.open", fail)
        with pytest.raises(OSError, match=r"1\.png: .*(Too many|none left)"):
            read(inside / "1.png")
