"""Judging on Ray again: images that could not be read, were overwritten, or are other ones."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_apart
from screening import CALL, FILE, NAME, OUTPUT, draw, list_parts, list_rows, read_verdicts

for package in ("onnx", "onnxruntime", "tf2onnx", "ray"):
    pytest.importorskip(package)
import pyarrow
from pyarrow import fs

from defence.base.errors import InputError
from defence.base.process import unfinished_folders
from defence.explain import screen, verdicts

HIDE = """
import os, runpy, sys
path, *sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from defence.explain import verdicts
list_images = verdicts.list_images
def list_and_hide(images):
    listed = list_images(images)
    os.rename(path, "hidden")
    return listed
verdicts.list_images = list_and_hide
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_verdict_is_of_contents_that_were_read(folder, address):
    """An image that could not be read, or was overwritten since, is judged by the next run."""
    inside, cluster = draw(folder, 3), ("--ray-address", address)
    first, second, _ = paths = sorted(map(str, inside.iterdir()))
    call = (ROOT / "eval_defence.py", "--ray", second, NAME, "--output", OUTPUT, *cluster)
    command = [sys.executable, "-c", HIDE, second, *call, "--report", "page.html"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 2, process.stderr
    assert process.stdout == f"{OUTPUT}: 1 images, 0 poisoned, 1 unread\n"
    assert process.stderr.count("warning: 1 image could not be read for now") == 1
    assert "No such file" in (folder / "page.html").read_text("utf-8")
    (note,) = (folder / OUTPUT / "_unread").iterdir()
    assert "No such file" in json.loads(note.read_text())[second]
    assert list_parts(folder) == {}

    (folder / "hidden").rename(second)
    process = run_apart(*CALL, *cluster, cwd=folder)
    assert process.returncode == 0 and "3 images, " in process.stdout, process.stderr
    assert [*(folder / OUTPUT / "_unread").iterdir()] == []
    before = read_verdicts(folder)
    assert set(before) == {*paths}

    Path(first).write_bytes(b"not an image")
    call = ("eval_defence.py", "--ray", first, second, NAME, "--output", OUTPUT, *cluster)
    process = run_apart(*call, "--fail-on-flagged", cwd=folder)
    poisoned = int(before[second]["class"] == 7)
    assert process.stdout == f"{OUTPUT}: 2 images, {poisoned} poisoned, 1 unread\n"
    assert process.returncode == (3 if poisoned else 2), process.stderr
    assert "verdicts has 2 more verdicts: on other images" in process.stderr
    rows = list_rows(folder)
    assert len(rows) == 4 and all(row in rows for row in before.values())
    (new,) = (row for row in rows if row not in before.values())
    assert (new["path"], new["size"], new["class"]) == (first, 12, None) and new["error"]


def test_a_worker_tells_wrong_contents_from_what_may_pass(folder, monkeypatch):
    """Reading is tried again; an image that cannot be read even then gets a note, not a row."""
    monkeypatch.setattr(verdicts, "WAITS", (0, 0))
    paths = sorted(map(str, draw(folder, 4).iterdir()))
    Path(paths[1]).write_bytes(b"not an image")
    _, keys = verdicts.list_images([folder / "images"])
    failures = {paths[0]: 2, paths[2]: 3}  # how often they cannot be read

    class Flaky:
        def open_input_file(self, path):
            if failures.get(path):
                failures[path] -= 1
                raise OSError(5, "Input/output error")
            return fs.LocalFileSystem().open_input_file(path)

    shutil.copy(folder / "models" / FILE, folder / screen.FILE)
    monkeypatch.chdir(folder)
    places = (Flaky(), fs.LocalFileSystem(), str(folder))
    worker = screen.Worker(None, *places, 10**9, ("PNG",), None)
    rows = worker(pyarrow.table({"key": keys})).to_pylist()
    assert [row["path"] for row in rows] == [paths[0], paths[1], paths[3]]
    assert [row["key"] for row in rows] == [keys[0], keys[1], keys[3]]
    assert [row["error"] is None for row in rows] == [True, False, True]
    (note,) = (folder / verdicts.NOTES).iterdir()
    assert json.loads(note.read_text()) == {paths[2]: "[Errno 5] Input/output error"}
    failures[paths[0]] = 3
    assert worker(pyarrow.table({"key": keys[:1]})).num_rows == 0


def test_no_folder_is_left_where_ray_does_not_start(folder, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no cluster")

    monkeypatch.setattr("ray.init", fail)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    before = {*folder.iterdir()}
    with (
        pytest.raises(InputError, match="no cluster"),
        screen.run_cluster(None, folder / "models" / FILE),
    ):
        pass
    assert unfinished_folders == set() and {*folder.iterdir()} == before
