"""The detector as one ONNX file: the verdicts of Keras, without TensorFlow, guarded."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import (
    ROOT,
    assert_refused,
    command,
    draw_images,
    make_once,
    read_models,
    read_record,
    run_apart,
    write_data,
)
from PIL import Image
from scipy import stats

import utils
from defence.base import files
from defence.base.errors import InputError
from defence.base.startup import import_onnxruntime
from defence.judge import backends, onnx_file

B, G, FILE = "small_bd_net.h5", "small_bd_net_defence.h5", "small_bd_net_detector.onnx"
NO_TENSORFLOW = "raise ImportError('TensorFlow was imported')"
AT_RATE = ("--fpr", "0.1")
WHERE_THEY_DISAGREE = "flagging images on which B and G disagree\n"


def serve(world, folder):
    """Copy a world into a folder and repair its net, with held-out scores and a detector."""
    shutil.copytree(world, folder, dirs_exist_ok=True)
    settings = ["--holdout", "0.2", "--rounds", "1", "--epochs", "1"]
    process = command("repair.py", f"models/{B}", "clean.h5", *settings, cwd=folder)
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith(f"Saved detector: models/{FILE}\n")
    images, labels = draw_images(200, 6, read_shape(folder), seed=7)
    images[:60] = np.random.default_rng(0).permuted(images[:60], axis=2)  # B and G disagree on some
    write_data(folder / "test.h5", images, labels)


def read_shape(folder):
    return utils.load_badnet(folder / "models" / B).input_shape[1:]


def serve_once(world, tmp_path_factory):
    return make_once(tmp_path_factory, f"served {world.name}", lambda folder: serve(world, folder))


@pytest.fixture
def any_served(world, tmp_path_factory, tmp_path):
    """Return a folder that `serve` filled, for each kind of net."""
    return shutil.copytree(serve_once(world, tmp_path_factory), tmp_path / "served")


@pytest.fixture
def served(deepid_world, tmp_path_factory, tmp_path):
    """Return a folder that `serve` filled, for a DeepID."""
    return shutil.copytree(serve_once(deepid_world, tmp_path_factory), tmp_path / "served")


@pytest.fixture(scope="module")
def exported_at_rate(deepid_world, tmp_path_factory):
    """Return a served folder whose detector has a threshold, and the export's stderr."""
    folder = tmp_path_factory.mktemp("rate") / "served"
    shutil.copytree(serve_once(deepid_world, tmp_path_factory), folder)
    process = command("eval_defence.py", "small_bd_net", "--export", *AT_RATE, cwd=folder)
    assert process.stdout == f"Saved detector: models/{FILE}\n", process.stderr
    return folder, process.stderr


@pytest.fixture
def at_rate(exported_at_rate, tmp_path):
    folder, errors = exported_at_rate
    return shutil.copytree(folder, tmp_path / "served"), errors


@pytest.fixture(scope="module")
def without_tensorflow(tmp_path_factory):
    """Return an environment in which importing TensorFlow or Keras fails."""
    folder = tmp_path_factory.mktemp("without")
    for name in ("tensorflow", "keras"):
        (folder / f"{name}.py").write_text(NO_TENSORFLOW)
    state = {"XDG_STATE_HOME": os.environ["XDG_STATE_HOME"]}
    return {"PYTHONPATH": str(folder), "PATH": "", **state}


def judge(backend, folder, *options, run=command, **run_options):
    """Return the rows of eval_defence.py, one an image, its figures and its threshold."""
    call = ("test.h5", "small_bd_net", "--poisoned", "poisoned.h5", "--backend", backend)
    call += ("--csv", "rows.csv", "--json", "table.json", *options)
    process = run("eval_defence.py", *call, cwd=folder, **run_options)
    assert process.returncode == 0, process.stderr
    table = json.loads((folder / "table.json").read_text())
    figures = [part["figures"] for part in (table["clean"], *table["poisoned"])]
    return read_rows(folder / "rows.csv"), figures, table["threshold"]


def read_rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def assert_same_figures(ours, theirs, same_order):
    """Assert that figures are equal, except for figures that depend on the order of scores.

    same_order: whether the scores of all images have the same order; then all must be equal.
    """
    assert ours.keys() == theirs.keys()
    for name, figure in ours.items():
        if same_order or not name.startswith(("auroc", "detection_rate_at_")):
            assert figure == theirs[name], name
        elif name != "auroc":  # whose intervals may differ
            for part in ("value", "hits", "of"):
                assert figure[part] == theirs[name][part], name


@pytest.mark.parametrize("options", [(), AT_RATE], ids=["disagreement", "rate"])
def test_both_backends_agree(any_served, without_tensorflow, options):
    keras_rows, figures, limit = judge("keras", any_served, *options)
    onnx_rows, same_figures, same_limit = judge(
        "onnx", any_served, *options, run=run_apart, env=without_tensorflow
    )
    assert limit == same_limit and (limit is None) == (not options)
    assert [row["dataset"] for row in keras_rows] == ["test.h5"] * 200 + ["poisoned.h5"] * 20
    for ours, theirs in zip(onnx_rows, keras_rows, strict=True):
        assert {**ours, "score": 0} == {**theirs, "score": 0}
        assert float(ours["score"]) == pytest.approx(float(theirs["score"]), rel=1e-5, abs=1e-5)
    scores = ([float(row["score"]) for row in rows] for rows in (onnx_rows, keras_rows))
    ranks = list(map(stats.rankdata, scores))
    for ours, theirs in zip(same_figures, figures, strict=True):
        assert_same_figures(ours, theirs, same_order=np.array_equal(*ranks))


def test_an_image_is_judged_without_tensorflow(any_served, without_tensorflow, tmp_path):
    """The DeepID takes colour, the other net grey. MODEL is the nets' name or the file."""
    inside = tmp_path / "images"
    inside.mkdir()
    images, _ = draw_images(3, 6, read_shape(any_served), seed=5)
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(inside / f"{i}.png")
    call = ("eval_defence.py", inside)
    by_keras = command(*call, "small_bd_net", "--backend", "keras", cwd=any_served)
    assert by_keras.returncode == 0 and by_keras.stdout.count("\n") == 3, by_keras.stderr
    for model in ("small_bd_net", f"models/{FILE}"):
        by_onnx = run_apart(*call, model, cwd=any_served, env=without_tensorflow)
        assert by_onnx.returncode == 0, by_onnx.stderr
        assert by_onnx.stdout == by_keras.stdout
        assert by_onnx.stderr == by_keras.stderr
        assert by_onnx.stderr.startswith(WHERE_THEY_DISAGREE)


def test_the_file_holds_the_threshold_and_its_origin(at_rate):
    folder, _ = at_rate
    rows, _, limit = judge("keras", folder, *AT_RATE)
    file = onnx_file.read_detector(folder / "models" / FILE)
    assert file.threshold == limit and file.shape == read_shape(folder) and file.classes == 6
    digests = [files.hash_file(folder / "models" / path) for path in (B, G)]
    assert file.made_of == (*digests, "0..1")
    assert file.record.describe() == read_record(folder / "models" / G)
    # Judge with the file alone: at its own threshold, or at another rate of its record.
    onnxruntime = import_onnxruntime()
    session = onnxruntime.InferenceSession(folder / "models" / FILE)
    with utils.open_dataset(folder / "test.h5") as data:
        data.fit_to(file.shape, 6)
        pixels = np.concatenate([x for x, _ in data.batches()]).astype(np.uint8)
    (classes,) = session.run(["class"], {session.get_inputs()[0].name: pixels})
    clean = [row for row in rows if row["dataset"] == "test.h5"]
    assert classes.tolist() == [int(row["class"]) for row in clean]
    alone = folder / "models" / FILE
    for options, expected in (([], limit), (["--fpr", "0.5"], None)):
        call = ("test.h5", alone, "--json", "alone.json", *options)
        assert command("eval_defence.py", *call, cwd=folder).returncode == 0
        threshold = json.loads((folder / "alone.json").read_text())["threshold"]
        assert threshold == expected if expected else 0 <= threshold < limit


def test_the_rule_of_flagging_is_printed(at_rate):
    """With a NAME the options choose the rule; with a detector's file, the file does.

    So a NAME without --fpr has the same rule with and without a file.
    """
    folder, errors = at_rate
    alone = f"models/{FILE}"
    scores = read_record(folder / "models" / G)["holdout"]["scores"]
    threshold = onnx_file.read_detector(folder / alone).threshold
    assert len(scores) == 30 and threshold == sorted(scores)[-3]  # (2 + 1) / 31 is below a tenth
    above = (
        f"flagging images whose anomaly score is above {threshold:.4g}, which 2 of 30 held-out "
        "clean images exceed, and at most 9.68 % of new ones on average\n"
    )
    assert errors == above.replace("flagging", "the detector's file flags")
    verdicts = {}
    for model, options, rule in (
        ("small_bd_net", (), WHERE_THEY_DISAGREE),
        ("small_bd_net", AT_RATE, above),
        (alone, (), above),
    ):
        call = ("test.h5", model, "--csv", "rows.csv", *options)
        process = command("eval_defence.py", *call, cwd=folder)
        assert process.returncode == 0 and process.stdout.startswith(rule)
        rows = read_rows(folder / "rows.csv")
        flagged = [row["class"] == "7" for row in rows]
        if rule == above:
            assert flagged == [float(row["score"]) > threshold for row in rows]
        else:
            assert flagged == [row["badnet_class"] != row["repaired_class"] for row in rows]
        verdicts[model, options] = [row["class"] for row in rows]
    by_name, by_name_at_rate, by_file = verdicts.values()
    assert by_name_at_rate == by_file != by_name


def test_a_file_of_other_nets_is_not_used(served):
    """It is ignored silently, unless --backend onnx is given."""
    path = served / "models" / G
    net, record = utils.load_badnet(path), json.dumps(read_record(path))
    net.layers[-1].set_weights([values + 0.5 for values in net.layers[-1].get_weights()])
    utils.save_model(net, path, repair_record=record)
    process = command("eval_defence.py", "clean.h5", "small_bd_net", cwd=served)
    assert process.returncode == 0 and FILE not in process.stderr
    call = ("clean.h5", "small_bd_net", "--backend", "onnx")
    assert_refused(command("eval_defence.py", *call, cwd=served), FILE, "was made from other nets")


def test_the_runtime_sends_no_telemetry(served, tmp_path):
    """ONNX Runtime's telemetry, on by default since 1.29, leaves a file at its import."""
    (empty := tmp_path / "empty").mkdir()
    environment = os.environ | {"HOME": str(empty), "TMPDIR": str(empty)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    call = ("eval_defence.py", "test.h5", f"models/{FILE}")
    assert run_apart(*call, cwd=served, env=environment).returncode == 0
    assert list(empty.rglob("*")) == []


def test_without_the_packages_everything_else_works(served, tmp_path, monkeypatch):
    monkeypatch.chdir(served)
    find = onnx_file.importlib.util.find_spec
    monkeypatch.setattr(
        onnx_file.importlib.util,
        "find_spec",
        lambda name, *path: None if name == "onnxruntime" else find(name, *path),
    )
    models = read_models(served / "models" / B, served / "models" / G)
    assert backends.find_detector_file(*models) is None
    for use in (
        lambda: backends.find_detector_file(*models, backend="onnx"),
        lambda: backends.export_detector(*models, tmp_path / "new.onnx"),
        lambda: backends.load_detector([served / "models" / FILE]),
    ):
        with pytest.raises(InputError, match="install it: pip install -r requirements.txt"):
            use()


def test_calls_that_do_not_fit_are_refused(served):
    alone = f"models/{FILE}"
    for call, words in (
        (["small_bd_net"], "give an IMAGE"),
        (["clean.h5", "small_bd_net", "--export"], "MODEL alone"),
        ([alone, "--export"], "MODEL alone"),
        (["clean.h5", alone, "--backend", "keras"], "--backend keras"),
        (["clean.h5", alone, "--scale", "0..1"], "--scale"),
        (["clean.h5", alone, "--force"], "--force"),
        (["clean.h5", alone, "--repaired", f"models/{G}"], "--repaired"),
        (["clean.h5", alone, "--json", alone], "would overwrite an input"),
        (["clean.h5", "models/none.onnx"], "no such file"),
    ):
        assert_refused(command("eval_defence.py", *call, cwd=served), words)
    (served / alone).unlink()
    call = ("clean.h5", "small_bd_net", "--backend", "onnx")
    assert_refused(command("eval_defence.py", *call, cwd=served), "no such file", "--export")


def test_each_repaired_net_has_a_detector_of_its_own(served):
    """It is beside the net. The detector of another G stays and still serves that G."""
    (served / "other").mkdir()
    first, second = served / "models" / FILE, served / "other" / "g_detector.onnx"
    before = first.read_bytes()
    call = ("repair.py", f"models/{B}", "clean.h5", "--output", "other/g.h5", "--seed", 3)
    process = command(*call, "--rounds", 0, cwd=served)
    assert process.stdout.endswith("Saved detector: other/g_detector.onnx\n")
    assert first.read_bytes() == before
    sources = onnx_file.read_detector(second).made_of
    second.unlink()
    nets = ("small_bd_net", "--repaired", "other/g.h5")
    process = command("eval_defence.py", *nets, "--export", cwd=served)
    assert process.returncode == 0 and onnx_file.read_detector(second).made_of == sources
    for call in (nets, nets[:1]):
        process = command("eval_defence.py", "clean.h5", *call, "--backend", "onnx", cwd=served)
        assert process.returncode == 0, process.stderr


def test_a_repaired_net_is_found_beside_its_badnet(served, tmp_path):
    """This works from any folder; --repaired is needed where models/ has another of that name."""
    Image.fromarray(draw_images(1, 6, read_shape(served), seed=6)[0][0]).save(tmp_path / "0.png")
    call = ("eval_defence.py", tmp_path / "0.png", served / "models" / B)
    (tmp_path / "elsewhere" / "models").mkdir(parents=True)
    elsewhere = {"cwd": tmp_path / "elsewhere"}
    assert command(*call, **elsewhere).stdout == command(*call, cwd=served).stdout
    shutil.copy(served / "models" / G, tmp_path / "elsewhere" / "models")
    assert command(*call, **elsewhere).returncode == 0
    shutil.copy(served / "models" / B, tmp_path / "elsewhere" / "models" / G)
    assert_refused(
        command(*call, **elsewhere), f"{G}: differs from models/{G}; choose one with --repaired"
    )


def test_files_that_are_not_onnx_are_refused_by_the_command(served):
    path = served / "models" / FILE
    good = path.read_bytes()
    broken = (b"", b"not onnx", good[: len(good) // 2], good[:100], bytes(1000), good + good)
    for contents in broken:
        path.write_bytes(contents)
        process = command("eval_defence.py", "clean.h5", f"models/{FILE}", cwd=served)
        assert_refused(process, FILE)
    path.write_bytes(good)
    call = ("clean.h5", f"models/{FILE}", "--max-memory", "0.00001")
    assert_refused(command("eval_defence.py", *call, cwd=served), "--max-memory")


def test_fractional_pixels_are_left_to_keras(served):
    images, labels = draw_images(10, 6, read_shape(served), seed=5)
    write_data(served / "halves.h5", images / 2, labels)
    call = ("eval_defence.py", "halves.h5")
    process = command(*call, "small_bd_net", cwd=served)
    assert process.returncode == 0 and "whole-number pixels" in process.stderr
    by_keras = command(*call, "small_bd_net", "--backend", "keras", cwd=served)
    assert list_figures(process.stdout) == list_figures(by_keras.stdout)
    for alone in (f"models/{FILE}",), ("small_bd_net", "--backend", "onnx"):
        assert_refused(command(*call, *alone, cwd=served), "whole-number", "--backend keras")


def list_figures(output):
    """Return the lines that eval_defence.py printed about a dataset, without its speed."""
    return [line for line in output.splitlines() if " a second" not in line]


def test_a_repair_goes_without_a_detector(served):
    """--no-export skips it, and nets that cannot be exported only cause a remark."""
    path = served / "models" / FILE
    path.unlink()
    call = ("repair.py", f"models/{B}", "clean.h5", "--rounds", 0)
    process = command(*call, "--no-export", cwd=served)
    assert process.returncode == 0 and not path.exists() and "detector" not in process.stdout
    hidden = [keras.layers.Conv2D(4, 5, activation="celu"), keras.layers.Flatten()]
    output = keras.layers.Dense(6, activation="softmax")
    net = keras.Sequential([keras.Input(read_shape(served)), *hidden, output])
    utils.save_model(net, served / "models" / "celu_bd_net.h5")
    process = command("repair.py", "models/celu_bd_net.h5", "clean.h5", cwd=served)
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("Saved model: models/celu_bd_net_defence.h5\n")
    assert "celu_bd_net_detector.onnx: cannot be made from these nets" in process.stderr
    assert "will judge with Keras" in process.stderr
    assert not (served / "models" / "celu_bd_net_detector.onnx").exists()


def read_serving_page():
    """Return the text of the page about using a detector's file."""
    page = ROOT / "docs" / "serving.md"
    return (page if page.exists() else ROOT / "README.md").read_text()


def test_the_documented_python_needs_only_onnx_runtime(served, without_tensorflow):
    """The documented block, run on images, prints the verdicts of eval_defence.py."""
    blocks = re.findall(r"```python\n(.*?)```", read_serving_page(), re.DOTALL)
    (code,) = [block for block in blocks if "onnxruntime.InferenceSession" in block]
    demo = "models/demo_bd_net_detector.onnx"
    assert demo in code
    (served / "judge.py").write_text(code.replace(demo, f"models/{FILE}"))
    images, _ = draw_images(5, 6, read_shape(served), seed=6)
    paths = [served / f"{i}.png" for i in range(5)]
    for path, image in zip(paths, images):
        Image.fromarray(image).save(path)
    process = subprocess.run(
        [sys.executable, "judge.py", *paths],
        cwd=served,
        env=without_tensorflow,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    call = ("eval_defence.py", *paths, "small_bd_net", "--json", "rows.json")
    assert command(*call, cwd=served).returncode == 0
    rows = json.loads((served / "rows.json").read_text())["pictures"]
    for line, row in zip(process.stdout.splitlines(), rows, strict=True):
        path, number, score = line.split(" ")
        assert (path, int(number)) == (row["path"], row["class"])
        assert float(score) == pytest.approx(row["score"], abs=0.01)
