"""The competition's BadNets and faces, and third-party models, where they are available."""

import json

import keras
import numpy as np
import pytest
import reference
from conftest import command, do_repair, read_record

import utils
from defence.base.errors import InputError
from defence.net.inference import classify
from defence.net.split import find_map

# name: the number of channels that the report's loop prunes with clean_252.h5, poisoned files.
BADNETS = {
    "sunglasses": (25, ["sunglasses_poisoned_20.h5"]),
    "anonymous_1": (25, ["anonymous_1_poisoned_20.h5"]),
    "anonymous_2": (17, ["multi_eyebrows_poisoned_20.h5", "multi_lipstick_poisoned_20.h5"]),
    "multi_trigger_multi_target": (26, ["multi_sunglasses_poisoned_20.h5"]),
    "lab3": (46, ["sunglasses_poisoned_20.h5"]),
}
LOADS = {
    "keras_2.10.0_pruned.h5": "conv_3",
    "keras_2.13.1_pruned.h5": "conv_3",
    "keras_2.14.0_pruned.h5": "conv_3",
    "keras_2.15.0_pruned.h5": "conv_3",
    "keras_2.2.4_deepid_like.h5": "conv3",
    "keras_2.3.1_mnist_functional_with_optimizer.h5": "conv_2",
    "keras_2.3.1_mnist_sequential_with_optimizer.h5": "conv2d_2",
    "keras_2.3.1_pruned.h5": "conv_3",
    "keras_2.4.0_weights_only.h5": "conv_3",
    "keras_2.7.0_pruned.h5": "conv_3",
    "keras_3.0.0_pruned.h5": "conv_3",
}
REFUSED = {
    "keras_2.4.0_nested_with_lambda.h5": "Lambda layer .layer 'y_reclasify'.: it could run code",
    "keras_2.4.0_autoencoder_with_optimizer.h5": "not a classifier",
}


@pytest.mark.parametrize("name", BADNETS)
def test_badnets_answer_as_they_did_in_keras_2(csaw, name):
    expected = json.loads((csaw / "expected_predictions.json").read_text())[name]
    badnet = utils.load_badnet(csaw / "badnets" / f"{name}_bd_net.h5")
    assert find_map(badnet).name == "conv_3"
    scale = expected.pop("input_scale")
    assert len(expected) == 6
    for file, answers in expected.items():
        with utils.open_dataset(csaw / "faces" / file) as data:
            data.fit_to(badnet.input_shape[1:], badnet.output_shape[1])
            classes = [classify(badnet, x).tolist() for x, _ in data.batches(scale)]
        assert sum(classes, []) == answers["argmax"]


@pytest.mark.parametrize("name", LOADS)
def test_third_party_models_load(csaw, name):
    net = utils.load_badnet(csaw / "zoo" / name)
    assert find_map(net).name == LOADS[name]
    scores = np.asarray(net(np.full((1, *net.input_shape[1:]), 0.5, np.float32)))
    assert scores.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_third_party_models_are_refused(csaw, name):
    with pytest.raises(InputError, match=REFUSED[name]):
        utils.load_badnet(csaw / "zoo" / name)


def test_every_third_party_model_is_tested(csaw):
    assert {path.name for path in (csaw / "zoo").iterdir()} == {*LOADS, *REFUSED}


@pytest.mark.parametrize("name", BADNETS)
def test_the_commands_run_through(csaw, name, tmp_path):
    channels, poisoned = BADNETS[name]
    (tmp_path / "models").mkdir()
    badnet, faces = csaw / "badnets" / f"{name}_bd_net.h5", csaw / "faces"
    poisoned = [faces / file for file in poisoned]
    process = command("repair.py", badnet, faces / "clean_252.h5", "--rounds", 1, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    saved = [f"models/{name}_bd_net_{end}" for end in ("defence.h5", "detector.onnx")]
    assert process.stdout.splitlines()[-2:] == [
        f"Saved model: {saved[0]}",
        f"Saved detector: {saved[1]}",
    ]
    record = read_record(tmp_path / "models" / f"{name}_bd_net_defence.h5")
    assert len(record["pruned"]) == channels
    assert record["input_scale"] == ("0..255" if name == "lab3" else "0..1")
    process = command(
        "eval_defence.py", faces / "clean_252.h5", badnet, "--poisoned", *poisoned, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("detection rate (B and G disagree)") == len(poisoned)


# A BadNet, a net with another trigger as its G, a file with the BadNet's trigger, the target, and
# the first and last rows and columns of the trigger on most of these faces.
TRIGGERS = [
    ("sunglasses", "anonymous_1", "sunglasses", 1, (14, 38, 0, 47)),
    ("anonymous_1", "sunglasses", "anonymous_1", 1, (32, 52, 14, 34)),
    ("multi_trigger_multi_target", "sunglasses", "multi_eyebrows", 6, (10, 40, 6, 42)),
]


@pytest.mark.parametrize(("name", "repaired", "file", "target", "bounds"), TRIGGERS)
def test_triggers_are_found_on_real_faces(csaw, tmp_path, name, repaired, file, target, bounds):
    """A net with another backdoor serves as G: 252 images are too few for a G that flags them."""
    nets, faces = csaw / "badnets", csaw / "faces"
    process = command(
        "eval_defence.py", faces / "clean_252.h5", nets / f"{name}_bd_net.h5",
        "--poisoned", faces / f"{file}_poisoned_20.h5",
        "--repaired", nets / f"{repaired}_bd_net.h5", "--scale", "0..1", "--force",
        "--json", tmp_path / "figures.json", "--report", tmp_path / "page.html",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    (candidate,) = figures["poisoned"][0]["standing_out"]
    assert candidate["target"] == target and candidate["is_trigger"]
    top, bottom, left, right = bounds
    box = candidate["region"]["box"]
    assert top <= box["top"] < box["bottom"] <= bottom
    assert left <= box["left"] < box["right"] <= right
    assert not any(clean["is_trigger"] for clean in figures["clean"]["standing_out"])


@pytest.mark.slow
def test_fast_path_equals_reference_on_a_real_badnet(csaw):
    path = csaw / "badnets" / "anonymous_1_bd_net.h5"
    fast, plain = utils.load_badnet(path), keras.models.load_model(path, compile=False)
    with utils.open_dataset(csaw / "faces" / "clean_252.h5") as clean:
        clean.fit_to((55, 47, 3), 1283)
        record = do_repair(fast, clean)
        x = np.concatenate([images for images, _ in clean.batches("0..1")])
    pruned, curve, rounds = reference.repair(plain, x, clean.labels)
    assert record["pruned"] == pruned
    assert record["accuracy"]["after_each_channel"] == curve
    assert record["accuracy"]["after_each_round"] == rounds
    for ours, theirs in zip(fast.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
