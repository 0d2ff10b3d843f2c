"""The detector as one ONNX file: it answers as Keras does, needs no TensorFlow, is guarded."""

import csv
import dataclasses
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
    apart,
    assert_refused,
    command,
    draw_images,
    once,
    read_record,
    write_data,
)
from PIL import Image
from scipy import stats
from test_files import every_layer

import utils
from defence import backends, detector, files, guard_model, onnx_file
from defence.cli import InputError
from defence.graph import leaves
from defence.net import last_weighted, prune_channels, split
from defence.startup import import_onnxruntime

onnx = pytest.importorskip("onnx")
pytest.importorskip("tf2onnx")

B, G, FILE = "small_bd_net.h5", "small_bd_net_defence.h5", "small_bd_net_detector.onnx"
NO_TENSORFLOW = "raise ImportError('TensorFlow was imported')"
AT_RATE = ("--fpr", "0.1")
WHERE_THEY_DISAGREE = "flagging images on which B and G disagree\n"


def serve(world, folder):
    """Put into a folder what a world has, its repaired net with held-out scores, its detector."""
    shutil.copytree(world, folder, dirs_exist_ok=True)
    settings = ["--holdout", "0.2", "--rounds", "1", "--epochs", "1"]
    process = command("repair.py", f"models/{B}", "clean.h5", *settings, cwd=folder)
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith(f"Saved detector: models/{FILE}\n")
    images, labels = draw_images(200, 6, nets_shape(folder), seed=7)
    images[:60] = np.random.default_rng(0).permuted(images[:60], axis=2)  # some to disagree on
    write_data(folder / "test.h5", images, labels)


def nets_shape(folder):
    return utils.load_badnet(folder / "models" / B).input_shape[1:]


def serve_once(world, tmp_path_factory):
    return once(tmp_path_factory, f"served {world.name}", lambda folder: serve(world, folder))


@pytest.fixture
def each_served(world, tmp_path_factory, tmp_path):
    """A folder that `serve` filled, for each kind of net: where the backends may differ by it."""
    return shutil.copytree(serve_once(world, tmp_path_factory), tmp_path / "served")


@pytest.fixture
def served(deepid_world, tmp_path_factory, tmp_path):
    """A folder that `serve` filled, for a DeepID."""
    return shutil.copytree(serve_once(deepid_world, tmp_path_factory), tmp_path / "served")


@pytest.fixture(scope="module")
def exported_at_rate(deepid_world, tmp_path_factory):
    """Such a folder whose detector has the threshold of a rate, and what its export said."""
    folder = tmp_path_factory.mktemp("rate") / "served"
    shutil.copytree(serve_once(deepid_world, tmp_path_factory), folder)
    process = command("eval_defence.py", "small_bd_net", "--export", *AT_RATE, cwd=folder)
    assert process.stdout == f"Saved detector: models/{FILE}\n", process.stderr
    return folder, process.stderr


@pytest.fixture
def at_rate(exported_at_rate, tmp_path):
    folder, said = exported_at_rate
    return shutil.copytree(folder, tmp_path / "served"), said


@pytest.fixture(scope="module")
def without_tensorflow(tmp_path_factory):
    """An environment in which TensorFlow and Keras cannot be imported."""
    folder = tmp_path_factory.mktemp("without")
    for name in ("tensorflow", "keras"):
        (folder / f"{name}.py").write_text(NO_TENSORFLOW)
    return {"PYTHONPATH": str(folder), "PATH": ""}


def read_models(*paths):
    return [utils.read_model(path) for path in paths]


def judged_by(backend, folder, *options, run=command, **how):
    """The rows that eval_defence.py writes of every image, and what it prints."""
    call = ("test.h5", "small_bd_net", "--poisoned", "poisoned.h5", "--backend", backend)
    call += ("--csv", "rows.csv", "--json", "table.json", *options)
    process = run("eval_defence.py", *call, cwd=folder, **how)
    assert process.returncode == 0, process.stderr
    table = json.loads((folder / "table.json").read_text())
    figures = [each["figures"] for each in (table["clean"], *table["poisoned"])]
    return read_rows(folder / "rows.csv"), figures, table["threshold"]


def read_rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def assert_same_answers(ours, theirs, error=1e-5):
    """Equal classes; scores that differ by `error`, of a score above 1 as a share of it.

    ours: what DetectorFile.run gives.  theirs: what the model of detector.build gives.
    """
    badnet, repaired, score = theirs
    np.testing.assert_array_equal(ours["badnet_class"] - 1, badnet)
    np.testing.assert_array_equal(ours["repaired_class"] - 1, repaired)
    np.testing.assert_allclose(ours["score"], score, rtol=error, atol=error)


def assert_same_figures(ours, theirs, same_order):
    """Equal figures; where a tie of scores parts, those that follow their order may differ.

    same_order: whether the scores of all images are in the same order.
    """
    assert ours.keys() == theirs.keys()
    for name, figure in ours.items():
        if same_order or not name.startswith(("auroc", "detection_rate_at_")):
            assert figure == theirs[name], name
        elif name != "auroc":  # of which the intervals may differ
            for part in ("value", "hits", "of"):
                assert figure[part] == theirs[name][part], name


@pytest.mark.parametrize("options", [(), AT_RATE], ids=["disagreement", "rate"])
def test_both_backends_say_the_same(each_served, without_tensorflow, options):
    of_keras, figures, limit = judged_by("keras", each_served, *options)
    of_onnx, same_figures, same_limit = judged_by(
        "onnx", each_served, *options, run=apart, env=without_tensorflow
    )
    assert limit == same_limit and (limit is None) == (not options)
    assert [row["dataset"] for row in of_keras] == ["test.h5"] * 200 + ["poisoned.h5"] * 20
    for ours, theirs in zip(of_onnx, of_keras, strict=True):
        assert {**ours, "score": 0} == {**theirs, "score": 0}
        assert float(ours["score"]) == pytest.approx(float(theirs["score"]), rel=1e-5, abs=1e-5)
    ranks = [stats.rankdata([float(row["score"]) for row in rows]) for rows in (of_onnx, of_keras)]
    for ours, theirs in zip(same_figures, figures, strict=True):
        assert_same_figures(ours, theirs, same_order=np.array_equal(*ranks))


def test_a_picture_is_judged_without_tensorflow(each_served, without_tensorflow, tmp_path):
    """In colour by the DeepID, in grey by the other net; by the nets' name and by the file's."""
    inside = tmp_path / "pictures"
    inside.mkdir()
    images, _ = draw_images(3, 6, nets_shape(each_served), seed=5)
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(inside / f"{i}.png")
    by_keras = command(
        "eval_defence.py", inside, "small_bd_net", "--backend", "keras", cwd=each_served
    )
    assert by_keras.returncode == 0 and by_keras.stdout.count("\n") == 3, by_keras.stderr
    for model in ("small_bd_net", f"models/{FILE}"):
        by_onnx = apart("eval_defence.py", inside, model, cwd=each_served, env=without_tensorflow)
        assert by_onnx.returncode == 0, by_onnx.stderr
        assert by_onnx.stdout == by_keras.stdout
        assert by_onnx.stderr == by_keras.stderr
        assert by_onnx.stderr.startswith(WHERE_THEY_DISAGREE)


def test_the_file_holds_the_threshold_and_where_it_is_from(at_rate):
    folder, _ = at_rate
    rows, _, limit = judged_by("keras", folder, *AT_RATE)
    file = onnx_file.read(folder / "models" / FILE)
    assert file.threshold == limit and file.shape == nets_shape(folder) and file.classes == 6
    digests = [files.sha256(folder / "models" / path) for path in (B, G)]
    assert file.made_of == (*digests, "0..1")
    assert dataclasses.asdict(file.record) == read_record(folder / "models" / G)
    # The file alone: with its own threshold, or with another that its record holds.
    onnxruntime = import_onnxruntime()
    session = onnxruntime.InferenceSession(folder / "models" / FILE)
    with utils.open_dataset(folder / "test.h5") as data:
        data.fit_to(file.shape, 6)
        pixels = np.concatenate([x for x, _ in data.batches()]).astype(np.uint8)
    (classes,) = session.run(["class"], {session.get_inputs()[0].name: pixels})
    clean = [row for row in rows if row["dataset"] == "test.h5"]
    assert classes.tolist() == [int(row["class"]) for row in clean]
    alone = folder / "models" / FILE
    for options, wanted in (([], limit), (["--fpr", "0.5"], None)):
        call = ("test.h5", alone, "--json", "alone.json", *options)
        assert command("eval_defence.py", *call, cwd=folder).returncode == 0
        found = json.loads((folder / "alone.json").read_text())["threshold"]
        assert found == wanted if wanted else 0 <= found < limit


def test_the_rule_that_flags_is_said(at_rate):
    """By NAME the options choose it, whatever the file was exported with; the file keeps its own.

    Without --fpr a NAME would else be judged by another rule with its file than without.
    """
    folder, said = at_rate
    alone = f"models/{FILE}"
    scores = read_record(folder / "models" / G)["holdout"]["scores"]
    threshold = onnx_file.read(folder / alone).threshold
    assert len(scores) == 30 and threshold == sorted(scores)[-4]  # a tenth of them is above
    above = (
        f"flagging images whose anomaly score is above {threshold:.4g}, which 3 of 30 held-out "
        "clean images exceed\n"
    )
    assert said == above
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
    """In silence, unless it was asked for: a repair without a detector leaves the last one's."""
    path = served / "models" / G
    net, of_g = utils.load_badnet(path), json.dumps(read_record(path))
    net.layers[-1].set_weights([values + 0.5 for values in net.layers[-1].get_weights()])
    utils.save_model(net, path, repair_record=of_g)
    process = command("eval_defence.py", "clean.h5", "small_bd_net", cwd=served)
    assert process.returncode == 0 and FILE not in process.stderr
    asked = command("eval_defence.py", "clean.h5", "small_bd_net", "--backend", "onnx", cwd=served)
    assert_refused(asked, FILE, "was not made of these nets")


def test_the_runtime_tells_its_makers_nothing(served, tmp_path):
    """Its telemetry, on by default since 1.29, leaves a file as soon as it is imported."""
    (empty := tmp_path / "empty").mkdir()
    kept = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment = kept | {"HOME": str(empty), "TMPDIR": str(empty)}
    call = ("eval_defence.py", "test.h5", f"models/{FILE}")
    assert apart(*call, cwd=served, env=environment).returncode == 0
    assert list(empty.rglob("*")) == []


def test_without_the_packages_all_else_works(served, tmp_path, monkeypatch):
    monkeypatch.chdir(served)
    find = onnx_file.importlib.util.find_spec
    monkeypatch.setattr(
        onnx_file.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "onnxruntime" else find(name, *rest),
    )
    models = read_models(served / "models" / B, served / "models" / G)
    assert backends.matching_file(*models, "0..1") is None
    for ask in (
        lambda: backends.matching_file(*models, "0..1", backend="onnx"),
        lambda: backends.export(*models, tmp_path / "new.onnx"),
        lambda: backends.load([served / "models" / FILE]),
    ):
        with pytest.raises(InputError, match="install it: pip install -r requirements.txt"):
            ask()


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
    """Beside it; the detector of another G stays, and judges on with that one."""
    (served / "other").mkdir()
    first, other = served / "models" / FILE, served / "other" / "g_detector.onnx"
    before = first.read_bytes()
    call = ("repair.py", f"models/{B}", "clean.h5", "--output", "other/g.h5", "--seed", 3)
    process = command(*call, "--rounds", 0, cwd=served)
    assert process.stdout.endswith("Saved detector: other/g_detector.onnx\n")
    assert first.read_bytes() == before
    made = onnx_file.read(other).made_of
    other.unlink()
    judged = ("small_bd_net", "--repaired", "other/g.h5")
    process = command("eval_defence.py", *judged, "--export", cwd=served)
    assert process.returncode == 0 and onnx_file.read(other).made_of == made
    for call in (judged, judged[:1]):
        process = command("eval_defence.py", "clean.h5", *call, "--backend", "onnx", cwd=served)
        assert process.returncode == 0, process.stderr


def test_a_repaired_net_is_found_beside_its_badnet(served, tmp_path):
    """From any folder; where models/ has another of that name, one must be named."""
    Image.fromarray(draw_images(1, 6, nets_shape(served), seed=6)[0][0]).save(tmp_path / "0.png")
    call = ("eval_defence.py", tmp_path / "0.png", served / "models" / B)
    (tmp_path / "elsewhere" / "models").mkdir(parents=True)
    there = {"cwd": tmp_path / "elsewhere"}
    assert command(*call, **there).stdout == command(*call, cwd=served).stdout
    shutil.copy(served / "models" / G, tmp_path / "elsewhere" / "models")
    assert command(*call, **there).returncode == 0
    shutil.copy(served / "models" / B, tmp_path / "elsewhere" / "models" / G)
    assert_refused(command(*call, **there), f"{G}: is another repaired net than models/{G}")


def test_pixels_that_are_no_whole_numbers_are_left_to_keras(served):
    images, labels = draw_images(10, 6, nets_shape(served), seed=5)
    write_data(served / "halves.h5", images / 2, labels)
    call = ("eval_defence.py", "halves.h5")
    process = command(*call, "small_bd_net", cwd=served)
    assert process.returncode == 0 and "whole-number pixels" in process.stderr
    by_keras = command(*call, "small_bd_net", "--backend", "keras", cwd=served)
    assert figures_of(process.stdout) == figures_of(by_keras.stdout)
    for alone in (f"models/{FILE}",), ("small_bd_net", "--backend", "onnx"):
        assert_refused(command(*call, *alone, cwd=served), "whole-number", "--backend keras")


def figures_of(said):
    """What eval_defence.py printed of a dataset, less its speed."""
    return [line for line in said.splitlines() if " a second" not in line]


def test_a_repair_goes_without_a_detector(served):
    """Where none is asked for, or these nets cannot be exported, which a remark says."""
    path = served / "models" / FILE
    path.unlink()
    call = ("repair.py", f"models/{B}", "clean.h5", "--rounds", 0)
    process = command(*call, "--no-export", cwd=served)
    assert process.returncode == 0 and not path.exists() and "detector" not in process.stdout
    net = keras.Sequential(
        [
            keras.Input(nets_shape(served)),
            keras.layers.Conv2D(4, 5, activation="celu"),
            keras.layers.Flatten(),
            keras.layers.Dense(6, activation="softmax"),
        ]
    )
    utils.save_model(net, served / "models" / "celu_bd_net.h5")
    process = command("repair.py", "models/celu_bd_net.h5", "clean.h5", cwd=served)
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("Saved model: models/celu_bd_net_defence.h5\n")
    assert "celu_bd_net_detector.onnx: cannot be made of these nets" in process.stderr
    assert "judges with Keras" in process.stderr
    assert not (served / "models" / "celu_bd_net_detector.onnx").exists()


def on_serving():
    """The page that tells how a detector's file is used."""
    page = ROOT / "docs" / "serving.md"
    return (page if page.exists() else ROOT / "README.md").read_text()


def test_the_readmes_python_needs_onnx_runtime_alone(served, without_tensorflow):
    """Its block, given to Python with the pictures, says what eval_defence.py does."""
    blocks = re.findall(r"```python\n(.*?)```", on_serving(), re.DOTALL)
    (code,) = [block for block in blocks if "onnxruntime.InferenceSession" in block]
    named = "models/demo_bd_net_detector.onnx"
    assert named in code
    (served / "judge.py").write_text(code.replace(named, f"models/{FILE}"))
    images, _ = draw_images(5, 6, nets_shape(served), seed=6)
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
        path, said, score = line.split(" ")
        assert (path, int(said)) == (row["path"], row["class"])
        assert float(score) == pytest.approx(row["score"], abs=0.01)


# -------------------------------------------------------------------------------- other nets


def exported(badnet, folder, scale="0..1", change=-2, repaired=None):
    """Export a net and another. Returns (DetectorFile.run, Keras's model).

    repaired: the other one; if None, the first with its weights times `change`, so that the answers
    of the two are far apart.
    """
    badnet.save(folder / "b.h5")
    if repaired is None:
        badnet.set_weights([values * change for values in badnet.get_weights()])
    (repaired or badnet).save(folder / "g.h5")
    models = read_models(folder / "b.h5", folder / "g.h5")
    returned = backends.export(*models, folder / "d.onnx", scale=scale)
    file = onnx_file.read(folder / "d.onnx")
    assert returned.path == file.path and returned.shape == file.shape
    assert (returned.classes, returned.threshold) == (file.classes, None)
    model, classes = backends.load_nets(*models, backends.Usage(scale, None, None, None))
    assert classes == file.classes
    return file.run, model


def ending_in(activation, shape=(9, 8, 2)):
    keras.utils.set_random_seed(3)
    layers = keras.layers
    inner = [layers.Conv2D(3, 3, activation=activation), layers.Flatten()]
    return keras.Sequential([keras.Input(shape), *inner, layers.Dense(4, activation=activation)])


def random_images(shape, seed=1):
    return np.float32(np.random.default_rng(seed).integers(0, 256, (300, *shape)))


@pytest.fixture(scope="module")
def softmax(tmp_path_factory):
    """The detector of two small nets: (its file's path, DetectorFile.run, Keras's model)."""
    folder = tmp_path_factory.mktemp("softmax")
    return folder / "d.onnx", *exported(ending_in("softmax"), folder)


def test_nets_that_end_in_a_softmax(softmax):
    _, run, by_keras = softmax
    assert_same_answers(run(random_images((9, 8, 2))), by_keras(random_images((9, 8, 2))))


@pytest.mark.parametrize(
    "activation, scale", [("softmax", "0..255"), ("linear", "0..1"), ("sigmoid", "0..255")]
)
def test_nets_of_any_kind_of_scores(tmp_path, activation, scale):
    run, by_keras = exported(ending_in(activation), tmp_path, scale)
    assert_same_answers(run(random_images((9, 8, 2))), by_keras(random_images((9, 8, 2))))


def test_the_trunk_that_both_nets_share_is_in_the_file_once(tmp_path):
    net = ending_in("relu")
    sizes = {}
    for name in ("shared", "apart"):
        net.save(tmp_path / "b.h5")
        prune_channels(net.layers[0], [1])
        if name == "apart":
            net.layers[0].set_weights([values * 2 for values in net.layers[0].get_weights()])
        net.save(tmp_path / "g.h5")
        models = read_models(tmp_path / "b.h5", tmp_path / "g.h5")
        backends.export(*models, tmp_path / "d.onnx")
        operators = [node.op_type for node in onnx.load(tmp_path / "d.onnx").graph.node]
        sizes[name] = operators.count("Conv")
    assert sizes == {"shared": 1, "apart": 2}


def test_scores_that_are_nan_count_as_poisoned(tmp_path):
    run, by_keras = exported(ending_in("linear"), tmp_path, change=1e30)
    images = random_images((9, 8, 2))
    images[0] = 0
    ours, theirs = run(images), by_keras(images)
    assert_same_answers(ours, theirs)
    broken = ours["repaired_class"] == 0
    assert broken.any() and not broken.all()
    assert np.all(ours["class"][broken] == 5)
    assert np.all(ours["score"][broken] == np.float32(detector.MOST))


@pytest.mark.parametrize("scale", ["-1..1", "caffe", "torch"])
def test_every_scale_can_be_exported(tmp_path, scale):
    images = random_images((9, 8, 3))
    run, by_keras = exported(ending_in("softmax", (9, 8, 3)), tmp_path, scale)
    assert_same_answers(run(images), by_keras(images))


def of_all_layers(folder):
    """A net with each layer that guard_model.py allows, but an activation that is refused."""
    every_layer().save(folder / "every.keras")
    config = json.dumps(utils.load_badnet(folder / "every.keras").get_config()).replace(
        '"gelu"', '"relu"'
    )
    # Or its first ReLU would leave nothing below 0 to the layers behind it.
    config = re.sub(r'"negative_slope": [\d.]+', '"negative_slope": 0.7', config)
    net, rng = keras.Model.from_config(json.loads(config)), np.random.default_rng(0)
    for layer in net.layers:
        most = 1 if isinstance(layer, keras.layers.PReLU) else 0.1
        layer.set_weights([each + most * rng.random(each.shape) for each in layer.get_weights()])
    return net


def of_all_activations(_):
    """A net with each activation that guard_model.py allows, once for pictures, once for rows."""
    layers, parts = keras.layers, []
    image = keras.Input((16, 16, 4))
    pixels = layers.Rescaling(1 / 255)(image)
    # Wide enough to reach the flat ends of relu6, hard_tanh and so on.
    wide = {"kernel_initializer": keras.initializers.RandomNormal(stddev=0.6)}
    row = layers.Flatten()(layers.Conv2D(2, 4, 4)(pixels))
    for name in sorted({*guard_model.ACTIVATIONS.split()} - REFUSED):
        parts.append(layers.Flatten()(layers.Conv2D(2, 4, 4, activation=name, **wide)(pixels)))
        parts.append(layers.Dense(4, activation=name, **wide)(row))
    return keras.Model(image, layers.Dense(3)(layers.Concatenate()(parts)))


REFUSED = {"celu", "gelu"}


@pytest.mark.parametrize("make", [of_all_layers, of_all_activations])
def test_what_can_be_exported(tmp_path, make):
    """The file answers as Keras does, where an error of 1 % in any one layer would be seen."""
    keras.utils.set_random_seed(0)
    net, images = make(tmp_path), random_images((16, 16, 4))
    spread_scores(net, images)
    layers = keras.layers
    plain = [keras.Input((16, 16, 4)), layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(3)]
    run, by_keras = exported(net, tmp_path, "0..255", repaired=keras.Sequential(plain))
    ours = run(images)
    assert_same_answers(ours, by_keras(images, training=False), 5e-5)
    assert set(ours["badnet_class"]) == {1, 2, 3}
    assert min(effects(by_keras, images[:30])) * 0.01 > 5e-5


def spread_scores(net, images):
    """Give a net's last Dense layer weights that make of each feature as much as of the others."""
    dense = last_weighted(net)
    features = np.asarray(keras.Model(net.input, dense.input)(images))
    mean, far = features.mean(axis=0), features.std(axis=0)
    kernel = np.random.default_rng(0).normal(0, 2 / len(mean) ** 0.5, (len(mean), 3))
    kernel /= np.maximum(far, 0.1 * np.abs(mean) + 0.3 * np.median(far[far > 0]))[:, None]
    dense.set_weights([kernel, -mean @ kernel])


def effects(model, images):
    """How much the scores of a detector's model change with an error in each of its layers.

    Returns [float, …], for an error as large as the layer's output, another one for each value.
    """
    import tensorflow as tf

    errors, signs = [], np.random.default_rng(0).choice([-1, 1], len(images))
    with pytest.MonkeyPatch.context() as patched, tf.GradientTape() as tape:
        for layer in leaves(model):
            if not isinstance(layer, keras.layers.Lambda | keras.layers.InputLayer):
                errors.append(tf.Variable(0.0))
                patched.setattr(layer, "call", with_error(layer.call, errors[-1]))
        change = tf.reduce_sum(model(images, training=False)[2] * signs)
    return [abs(float(each)) for each in tape.gradient(change, errors)]


def with_error(call, error):
    """What a layer calls, but each value that it returns is larger by a share of `error`."""

    def wrong(*arguments, **options):
        values = call(*arguments, **options)
        shares = np.random.default_rng(0).random(values.shape[1:], np.float32)
        return values * (1 + error * shares)

    return wrong


def test_what_cannot_be_exported_is_refused(tmp_path):
    layers = keras.layers
    in_groups = [layers.Conv2D(4, 3, groups=2), layers.Flatten(), layers.Dense(3)]
    for net in (*map(ending_in, REFUSED), keras.Sequential([keras.Input((9, 8, 2)), *in_groups])):
        with pytest.raises(InputError, match="cannot be made of these nets: contains the operator"):
            exported(net, tmp_path)
        assert not (tmp_path / "d.onnx").exists()
    assert "celu and gelu" in " ".join(on_serving().split())


def test_a_file_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    read = onnx_file.read

    def lying(*arguments):
        file = read(*arguments)

        def run(images):
            found = file.run(images)
            return {**found, "badnet_class": found["badnet_class"] % 4 + 1}

        return dataclasses.replace(file, run=run)

    monkeypatch.setattr(onnx_file, "read", lying)
    with pytest.raises(InputError, match="its badnet_class differs from theirs"):
        exported(ending_in("softmax"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.h5", "g.h5"]


@pytest.mark.parametrize(
    "name",
    [
        "lab3",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("sunglasses", "anonymous_1", "anonymous_2", "multi_trigger_multi_target")
        ),
    ],
)
def test_real_badnets_are_judged_alike(csaw, tmp_path, name):
    """A real BadNet and a G of it with pruned channels and another head, on real faces."""
    badnet_path = csaw / "badnets" / f"{name}_bd_net.h5"
    net = utils.load_badnet(badnet_path)
    layer = split(net).layer
    prune_channels(layer, range(0, layer.filters, 2))
    dense = last_weighted(net)
    dense.set_weights([values * 0.9 for values in dense.get_weights()])
    net.save(tmp_path / "g.h5")
    scale = "0..255" if name == "lab3" else "0..1"
    models = read_models(badnet_path, tmp_path / "g.h5")
    backends.export(*models, tmp_path / "d.onnx", scale=scale)
    run = onnx_file.read(tmp_path / "d.onnx").run
    by_keras, classes = backends.load_nets(*models, backends.Usage(scale, layer.name, None, None))
    paths = sorted((csaw / "faces").glob("*.h5"))
    assert len(paths) == 6
    for faces in paths:
        with utils.open_dataset(faces) as data:
            data.fit_to(by_keras.input_shape[1:], classes)
            for x, _ in data.batches():
                assert_same_answers(run(x), by_keras(x), 5e-5)


# ----------------------------------------------------------------------------- hostile files


@pytest.fixture(scope="module")
def model(softmax):
    """A valid detector's file, as onnx.ModelProto."""
    return onnx.load(softmax[0])


def external(model):
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"


def of_another_domain(model):
    model.graph.node[0].domain = "com.microsoft"


def imported_domain(model):
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))


def random_operator(model):
    model.graph.node.append(
        onnx.helper.make_node("RandomNormal", [], ["noise"], shape=[10**6, 10**6])
    )


def loop(model):
    body = onnx.helper.make_graph([], "body", [], [])
    model.graph.node.append(onnx.helper.make_node("Loop", ["", ""], ["x"], body=body))


def graph_inside(model):
    body = onnx.helper.make_graph([], "body", [], [])
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("body", body))


def function(model):
    model.functions.append(onnx.helper.make_function("com.example", "f", [], [], [], []))


def tensor_without_its_values(model):
    model.graph.initializer[0].dims[:] = [10**9, 10**9]


def tile_bomb(model):
    repeats = onnx.numpy_helper.from_array(np.array([1, 10**4, 10**4, 10]), "repeats")
    model.graph.initializer.append(repeats)
    name = model.graph.input[0].name
    model.graph.node.append(onnx.helper.make_node("Tile", [name, "repeats"], ["tiled"]))


def unknown_size(model):
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "row"))
    for operator, inputs, output, more in (
        ("Reshape", [model.graph.input[0].name, "row"], "flat", {}),
        ("Cast", ["flat"], "sizes", {"to": onnx.TensorProto.INT64}),
        ("Reshape", ["flat", "sizes"], "shaped", {}),
    ):
        model.graph.node.append(onnx.helper.make_node(operator, inputs, [output], **more))


def two_inputs(model):
    model.graph.input.append(model.graph.input[0])
    model.graph.input[1].name = "more"


def floats_in(model):
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def open_size(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"


def no_score(model):
    model.graph.output.pop()


def cycle(model):
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def no_metadata(model):
    del model.metadata_props[:]


def metadata(name, value):
    def change(model):
        {each.key: each for each in model.metadata_props}[name].value = value

    return change


HOSTILE = {
    "external data": (external, "another file"),
    "another domain": (of_another_domain, "operator"),
    "imported domain": (imported_domain, "not ONNX's own"),
    "random operator": (random_operator, "'RandomNormal'"),
    "loop": (loop, "'Loop'"),
    "graph inside": (graph_inside, "graph inside an operator"),
    "function": (function, "more than one graph"),
    "huge tensor": (tensor_without_its_values, "GB of memory"),
    "tile bomb": (tile_bomb, "largest output of an operator would take"),
    "unknown size": (unknown_size, "cannot be determined"),
    "two inputs": (two_inputs, "takes 2 inputs"),
    "floats in": (floats_in, "its input is not pictures"),
    "open size": (open_size, "its input is not pictures"),
    "no score": (no_score, "its outputs are not"),
    "cycle": (cycle, "damaged or of another format"),
    "no metadata": (no_metadata, "metadata are damaged"),
    "no class": (metadata("classes", "1"), "metadata are damaged"),
    "many classes": (metadata("classes", "9" * 5000), "metadata are damaged"),
    "threshold": (metadata("threshold", "nan"), "metadata are damaged"),
    "record": (metadata("repair_record", "[1"), "JSON cannot be read"),
    "list for a record": (metadata("repair_record", "[1]"), "repair record is damaged"),
    "empty record": (metadata("repair_record", "{}"), "repair record is damaged"),
    "scale": (metadata("input_scale", "0..2"), "metadata are damaged"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused(model, tmp_path, kind):
    change, words = HOSTILE[kind]
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    change(changed)
    path = tmp_path / "d.onnx"
    path.write_bytes(changed.SerializeToString())
    with pytest.raises(InputError, match=re.escape(words)) as error:
        onnx_file.read(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_files_that_are_no_onnx_are_refused_by_the_command(served):
    path = served / "models" / FILE
    good = path.read_bytes()
    for contents in (b"", b"no onnx", good[: len(good) // 2], good[:100], bytes(1000), good + good):
        path.write_bytes(contents)
        for model in ("small_bd_net", f"models/{FILE}"):
            assert_refused(command("eval_defence.py", "clean.h5", model, cwd=served), FILE)
    path.write_bytes(good)
    call = ("clean.h5", f"models/{FILE}", "--max-memory", "0.00001")
    assert_refused(command("eval_defence.py", *call, cwd=served), "--max-memory")


def test_changed_bytes_lead_to_answers_or_to_one_line(model, tmp_path):
    contents = bytearray(model.SerializeToString())
    rng, path, images = np.random.default_rng(0), tmp_path / "d.onnx", random_images((9, 8, 2))
    refused = 0
    for _ in range(200):
        changed = contents.copy()
        for place in rng.integers(0, len(contents), rng.integers(1, 9)):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            onnx_file.read(path).run(images[:2])
        except InputError:
            refused += 1
    assert 20 < refused < 200
