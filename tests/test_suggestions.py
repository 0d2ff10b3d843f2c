"""Commands that messages suggest: they work when they are typed as they stand."""

import shlex
import shutil

import pytest
from conftest import ROOT, B, assert_refused, command

from defence.judge import backends


@pytest.fixture
def spaces(deepid_world, tmp_path):
    """Return a folder without models/, with a BadNet and data whose paths have spaces."""
    folder = tmp_path / "my nets"
    folder.mkdir()
    shutil.copy(deepid_world / B, folder / "my net.h5")
    shutil.copy(deepid_world / "clean.h5", folder / "clean.h5")
    shutil.copy(ROOT / "img" / "demo" / "clean_1.png", folder / "a.png")
    return folder


def run_suggestion(message, folder, *, data="clean.h5"):
    """Run the command at the end of a message: python SCRIPT …"""
    python, script, *words = shlex.split(message.strip().rpartition("with: ")[2])
    assert python == "python"
    return command(script, *[data if word == "CLEAN_DATA.h5" else word for word in words],
                   *(["--rounds", 0] if script == "repair.py" else []), cwd=folder)  # fmt: skip


def test_the_suggested_repair_and_export_work_as_they_stand(spaces):
    judge = ("eval_defence.py", "a.png", "my net.h5")
    process = command(*judge, cwd=spaces)
    assert_refused(process, "make it with: python repair.py 'my net.h5' CLEAN_DATA.h5 --output")
    process = run_suggestion(process.stderr, spaces)
    assert process.returncode == 0, process.stderr
    (spaces / "my net_detector.onnx").unlink()
    process = command(*judge, "--backend", "onnx", cwd=spaces)
    words = "my net_detector.onnx: no such file; make it with: python eval_defence.py 'my net.h5'"
    assert_refused(process, words)
    process = run_suggestion(process.stderr, spaces)
    assert process.returncode == 0, process.stderr
    assert command(*judge, "--backend", "onnx", cwd=spaces).returncode == 0


def test_a_suggested_export_names_a_repaired_net_of_another_place(spaces):
    badnet, repaired = (backends.read_model(spaces / name) for name in ("my net.h5", "clean.h5"))
    line = backends.suggest_export(badnet, repaired)
    words = ["python", "eval_defence.py", f"{badnet.path}", "--repaired", f"{repaired.path}"]
    assert shlex.split(line) == [*words, "--export"]


def test_a_net_without_its_suffix_is_guessed(deepid_world):
    for name in ("models/small_bd_net", "small_bd_net", "small_bd_net.h5"):
        process = command("repair.py", name, "clean.h5", cwd=deepid_world)
        assert_refused(process, f"{name}: no such file; did you mean {B}?")
    for name in ("models/none", "none.h5", "none\0"):
        process = command("repair.py", name, "clean.h5", cwd=deepid_world)
        assert_refused(process, ": no such file")
        assert "did you mean" not in process.stderr


def test_a_repaired_net_is_announced_as_replaced_only_where_all_arguments_serve(
    deepid_world, tmp_path
):
    output = tmp_path / "g.h5"
    output.write_bytes(b"another's")
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\n")
    call = ("repair.py", B, "--output", output, "--rounds", 0, "--no-export")
    for wrong in (
        ["none.h5"],
        ["clean.h5", "--poisoned", "none.h5"],
        ["clean.h5", "--labels", labels],
        ["clean.h5", "--layer", "none"],
    ):
        process = command(*call, *wrong, cwd=deepid_world)
        assert process.returncode == 2 and "will be replaced" not in process.stderr
    process = command(*call, "clean.h5", cwd=deepid_world)
    before, announced, _ = process.stderr.partition(f"{output} will be replaced: written on ")
    assert process.returncode == 0 and announced and "prune 1: " not in before
