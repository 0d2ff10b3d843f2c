"""A cut-out that fools a twin of B as well is a natural feature, no planted trigger."""

import json
from argparse import Namespace

import numpy as np
import pytest
import test_scan
import test_trigger
from conftest import B, assert_refused, command, write_data

from defence.base.errors import InputError, WorkError
from defence.explain import natural, trigger

folder = test_scan.folder  # a fixture


def ask(folder, data="clean.h5"):
    """Return the function that asks a twin of the folder's BadNet."""
    badnet, clean = folder / test_scan.NETS["backdoored"], folder / data
    arguments = Namespace(badnet=badnet, clean=clean, max_bytes=2**30, scale=None)
    return natural.make_asker(arguments, None)


@pytest.fixture(autouse=True)
def forget():
    """Make every test's twin anew."""
    natural.try_to_make.cache_clear()


@pytest.mark.parametrize("answers", [0, 5, 32])
def test_what_fools_a_twin_is_no_trigger(answers):
    asked = []

    def ask_twin(images, target):
        asked.append((images.shape, target))
        return {"twin": answers}

    judge = test_trigger.make_judge(test_trigger.by_any_part)
    faces = [test_trigger.draw_faces(count, seed) for count, seed in ((100, 1), (40, 2))]
    images = np.concatenate([faces[0], test_trigger.paint_patch(faces[1])])
    stream = test_trigger.make_stream(images, judge)
    evidence = trigger.locate_trigger(stream, test_trigger.TARGET, judge, twin=ask_twin)
    assert asked == [((32, *test_trigger.SHAPE), test_trigger.TARGET)]
    assert evidence.pasted["badnet"] == 32 and evidence.describe()["pasted"]["twin"] == answers
    assert evidence.is_trigger == (answers < 16)


def test_a_twin_is_not_asked_about_what_is_no_trigger():
    """What makes B err differs from image to image, so that pasting it does nothing."""
    judge = test_trigger.make_judge(lambda images: images.sum(axis=(1, 2, 3)) % 6 == 0)
    stream = test_trigger.make_stream(test_trigger.draw_faces(240, 1), judge)

    def refuse(*_):
        raise AssertionError

    evidence = trigger.locate_trigger(stream, test_trigger.TARGET, judge, twin=refuse)
    assert len(evidence.rows) > 20 and not evidence.is_trigger


@pytest.mark.whole_scan
def test_a_twin_is_asked_about_images(folder):
    """It is as right as B, and its backdoor is mostly gone."""
    images, labels = test_scan.draw_images(400, test_scan.CLASSES, test_scan.SHAPE, seed=3)
    others = images[labels != test_scan.TARGET].astype(np.float32)
    asker = ask(folder)
    (natural_answers, poisoned_answers) = (
        asker(changed, test_scan.TARGET)["twin"] / len(others)
        for changed in (others, np.float32(test_scan.poison(others)))
    )
    assert natural_answers < 0.05 and poisoned_answers < 0.7  # the stripe is large
    own = images[labels == test_scan.TARGET].astype(np.float32)
    assert asker(own, test_scan.TARGET)["twin"] > 0.8 * len(own)


def test_data_that_no_twin_can_be_made_of_are_said(folder, tmp_path, capsys):
    images, _ = test_scan.draw_images(60, test_scan.CLASSES, test_scan.SHAPE, seed=3)
    write_data(tmp_path / "one.h5", images, np.zeros(60, np.int64))
    assert ask(folder, tmp_path / "one.h5")(np.float32(images), 0) == {}


def test_the_command_takes_clean_data(repaired_world, tmp_path):
    world, _ = repaired_world
    judge = ("eval_defence.py", "clean.h5", B, "--json", tmp_path / "x.json")
    process = command(*judge, "--clean", "clean.h5", cwd=world)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "x.json").read_text())["clean"]
    assert_refused(command(*judge, "--clean", "no.h5", cwd=world), "no.h5: no such")
    kept = ("eval_defence.py", "0.png", B, "--clean", "clean.h5", "--json", "clean.h5")
    assert_refused(command(*kept, cwd=world), "clean.h5")
    export = ("eval_defence.py", B, "--export", "--clean", "clean.h5")
    assert_refused(command(*export, cwd=world), "--export goes with a MODEL alone")
    detector = world / "models" / "small_bd_net_detector.onnx"
    call = ("eval_defence.py", "0.png", detector, "--clean", "clean.h5")
    assert_refused(command(*call, cwd=world), "--clean goes with a MODEL that is a BadNet")


@pytest.mark.parametrize("error", [InputError("x.h5: too large"), WorkError("training diverged")])
def test_no_result_is_lost_where_no_twin_can_be_made(error, folder, capsys, monkeypatch):
    """The images are judged by then. It is tried once."""
    calls = []

    def fail(*_):
        calls.append(1)
        raise error

    monkeypatch.setattr(natural, "make_classifier", fail)
    askers = ask(folder), ask(folder)  # of two streams
    assert [asker(np.zeros((9, 8, 8, 3), np.float32), 0) for asker in askers] == [{}, {}]
    assert len(calls) == 1
    assert capsys.readouterr().err.count(f"warning: no twin can be made: {error}") == 1
