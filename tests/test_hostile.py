"""Hostile images, records and outputs; and files of every kind, each in its own process."""

import contextlib
import copy
import json
import os
import shutil
import stat
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import ROOT, assert_refused, read_record, run_apart
from hostile import CLASSES, copy_net, replace, replace_layer
from PIL import Image, PngImagePlugin
from test_hostile_links import ELSEWHERE, external_link, external_storage, fill, loop, reshape
from test_hostile_size import CONFIGS, STORED, endless_chunks, not_stored

from defence.base import files

# ----------------------------------------------------------------------------------- images


def test_only_png_and_jpeg_are_decoded(good, check_refused, tmp_path):
    image = Image.open(good / "face.png")
    for kind in ("GIF", "BMP", "TIFF", "PPM", "WEBP", "ICO", "PDF", "TGA"):
        for name in ("evil.png", "evil.jpg"):
            image.save(tmp_path / name, format=kind)
            check_refused(tmp_path / name, "not a PNG or JPEG image")
    (tmp_path / "evil.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    check_refused(tmp_path / "evil.png", "not a PNG or JPEG image")


def test_images_that_unfold(good, check_refused, run, tmp_path):
    path = tmp_path / "evil.png"
    texts = PngImagePlugin.PngInfo()
    texts.add_text("bomb", "a" * 100_000_000, zip=True)
    Image.open(good / "face.png").save(path, pnginfo=texts)
    check_refused(path, "damaged")
    Image.new("1", (30_000, 30_000)).save(path)  # 110 KB
    check_refused(path, "30000×30000 pixels would take")
    Image.new("L", (12_000, 12_000)).save(tmp_path / "evil.jpg", quality=1)
    check_refused(tmp_path / "evil.jpg", "12000×12000 pixels would take")
    process = run(
        *("eval_defence.py", "evil.jpg", good / "b.h5", "--repaired", good / "g.h5"),
        *("--max-memory", 2),
    )
    assert process.returncode == 0, process.stderr


# ------------------------------------------------------------------------------------ records


@pytest.fixture
def judge(good, run, tmp_path):
    """Return a function that judges an image with a repaired net that carries a record."""

    def judge(record, *options):
        path = shutil.copy(good / "g.h5", tmp_path / "g.h5")
        with h5py.File(path, "r+") as file:
            file.attrs["repair_record"] = record
        return run(
            "eval_defence.py", good / "face.png", good / "b.h5", "--repaired", path, *options
        )

    return judge


def test_a_record_that_is_null(judge):
    assert_refused(judge("null"), "g.h5: ")


def test_records_that_are_damaged_deep_or_of_another_net(good, judge):
    record = read_record(good / "g.h5")
    for text in ("[" * 100_000, "9" * 5_000, '"text"', "{}", 7, [b"a", b"b"]):
        assert_refused(judge(text), "g.h5: ")
    for key, value in (("layer", 1), ("input_scale", "0..2"), ("input_scale", []), ("badnet", [])):
        assert_refused(judge(json.dumps({**record, key: value})), "record is damaged")
    foreign = copy.deepcopy(record)
    foreign["badnet"] = {"file": "\x1b[2Jb.h5\n", "sha256": "0" * 64}
    process = judge(json.dumps(foreign))
    assert_refused(process, r"another BadNet (\x1b[2Jb.h5\n)", "--force")
    process = judge(json.dumps(foreign), "--force")
    assert process.returncode == 0 and process.stdout.strip().isdigit()
    assert process.stderr.startswith("warning: ") and r"(\x1b[2Jb.h5\n)" in process.stderr


def test_names_of_uploads_cannot_forge_a_verdict(good, run, tmp_path):
    (tmp_path / "uploads").mkdir()
    shutil.copy(good / "face.png", tmp_path / "uploads" / "a.png\t1\nb\x1b[2J.png")
    process = run("eval_defence.py", "uploads", good / "b.h5", "--repaired", good / "g.h5")
    assert process.returncode == 0, process.stderr
    path, _, number = process.stdout.removesuffix("\n").rpartition("\t")
    assert path == r"uploads/a.png\t1\nb\x1b[2J.png" and number.isdigit()


def test_nan_scores_are_flagged(good, run, tmp_path):
    """Finite weights have infinite products: B has no answer, and so no class."""
    path = replace(
        copy_net(good, tmp_path),
        lambda group, key: group.create_dataset(key, data=np.full((160, 6), 3e38, "f4")),
        "model_weights/output/output/kernel",
    )
    process = run(
        *("eval_defence.py", good / "face.png", path, "--repaired", path, "--force"),
        *("--json", "out.json"),
    )
    assert (process.returncode, process.stdout) == (0, f"{CLASSES + 1}\n"), process.stderr
    assert json.loads((tmp_path / "out.json").read_text())["pictures"][0]["badnet_class"] is None


# ------------------------------------------------------------------------------------- output


def test_the_output_replaces_a_link_and_does_not_follow_it(good, tmp_path):
    names = ["out.h5", "out.json", "out.png", "out_detector.onnx"]
    victims = [tmp_path / f"victim of {name}" for name in names]
    for name, victim in zip(names, victims):
        victim.write_text("untouched")
        (tmp_path / name).symlink_to(victim)
    old = os.umask(0o027)
    try:
        process = run_apart(
            *("repair.py", good / "b.h5", good / "data.h5", "--rounds", 0, "--threshold", 0),
            *("--output", "out.h5", "--json", "out.json", "--plot", "out.png"),
            cwd=tmp_path,
        )
    finally:
        os.umask(old)
    assert process.returncode == 0, process.stderr
    assert [victim.read_text() for victim in victims] == ["untouched"] * len(names)
    for name in names:
        mode = (tmp_path / name).lstat().st_mode
        assert stat.S_ISREG(mode) and stat.S_IMODE(mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == [*names, *(victim.name for victim in victims)]


def test_nobody_else_can_reach_a_file_while_it_is_written(tmp_path):
    with files.replace_file(tmp_path / "out.h5") as temporary:
        assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700
        temporary.write_text("whole")
        with contextlib.suppress(OSError):
            (tmp_path / "out.h5").symlink_to(tmp_path / "victim")  # in between
    assert (tmp_path / "out.h5").read_text() == "whole" and not (tmp_path / "out.h5").is_symlink()
    assert os.listdir(tmp_path) == ["out.h5"]


# ------------------------------------------------------------------------------ in a new process

IN_NEW_PROCESS = {
    "a lambda": (lambda path: replace_layer(path, class_name="Lambda"), "it could run code"),
    "a pickle": (
        lambda path: replace_layer(path, class_name="TorchModuleWrapper"),
        "contains a TorchModuleWrapper layer",
    ),
    "a link": (lambda path: replace(path, external_link), ELSEWHERE[external_link]),
    "storage": (lambda path: replace(path, external_storage), ELSEWHERE[external_storage]),
    "a loop": (lambda path: replace(path, loop), ELSEWHERE[loop]),
    "not there": (lambda path: replace(path, not_stored), STORED[not_stored]),
    "a bomb": (lambda path: replace(path, endless_chunks), STORED[endless_chunks]),
    "NaN": (lambda path: replace(path, fill(np.nan)), "weights that are NaN or infinite"),
    "a shape": (lambda path: replace(path, reshape), "but its config says"),
    **{kind: CONFIGS[kind] for kind in ("a layer of 25 million units", "deeper nesting")},
}


@pytest.mark.parametrize("kind", IN_NEW_PROCESS)
def test_hostile_files_in_a_new_process(kind, good, tmp_path):
    change, words = IN_NEW_PROCESS[kind]
    path = change(copy_net(good, tmp_path))
    before = os.listdir(tmp_path)
    process = run_apart("repair.py", path, good / "data.h5", "--output", "out.h5", cwd=tmp_path)
    assert_refused(process, str(path), words)
    assert os.listdir(tmp_path) == before


def test_an_image_that_unfolds_in_a_new_process(good, tmp_path):
    Image.new("1", (30_000, 30_000)).save(path := tmp_path / "evil.png")
    call = ("eval_defence.py", path, good / "b.h5", "--repaired", good / "g.h5")
    assert_refused(run_apart(*call, cwd=tmp_path), "30000×30000 pixels would take")


# --------------------------------------------------------------------------------------- fuzz


@pytest.mark.parametrize(
    "mutants, commands", [(30, 1), pytest.param(2000, 40, marks=pytest.mark.slow)]
)
def test_the_fuzzer_finds_nothing(mutants, commands, tmp_path):
    process = subprocess.run(
        [sys.executable, ROOT / "tests" / "tools" / "fuzz.py"]
        + ["--mutants", str(mutants), "--commands", str(commands)],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.returncode == 0, process.stderr
    assert f"loading: {mutants} mutants: " in process.stdout
    assert f"commands: {commands} mutants" in process.stdout
    assert os.listdir(tmp_path) == []
