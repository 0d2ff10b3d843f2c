"""A detector's file beside B and G judges only if this user exported it."""

import shutil

import onnx
import pytest
from conftest import B, assert_refused, command

from defence.base import files
from defence.judge import exports

FILE = "models/small_bd_net_detector.onnx"
BY_KERAS = "was not exported by you on this machine, so Keras judges; make it again with: python "


@pytest.fixture
def folder(repaired_world, tmp_path, monkeypatch):
    """Return a folder with B, G and an image, and a list of exports of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = shutil.copytree(repaired_world[0], tmp_path / "world")
    exports.add_export((folder / FILE).read_bytes())
    return folder


def judge(folder, model="small_bd_net", *options):
    return command("eval_defence.py", "0.png", model, *options, cwd=folder)


def forge(folder):
    """Let the detector answer "4, score 0" to every image, with the metadata of the true file."""
    model = onnx.load(folder / FILE)
    for node in model.graph.node:
        node.output[:] = [f"true_{name}" if name in ANSWERS else name for name in node.output]
        node.input[:] = [f"true_{name}" if name in ANSWERS else name for name in node.input]
    for name, value in ANSWERS.items():
        zero, four = f"zero_{name}", f"four_{name}"
        kind = onnx.TensorProto.FLOAT if name == "score" else onnx.TensorProto.INT32
        for tensor, number in ((zero, 0), (four, value)):
            model.graph.initializer.append(onnx.helper.make_tensor(tensor, kind, [], [number]))
        product = onnx.helper.make_node("Mul", [f"true_{name}", zero], [f"none_{name}"])
        total = onnx.helper.make_node("Add", [f"none_{name}", four], [name])
        model.graph.node.extend([product, total])
    onnx.save(model, folder / FILE)


ANSWERS = {"class": 4, "badnet_class": 4, "repaired_class": 4, "score": 0}


def test_a_forged_detector_does_not_judge(folder):
    verdicts = [judge(folder).stdout, judge(folder, "small_bd_net", "--backend", "keras").stdout]
    assert verdicts[0] == verdicts[1]
    forge(folder)
    assert judge(folder, FILE).stdout == "4\n"  # whoever names the file trusts its maker
    images = sorted(path.name for path in folder.glob("*.png"))
    call = ("eval_defence.py", *images, "small_bd_net")
    process = command(*call, cwd=folder)
    assert BY_KERAS + f"eval_defence.py {B} --export" in process.stderr
    assert process.stdout == command(*call, "--backend", "keras", cwd=folder).stdout
    assert {line[-1] for line in process.stdout.splitlines()} != {"4"}
    refused = judge(folder, "small_bd_net", "--backend", "onnx")
    assert_refused(refused, FILE, "was not exported by you", "give the file as MODEL")


def test_a_forged_threshold_does_not_count(folder):
    """Nothing exceeds a score of 50: the file's metadata must not decide what is flagged."""
    model = onnx.load(folder / FILE)
    entry = {entry.key: entry for entry in model.metadata_props}
    entry["threshold"].value = "50.0"
    onnx.save(model, folder / FILE)
    assert BY_KERAS in judge(folder).stderr


def test_an_export_after_another_one_is_used(folder):
    forge(folder)
    assert command("eval_defence.py", "small_bd_net", "--export", cwd=folder).returncode == 0
    assert BY_KERAS not in judge(folder).stderr


def test_a_detector_that_another_user_made_is_not_parsed(folder):
    (folder / FILE).write_bytes(b"not onnx")
    process = judge(folder)
    assert process.returncode == 0 and BY_KERAS in process.stderr


@pytest.mark.parametrize("options", [("--no-export",), ()])
def test_a_repair_leaves_no_older_detector(options, folder):
    """It is made anew, or deleted where none is made."""
    forge(folder)
    call = ("repair.py", B, "clean.h5", "--rounds", 2, "--poisoned", "poisoned.h5", *options)
    process = command(*call, cwd=folder)
    assert process.returncode == 0, process.stderr
    assert (folder / FILE).exists() == (not options)
    assert bool(options) == (f"{FILE}: deleted" in process.stderr)
    assert BY_KERAS not in judge(folder).stderr


def test_the_list_is_private(folder):
    path = exports.find_list()
    assert path.is_relative_to(folder.parent / "state")
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    contents, line = (folder / FILE).read_bytes(), f"{files.hash_file(folder / FILE)}\n"
    assert path.read_text() == line and exports.is_export(contents)
    exports.add_export(contents)
    assert path.read_text() == line
    for mode in (0o620, 0o602):
        path.chmod(mode)
        assert not exports.is_export(contents)
    process = judge(folder)
    assert "another user owns it or may write it" in process.stderr and BY_KERAS in process.stderr


def test_without_a_list_the_export_warns(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    process = command("eval_defence.py", "small_bd_net", "--export", cwd=folder)
    assert process.returncode == 0 and "Keras will judge" in process.stderr
    assert BY_KERAS in judge(folder).stderr


def test_a_file_of_an_older_anomaly_score_does_not_judge(folder):
    """It is one that this user exported, before an update."""
    model = onnx.load(folder / FILE)
    kept = [entry for entry in model.metadata_props if entry.key != "score"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    contents = model.SerializeToString()
    (folder / FILE).write_bytes(contents)
    exports.add_export(contents)
    old = f"{FILE}: computes an older version of the anomaly score; export the detector again"
    process = judge(folder)
    assert process.returncode == 0 and "until then, Keras judges" in process.stderr
    assert old in process.stderr and f"{B} --export" in process.stderr
    for call in ((FILE,), ("small_bd_net", "--backend", "onnx")):
        assert_refused(judge(folder, *call), old)
