"""Mistakes of users, and the messages about them."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, B, G, assert_refused, command, draw_images, run_apart, write_data
from PIL import Image

import utils
from defence.base import files
from defence.base.errors import InputError
from defence.beyond import finding, observer
from defence.load.datasets import open_dataset
from defence.net.cached_net import CachedNet
from defence.net.split import split_net

DEMO = (ROOT / "models" / "demo_bd_net.h5", ROOT / "data" / "demo_clean_validation_data.h5")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--check", "--json", "x.json", "--no-export"],
            "--json, --no-export: does nothing with --check",
        ),
        (["--check", "--harden"], "--harden: does nothing with --check"),
        (["--scan", "--output", "x.h5"], "--output: does nothing with --scan"),
        (["--scan", "--holdout", "0.1"], "--holdout: does nothing with --scan"),
        (["--harden-steps", "5"], "--harden-steps: does nothing without --harden"),
    ],
)
def test_options_that_do_nothing_are_refused(options, words, deepid_world):
    process = command("repair.py", B, "clean.h5", *options, cwd=deepid_world)
    assert process.returncode == 2
    assert words in process.stderr


def test_only_regular_files_are_replaced(deepid_world, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/stdout", "/dev/null", tmp_path / "fifo"):
        before = os.lstat(path)
        process = command("repair.py", B, "clean.h5", "--scan", "--json", path, cwd=deepid_world)
        assert_refused(process, f"{path}: is not a regular file; - stands for stdout")
        assert os.lstat(path).st_ino == before.st_ino
    call = ("eval_defence.py", "clean.h5", B, "--repaired", B, "--json", "-", "--csv", "-")
    assert_refused(command(*call, cwd=deepid_world), "cannot both go to stdout")


def test_no_output_replaces_a_file_that_the_command_reads(repaired_world, tmp_path):
    folder, _ = repaired_world
    image, names = tmp_path / "faces" / "a" / "0.png", tmp_path / "faces" / "labels.txt"
    image.parent.mkdir(parents=True)
    shutil.copy(folder / "0.png", image)
    names.write_text("a\n")
    detector, beside = "models/small_bd_net_detector.onnx", "models/labels.txt"
    assert (folder / detector).exists()
    judge, dataset = ("eval_defence.py", "0.png", B), ("eval_defence.py", "clean.h5", B)
    labelled = ("eval_defence.py", image.parent.parent, B, "--labelled")
    for call, outputs in (
        (judge, ["0.png", B, G, detector, beside]),
        ((*judge, "--labels", names), [names]),
        (("eval_defence.py", "0.png", detector), [detector, beside]),
        ((*judge, "--ray", "--output", tmp_path / "v"), ["0.png", B, G, detector]),
        ((*dataset, "--poisoned", image.parent.parent), [image, names, "clean.h5", detector]),
        (labelled, [image, names, detector]),
        (("repair.py", B, "clean.h5", "--poisoned", "poisoned.h5"), ["poisoned.h5", B, beside]),
        (("repair.py", B, image.parent.parent), [image, names]),
        (("repair.py", B, image.parent.parent, "--scan", "--labels", names), [image, names]),
    ):
        for path in outputs:
            option = "--report" if "--ray" in call else "--json"
            process = command(*call, option, path, cwd=folder)
            assert_refused(process, f"{path}: would overwrite an input; choose another {option}")
    uri = f"file://{tmp_path}/faces"
    call = ("eval_defence.py", uri, B, "--ray", "--output", f"file://{tmp_path}/v", "--report")
    assert_refused(command(*call, image, cwd=folder), "would overwrite an input")
    page = tmp_path / "v" / "page.html"
    page.parent.mkdir()
    assert_refused(command(*call, page, cwd=folder), "is inside --output")


def test_names_on_stdin_may_have_windows_line_ends(deepid_world, tmp_path):
    Image.new("RGB", (31, 31)).save(tmp_path / "a.png")
    call = [sys.executable, ROOT / "eval_defence.py", "-", deepid_world / B]
    call += ["--repaired", deepid_world / B, "--force"]

    def judge(names):
        return subprocess.run(call, input=names, cwd=tmp_path, capture_output=True, text=True)

    assert judge("a.png\r\na.png\r\n").stdout.count("a.png\t") == 2
    process = judge("a.png\0a.png\0")
    assert process.returncode == 2 and "end in NUL; add -0" in process.stderr
    call = ("eval_defence.py", "a.png", B, "-0", "--repaired", B)
    process = command(*call, cwd=deepid_world)
    assert_refused(process, "-0 goes with -")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed, deepid_world):
    line = f"{sys.executable} {ROOT}/repair.py {B} clean.h5 --check --scale 0..1 {closed}"
    process = subprocess.run(["bash", "-c", line], cwd=deepid_world, capture_output=True, text=True)
    assert process.returncode == 0 and "Traceback" not in process.stderr


def test_a_full_disk_behind_stdout_is_a_failure(deepid_world):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, ROOT / "repair.py", B, "clean.h5", "--check", "--scale", "0..1"],
            cwd=deepid_world,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.returncode == 1 and "No space left on device" in process.stderr
    assert "Traceback" not in process.stderr and "Exception ignored" not in process.stderr


def test_values_may_begin_with_a_minus(deepid_world):
    process = command("eval_defence.py", "a.png", B, "--fpr", "-1", cwd=deepid_world)
    assert "'-1' is not a number above 0" in process.stderr
    process = command("repair.py", B, "clean.h5", "--check", "--scale", "-1..1", cwd=deepid_world)
    assert process.returncode in (0, 1)
    assert "with pixels scaled to -1..1; the repair" in process.stdout


def test_a_ruined_repaired_net_is_warned_of(deepid_world, tmp_path):
    call = ("--threshold", 0, "--rounds", 0, "--retrain-epochs", 0, "--output", tmp_path / "g.h5")
    process = command("repair.py", B, "clean.h5", *call, cwd=deepid_world)
    assert process.returncode == 0 and "warning: G is right on " in process.stderr


def test_too_few_classes_or_images_give_no_finding(monkeypatch):
    """Scan one of the demo's 40 people, then a few images of all."""
    monkeypatch.setattr("defence.beyond.scan.count_errors", lambda *_: 1 / 0)
    model = utils.load_badnet(DEMO[0])
    with utils.open_dataset(DEMO[1]) as data:
        data.fit_to(model.input_shape[1:], 40)
        for rows, words in (
            (data.labels == 3, " of 1 of its"),
            (np.arange(600) < 60, " images of "),
        ):
            result = finding.scan_net(
                CachedNet.from_dataset(split_net(model), data.part(rows), "0..1"), 0
            )
            assert result.finding == "none" and words in result.reason
            assert "100 images of 20 classes" in result.reason


def test_a_folder_that_cannot_be_entered_or_is_a_link_says_so(tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "to")
    process = command("eval_defence.py", tmp_path, "demo_bd_net", "--repaired", DEMO[0], "--force")
    assert "link: is a link to a folder, which is not followed" in process.stderr


def test_formats_may_be_lower_case_and_addresses_need_ray(deepid_world):
    for name, words in (
        ("none.jpg", "none.jpg: no such file"),
        ("s3://x/a.png", "goes with --ray"),
    ):
        call = ("eval_defence.py", name, B, "--repaired", B, "--force", "--formats", "jpg,png")
        assert_refused(command(*call, cwd=deepid_world), words)


def test_a_missing_output_folder_names_the_option(deepid_world, tmp_path):
    write_data(tmp_path / "d.h5", *draw_images(9, 3, (31, 31, 3), 0))
    process = run_apart("repair.py", Path(deepid_world, B), "d.h5", cwd=tmp_path)
    assert_refused(
        process, "there is no folder models/ to write to; make it, or choose another --output"
    )


@pytest.mark.parametrize("scale", ["caffe", "torch"])
def test_a_scale_of_colours_is_refused_for_a_grey_net(scale, world):
    if "deepid" in world.name:
        pytest.skip("takes colours")
    words = f"--scale {scale}: is for images of 3 channels, but the net takes 1; choose one of 0..1"
    call = ("repair.py", B, "clean.h5", "--scale", scale, "--check")
    assert_refused(command(*call, cwd=world), words)
    call = ("eval_defence.py", "clean.h5", B, "--repaired", B, "--scale", scale, "--force")
    assert_refused(command(*call, cwd=world), words)


def test_help_about_layers_needs_no_place_to_write(deepid_world, tmp_path):
    call = ("repair.py", deepid_world / B, deepid_world / "clean.h5", "--layer", "help")
    process = command(*call, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("conv_1 ")


def test_a_limit_of_memory_has_a_limit(deepid_world):
    call = ("repair.py", B, "clean.h5", "--max-memory", "1e308")
    assert_refused(command(*call, cwd=deepid_world), "above 0 and at most 1000000")


def test_clean_data_of_another_size_are_refused_before_anything_is_judged(repaired_world, tmp_path):
    images, labels = draw_images(20, 5, (12, 12, 3), seed=0)
    write_data(tmp_path / "small.h5", images, labels)
    judge = ("eval_defence.py", "clean.h5", B, "--clean", tmp_path / "small.h5")
    assert_refused(command(*judge, cwd=repaired_world[0]), "small.h5: images are 3×12×12")


def test_shared_memory_is_no_device(tmp_path):
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("has no shared memory")
    files.check_writable({"--json": f"/dev/shm/{os.getpid()}.json"}, [])
    with pytest.raises(InputError, match="is not a regular file"):
        files.check_writable({"--json": "/dev/none"}, [])


@pytest.mark.parametrize("length", [240, 246, 250])
def test_a_name_too_long_for_a_repaired_net_is_wrong_input(repaired_world, tmp_path, length):
    shutil.copy(repaired_world[0] / B, tmp_path / f"{'a' * length}.h5")
    call = ("eval_defence.py", repaired_world[0] / "0.png", tmp_path / f"{'a' * length}.h5")
    assert_refused(command(*call, cwd=tmp_path), "no repaired net")


def test_a_name_too_long_for_a_detectors_file_is_judged_by_keras(repaired_world, tmp_path):
    for source, ending in ((B, ".h5"), (B.replace(".h5", "_defence.h5"), "_defence.h5")):
        shutil.copy(repaired_world[0] / source, tmp_path / f"{'a' * 243}{ending}")
    call = ("eval_defence.py", repaired_world[0] / "0.png", tmp_path / f"{'a' * 243}.h5")
    process = command(*call, cwd=tmp_path)
    assert process.returncode == 0, process.stderr


def test_a_record_keeps_the_scores_of_some_held_out_images(deepid_world, tmp_path, monkeypatch):
    """With all of them, it might be too long to be read again."""
    monkeypatch.setattr(observer, "MOST_SCORES", 9)
    output = ("--output", tmp_path / "g.h5", "--json", tmp_path / "x.json", "--no-export")
    process = command("repair.py", B, "clean.h5", "--holdout", 0.3, *output, cwd=deepid_world)
    assert process.returncode == 0, process.stderr
    holdout = json.loads((tmp_path / "x.json").read_text())["holdout"]
    assert len(holdout["scores"]) == 9 < holdout["images"]
    assert holdout["scores"] == sorted(holdout["scores"])


@pytest.mark.parametrize(
    ("shape", "mend"), [((9, 1), r"take its column: \[:, 0\]"), ((9, 4), r"argmax\(axis=1\)")]
)
def test_labels_of_two_dimensions_come_with_the_right_mend(tmp_path, shape, mend):
    write_data(tmp_path / "d.h5", np.zeros((9, 4, 4, 3), np.uint8), np.zeros(shape, np.int64))
    with pytest.raises(InputError, match=mend), open_dataset(tmp_path / "d.h5"):
        pass


def test_a_folder_that_cannot_be_listed_is_wrong_input(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="permission denied"), open_dataset(tmp_path):
        pass
