"""Reading and writing: models, datasets, records, and half-written files."""

import csv
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from conftest import ROOT, draw_images, read_record, sequential, write_data, write_record

import utils
from defence.base import files
from defence.base.errors import InputError
from defence.load import datasets, guard_config
from defence.load.architecture import build_deepid
from defence.net.graph import sort_tensors

SHAPE = (31, 33, 3)


def compute_outputs(net):
    images = np.random.default_rng(0).random((4, *net.input_shape[1:]), np.float32)
    return np.asarray(net(images, training=False))


# --------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", ["net.h5", "net.hdf5", "net.keras"])
@pytest.mark.parametrize("make", [build_deepid, sequential])
def test_full_models_load_without_their_optimizer(tmp_path, name, make):
    net = make(3, SHAPE)
    net.compile("adam", "sparse_categorical_crossentropy")
    net.fit(np.zeros((2, *SHAPE)), np.zeros(2), verbose=0)
    net.save(tmp_path / name)
    loaded = utils.load_badnet(tmp_path / name)
    np.testing.assert_allclose(compute_outputs(loaded), compute_outputs(net), atol=1e-6)
    assert not loaded.compiled


@pytest.mark.parametrize("name", ["net.weights.h5", "legacy.h5"])
def test_a_file_of_weights_loads_as_a_deepid(tmp_path, name):
    net = build_deepid(7)
    if name == "legacy.h5":
        net.save(tmp_path / "full.h5")
        with h5py.File(tmp_path / "full.h5") as full, h5py.File(tmp_path / name, "w") as file:
            weights = full["model_weights"]
            for part in weights:
                weights.copy(part, file)
            file.attrs.update(weights.attrs)
    else:
        net.save_weights(tmp_path / name)
    loaded = utils.load_badnet(tmp_path / name)
    np.testing.assert_allclose(compute_outputs(loaded), compute_outputs(net), atol=1e-6)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_sequential_of_keras_2_loads(tmp_path, as_list):
    """Keras 2 wrote the input's shape into the first layer, and before 2.2.3 a bare list."""
    rng = np.random.default_rng(0)
    layers = [
        ("Conv2D", {"name": "c", "filters": 4, "kernel_size": [3, 3], "activation": "relu",
                    "batch_input_shape": [None, 8, 8, 1]}),
        ("Flatten", {"name": "f", "data_format": "channels_last"}),
        ("Dense", {"name": "d", "units": 3, "activation": "softmax"}),
    ]  # fmt: skip
    layers = [{"class_name": name, "config": config} for name, config in layers]
    config = layers if as_list else {"name": "sequential_1", "layers": layers}
    weights = {"c": [(3, 3, 1, 4), (4,)], "f": [], "d": [(144, 3), (3,)]}
    weights = {
        name: [rng.normal(size=shape).astype("f4") for shape in shapes]
        for name, shapes in weights.items()
    }
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": config})
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [name.encode() for name in weights]
        group.attrs["keras_version"] = b"2.2.2"
        group.attrs["backend"] = b"tensorflow"
        for name, values in weights.items():
            names = [f"{name}/{kind}:0" for kind in ("kernel", "bias")[: len(values)]]
            group.create_group(name).attrs["weight_names"] = [key.encode() for key in names]
            for key, value in zip(names, values):
                group[name][key] = value
    x = rng.random((2, 8, 8, 1), np.float32)
    plain = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    plain.set_weights([value for values in weights.values() for value in values])
    np.testing.assert_allclose(utils.load_badnet(tmp_path / "old.h5")(x), plain(x), atol=1e-6)


def every_layer():
    """Return a net with every layer that guard_config.py allows, most of them with weights."""
    layers = keras.layers
    image = keras.Input((16, 16, 4), name="image")
    x = layers.RandomFlip()(layers.RandomRotation(0.1)(layers.RandomZoom(0.1)(image)))
    x = layers.RandomContrast(0.1)(layers.RandomTranslation(0.1, 0.1)(x))
    x = layers.CenterCrop(16, 16)(layers.Resizing(20, 18)(x))
    x = layers.Rescaling(1 / 255)(layers.Normalization(mean=[1, 2, 3, 4], variance=[4] * 4)(x))
    x = layers.Conv2D(4, 3, padding="same", kernel_regularizer="l2", name="conv")(x)
    x = layers.SeparableConv2D(4, 3, padding="same")(layers.DepthwiseConv2D(3, padding="same")(x))
    x = layers.Conv2DTranspose(4, 3, padding="same")(layers.BatchNormalization()(x))
    x = layers.GroupNormalization(2)(layers.LayerNormalization()(x))
    x = layers.ELU()(layers.PReLU()(layers.LeakyReLU()(layers.ReLU(6)(x))))
    x = layers.SpatialDropout2D(0.1)(layers.Dropout(0.1, seed=2**40)(x))
    x = layers.AlphaDropout(0.1)(layers.GaussianDropout(0.1)(layers.GaussianNoise(0.1)(x)))
    x = layers.Cropping2D(1)(layers.ZeroPadding2D(1)(layers.UpSampling2D(2)(x)))
    x = layers.Identity()(layers.UnitNormalization()(x))
    x = layers.AveragePooling2D(2)(layers.MaxPooling2D(1)(x))
    merges = (layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum)
    parts = [merge()([x, layers.Activation("tanh")(x)]) for merge in (*merges, layers.Minimum)]
    x = layers.Reshape((16, 16, 24))(layers.Permute((2, 1, 3))(layers.Concatenate()(parts)))
    x = keras.Sequential([keras.Input((16, 16, 24)), layers.Conv2D(5, 3)], name="nested")(x)
    inner = keras.Input((14, 14, 5))
    x = keras.Model(inner, layers.Conv2D(6, 1, activation="gelu")(inner), name="inner")(x)
    parts = [layers.GlobalMaxPooling2D()(x), layers.GlobalAveragePooling2D()(x)]
    x = layers.Concatenate()([*parts, layers.Flatten()(x)])
    return keras.Model(image, layers.Softmax()(layers.Dense(3, activation="linear")(x)))


@pytest.mark.parametrize("name", ["net.h5", "net.keras"])
def test_every_allowed_layer_loads(tmp_path, name):
    net = every_layer()
    nested = [
        layer
        for model in (net.get_layer("nested"), net.get_layer("inner"))
        for layer in model.layers
    ]
    kinds = {type(layer).__name__ for layer in [*net.layers, *nested]}
    allowed = {*guard_config.LAYERS.split(), *guard_config.PREPARE.split()}
    assert kinds == allowed - {"Model", "RandomBrightness"}  # not writable as .h5
    net.set_weights([np.random.default_rng(0).random(w.shape) + 0.1 for w in net.get_weights()])
    net.save(tmp_path / name)
    np.testing.assert_allclose(
        compute_outputs(utils.load_badnet(tmp_path / name)), compute_outputs(net), atol=1e-5
    )


def test_every_allowed_layer_gives_an_image_one_row_whatever_else_is_in_the_batch():
    net = every_layer()
    tensors = sort_tensors(net.output)
    maps = keras.Model(net.input, tensors)
    images = np.random.default_rng(0).uniform(0, 255, (3, *net.input_shape[1:])).astype("f4")
    together = maps(images, training=False)
    alone = [maps(images[i : i + 1], training=False) for i in range(3)]
    for tensor, rows, *singles in zip(tensors, together, *alone):
        assert len(rows) == 3, tensor.name
        np.testing.assert_allclose(rows, np.concatenate(singles), rtol=1e-4, atol=1e-4)


def test_every_allowed_activation_loads(tmp_path):
    for name in guard_config.ACTIVATIONS.split():
        net = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten()])
        net.add(keras.layers.Dense(3, activation=name))
        net.save(tmp_path / "net.keras")
        np.testing.assert_array_equal(
            compute_outputs(utils.load_badnet(tmp_path / "net.keras")), compute_outputs(net)
        )


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("policy", ["float16", "mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_nets_of_other_precision_load(tmp_path, policy, suffix):
    """Their configs name the type of every tensor; weights in bfloat16 are no array of numbers."""
    image, path = keras.Input((9, 8, 3), dtype="float32"), tmp_path / f"net{suffix}"
    x = keras.layers.Flatten(dtype=policy)(keras.layers.Conv2D(4, 3, dtype=policy)(image))
    keras.Model(image, keras.layers.Dense(3, dtype="float32")(x)).save(path)
    if policy == "bfloat16":
        with pytest.raises(InputError, match="; save the net with weights in float32$"):
            utils.load_badnet(path)
    else:
        assert utils.load_badnet(path).output_shape == (None, 3)


def test_configs_of_newer_versions_are_read(tmp_path):
    """They may have keys that this version of Keras does not know, without an effect."""
    net, path = build_deepid(4), tmp_path / "net.h5"
    net.save(path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        for layer in config["config"]["layers"]:
            if "kernel_initializer" in layer["config"]:
                layer["config"]["kernel_initializer"]["config"]["of_a_later_version"] = None
                layer["config"]["quantization_config"] = None
        file.attrs["model_config"] = json.dumps(config)
    np.testing.assert_array_equal(compute_outputs(utils.load_badnet(path)), compute_outputs(net))


@pytest.mark.parametrize("name", ["net.h5", "net.keras"])
def test_a_model_replaced_after_reading_is_neither_hashed_nor_loaded(tmp_path, name):
    """The bytes first read are hashed, inspected and loaded, at whatever moment."""
    first, second, path = build_deepid(4), build_deepid(4), tmp_path / name
    first.save(path)
    digest = files.hash_file(path)
    before, between = utils.read_model(path), utils.read_model(path)
    _ = between.declared  # inspected, then replaced, then loaded
    second.save(tmp_path / f"other_{name}")
    os.replace(tmp_path / f"other_{name}", path)
    assert files.hash_file(path) != digest
    for model in (before, between):
        assert model.sha256 == digest
        np.testing.assert_array_equal(compute_outputs(model.load()), compute_outputs(first))
    path.write_bytes(b"")  # in place
    assert before.sha256 == digest
    np.testing.assert_array_equal(compute_outputs(before.load()), compute_outputs(first))
    assert not np.array_equal(compute_outputs(first), compute_outputs(second))


def test_saved_net_carries_its_record_and_is_a_plain_keras_file(tmp_path):
    net, path = build_deepid(4), tmp_path / "g.h5"
    net.save(tmp_path / "b.h5")
    order = list(range(50_000))  # HDF5 allows 64 KB in a plain attribute
    optional = {"holdout": {"images": 3}, "finding": {}, "poisoned": [], "class_names": ["a"]}
    text = write_record(tmp_path / "b.h5", order=order, **optional)
    (tmp_path / "b.h5").unlink()
    utils.save_model(net, path, repair_record=text)
    assert read_record(path) == json.loads(text)
    with h5py.File(path) as file:
        assert file.attrs["repair_record"] == text
    plain = keras.models.load_model(path)
    np.testing.assert_array_equal(compute_outputs(plain), compute_outputs(net))
    assert os.listdir(tmp_path) == ["g.h5"]


def test_a_saved_file_has_the_usual_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        utils.save_model(build_deepid(4), tmp_path / "g.h5")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "g.h5").stat().st_mode) == 0o640


# ------------------------------------------------------------------------------------ datasets


def read(path, shape=SHAPE, classes=5):
    with utils.open_dataset(path) as data:
        data.fit_to(shape, classes)
        images, labels = zip(*data.batches(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["u1", "f4", "f8"])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "gzip"}, {"chunks": (7, 3, 31, 33)}], ids=str
)
def test_every_format_gives_the_same_images(tmp_path, first, kind, options):
    images, labels = draw_images(20, 5, SHAPE, seed=0)
    path = tmp_path / "data.h5"
    if first:
        write_data(path, images.astype(kind), labels.astype("i2"), **options)
    else:
        options = {} if "chunks" in options else options
        with h5py.File(path, "w") as file:
            file.create_dataset("data", data=images.astype(kind), **options)
            file["label"] = labels.astype("f4")
    x, y = read(path)
    assert x.dtype == np.float32 and np.array_equal(x, images)
    assert y.dtype == np.int64 and np.array_equal(y, labels)


@pytest.mark.parametrize("kind", ["u1", "u2", "i8", "f2", "f4", "f8"])
def test_labels_of_any_type(tmp_path, kind):
    images, labels = draw_images(20, 5, SHAPE, seed=0)
    assert np.array_equal(
        read(write_data(tmp_path / "d.h5", images, labels.astype(kind)))[1], labels
    )


def test_images_are_read_in_batches_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "BATCH_VALUES", 8 * np.prod(SHAPE) + 5)
    images, labels = draw_images(20, 5, SHAPE, seed=0)
    write_data(tmp_path / "d.h5", images, labels)
    with utils.open_dataset(tmp_path / "d.h5") as data:
        data.fit_to(SHAPE, 5)
        sizes = [len(x) for x, _ in data.batches()]
        assert sizes == [8, 8, 4] and data.batch_count == 3
    assert np.array_equal(read(tmp_path / "d.h5")[0], images)


def test_images_are_not_read_before_their_layout_is_chosen(tmp_path):
    """Read with channels last, images with channels first would be scrambled."""
    write_data(tmp_path / "d.h5", *draw_images(4, 2, SHAPE, seed=0))
    with utils.open_dataset(tmp_path / "d.h5") as data:
        with pytest.raises(RuntimeError, match="fit_to"):
            next(data.batches())
        data.fit_to(SHAPE, 2)
        assert len(list(data.batches())) == 1


# --------------------------------------------------------------------------------------- images


def test_keras_comes_silently_without_packages_which_can_be_imported_later():
    code = (
        "import sys, gc; from defence.base import startup; startup.import_keras(); "
        "assert not startup.UNWANTED & sys.modules.keys() and gc.isenabled(); "
        "import matplotlib.figure, scipy.stats, sklearn.metrics"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replace_file(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.json"]
    files.write_json([1], path)
    assert json.loads(path.read_text()) == [1] and os.listdir(tmp_path) == ["out.json"]


WRITE = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from defence.base.files import replace_file
from defence.base.process import run_command
def main():
    with replace_file("out.h5") as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), int(sys.argv[1]))
sys.exit(run_command(main))
"""
# Python ignores the last two: whoever writes gets an error instead. The others are faults, do not
# end a process by default on every system, cannot be handled, or are nobody's custom.
IGNORED = {signal.SIGPIPE, signal.SIGXFSZ}
OTHERS = {
    *("SIGILL", "SIGTRAP", "SIGABRT", "SIGBUS", "SIGFPE", "SIGSEGV", "SIGSYS", "SIGSTKFLT"),
    *("SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGEMT"),
    *("SIGKILL", "SIGSTOP", "SIGINFO", "SIGIO", "SIGRTMIN", "SIGRTMAX"),
}
ENDING = [n for n in signal.Signals if n.name not in OTHERS and n not in IGNORED]


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_a_signal_while_writing_leaves_no_file(tmp_path, number):
    process = subprocess.run(
        [sys.executable, "-c", WRITE, str(number.value)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # the tests may run under nohup
    )
    what = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert (process.returncode, process.stderr) == (128 + number, f"-c: {what}\n")
    assert os.listdir(tmp_path) == []


def test_under_nohup_the_end_of_the_session_does_not_end_the_work(tmp_path):
    call = ["nohup", sys.executable, "-c", WRITE, str(signal.SIGHUP.value)]
    process = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0 and (tmp_path / "out.h5").read_text() == "half"


def test_a_spreadsheet_runs_no_cell_of_a_csv(tmp_path):
    harmful = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1+1"]
    harmless = ["a=1", "./=1", "/=1", "-1", "-1e-5", "+2.5", "", "'=1", " =1"]
    rows = [{"path": text, "class_name": text, "score": -0.5} for text in harmful + harmless]
    files.write_csv(iter(rows), tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    for text, row in zip(harmful, written):
        assert (row["path"], row["class_name"], row["score"]) == (f"./{text}", f"'{text}", "-0.5")
        assert Path(row["path"]) == Path(text)
    for text, row in zip(harmless, written[len(harmful) :], strict=True):
        assert (row["path"], row["class_name"]) == (text, text)
