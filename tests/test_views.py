"""The anomaly score of a hardened G: its answers to an image as it is, and moved by a pixel."""

import keras
import numpy as np
import pytest
import reference
from conftest import do_repair, draw_images, sequential, write_data, write_record
from test_export import assert_same_answers, draw_random, make_net

import utils
from defence.beyond.observer import Observer
from defence.beyond.settings import Settings
from defence.judge import backends, detector, onnx_file
from defence.judge.record import parse_record
from defence.load.architecture import make_functional

SCORE = detector.name_score(hardened=True)
FACTS = {"badnet_sha256": "", "repaired_sha256": "", "input_scale": "0..1", "threshold": "2.5"}
FACTS |= {"classes": "4", "score": SCORE, "repair_record": "null"}


def make_pair(shape=(9, 8, 2), change=-2):
    """Return B, and a G whose weights are B's times `change`."""
    badnet, repaired = (make_functional(make_net("softmax", shape)) for _ in range(2))
    repaired.set_weights([values * change for values in badnet.get_weights()])
    return badnet, repaired


def export(badnet, repaired, folder):
    """Export a hardened pair. Return (DetectorFile.run, Keras's joint model)."""
    model = detector.build_detector(badnet, repaired, "0..1", hardened=True)
    return onnx_file.write_detector(model, FACTS, folder / "d.onnx").run, model


def test_a_view_is_moved_by_a_pixel_and_its_edge_repeats():
    images = np.arange(24, dtype=np.float32).reshape(1, 2, 4, 3)
    same, right, left = detector.shift_images(images)
    columns = same[0, 0, :, 0].tolist()
    assert right[0, 0, :, 0].tolist() == [columns[0], *columns[:-1]]
    assert left[0, 0, :, 0].tolist() == [*columns[1:], columns[-1]]
    views = detector.shift_images(keras.ops.convert_to_tensor(images))
    for ours, theirs in zip(views, (same, right, left), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("width", [8, 1])
def test_the_detector_and_its_file_score_as_the_plain_loop_does(tmp_path, width):
    shape = (9, width, 2)
    keras.utils.set_random_seed(3)
    layers = [keras.Input(shape), keras.layers.Flatten()]
    nets = [
        make_functional(keras.Sequential([*layers, keras.layers.Dense(4, activation="softmax")]))
        for _ in range(2)
    ]
    images = draw_random(shape)[:40]
    run, model = export(*nets, tmp_path)
    answers = model(images)
    np.testing.assert_allclose(answers[2], reference.score(*nets, images / 255), rtol=1e-4)
    assert_same_answers(run(images), answers)
    for ours, theirs in zip(answers, reference.judge(*nets, images / 255)):
        np.testing.assert_array_equal(ours, theirs)  # the classes are of the image as it is


def test_the_file_answers_as_keras_does(tmp_path):
    run, model = export(*make_pair(), tmp_path)
    images = draw_random((9, 8, 2))
    assert_same_answers(run(images), model(images))
    assert_same_answers(run(images[:1]), model(images[:1]))


def make_linear(kernel, bias=(0, 0)):
    """Return a net that gives logits. kernel: (height, width, classes)."""
    layers = [keras.Input((*kernel.shape[:2], 1)), keras.layers.Flatten()]
    net = make_functional(keras.Sequential([*layers, keras.layers.Dense(kernel.shape[2])]))
    net.layers[-1].set_weights([kernel.reshape(-1, kernel.shape[2]), np.array(bias)])
    return net


def test_nan_in_one_view_flags_the_image(tmp_path):
    """In the view to the right, the bright first column is there twice, and G's sum overflows."""
    kernel = np.zeros((1, 8, 4), np.float32)
    kernel[0, :2, 0] = 2e38
    nets = make_linear(np.sign(kernel), np.zeros(4)), make_linear(kernel, np.zeros(4))
    run, model = export(*nets, tmp_path)
    images = np.zeros((2, 1, 8, 1), np.float32)
    images[0, 0, 0] = images[1, 0, 7] = 255
    _, repaired, score = map(np.asarray, model(images))
    assert repaired.tolist() == [-1, 0]
    assert (score == np.float32(detector.MAX_SCORE)).tolist() == [True, False]
    assert_same_answers(run(images), model(images))
    assert run(images)["class"].tolist() == [5, 1]


def test_a_trigger_that_works_only_where_it_is_scores_high():
    """B takes a bright second column for class 1, and the column beside it against it."""
    trigger = np.zeros((4, 8, 2), np.float32)
    trigger[:, 1, 0], trigger[:, [0, 2], 0] = 10, -10
    nets = make_linear(trigger, (0, 5)), make_linear(0 * trigger, (0, 5))
    images = np.zeros((1, 4, 8, 1), np.float32)
    images[:, :, 1] = 255
    badnet, repaired, score = detector.build_detector(*nets, "0..1", hardened=True)(images)
    assert (badnet[0], repaired[0]) == (0, 1) and score[0] > 30
    moved = [nets[0](view / 255).numpy().argmax() for view in detector.shift_images(images)]
    assert moved == [0, 1, 1]


@pytest.mark.parametrize("harden", [False, True])
def test_held_out_scores_are_those_of_the_detector(tmp_path, harden):
    shape = (24, 24, 3)
    images, labels = draw_images(160, 4, shape, seed=1)
    path = write_data(tmp_path / "clean.h5", images, labels)
    keras.utils.set_random_seed(1)
    badnet = make_functional(sequential(4, shape))
    badnet.save(tmp_path / "b.h5")
    settings = Settings(harden=harden, harden_steps=4, rounds=1, retrain_epochs=1)
    with utils.open_dataset(path) as data:
        data.fit_to(shape, 4)
        clean, held_out = utils.hold_out(data, 0.25, 0)
        observer = Observer(held_out=held_out)
        do_repair(badnet, clean, settings, observer)
        seen = held_out.take(np.ones(len(held_out), bool))
    badnet.save(tmp_path / "g.h5")
    text = write_record(tmp_path / "b.h5", settings=settings.to_record())
    usage = backends.Usage("0..1", None, None, parse_record(text, "g.h5"))
    models = [utils.read_model(tmp_path / name) for name in ("b.h5", "g.h5")]
    model, _ = backends.load_nets(*models, usage)
    scores = np.sort(np.asarray(model(seen)[2]))
    np.testing.assert_allclose(observer.holdout["scores"], scores, rtol=1e-4, atol=1e-5)
