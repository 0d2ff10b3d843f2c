"""Which class the flagged images have: whether one stands out, and what is said of it."""

import json

import numpy as np
import pytest
from conftest import ROOT, command

from defence.explain import flagged

CLASSES = 40
DEMO = sorted((ROOT / "img" / "demo").glob("*.png"))


def stream(clean, caught=0, target=0, rate=0.02, seed=0):
    """Clean images of equally likely classes, a few flagged, and poisoned ones, all flagged."""
    rng = np.random.default_rng(seed)
    badnet = np.append(rng.integers(0, CLASSES, clean), np.full(caught, target))
    return badnet, np.append(rng.random(clean) < rate, np.full(caught, True))


def test_a_target_stands_out():
    (found,) = flagged.find_outstanding(*stream(960, 40, target=7), CLASSES)
    assert found.target == 8 and found.hits >= 40 and found.p_value < flagged.LEVEL
    assert "flagged images with class 8 (Ann): " in flagged.describe_candidate(found, "Ann")


def test_several_targets_stand_out_among_many_classes():
    badnet = np.concatenate([np.arange(1283), np.full(50, 3), np.full(40, 5)])
    found = flagged.find_outstanding(badnet, np.arange(len(badnet)) >= 1283, 1283)
    assert [each.target for each in found] == [4, 6]


def test_of_clean_streams_hardly_any_has_a_class_that_stands_out():
    """Where classes are as hard as the method assumes; tests/tools/streams.py looks at nets'."""
    alarms, rng = 0, np.random.default_rng(1)
    for _ in range(400):
        hard = rng.dirichlet(np.full(CLASSES, flagged.WEIGHT))
        badnet = np.append(rng.integers(0, CLASSES, 500), rng.choice(CLASSES, 12, p=hard))
        alarms += bool(flagged.find_outstanding(badnet, np.arange(512) >= 500, CLASSES))
    assert alarms <= 400 * flagged.LEVEL


def test_a_stream_of_one_person_accuses_nobody():
    badnet = np.full(300, 6)
    assert flagged.find_outstanding(badnet, np.arange(300) < 20, CLASSES) == []


@pytest.mark.parametrize("bad", [[], [True], [False] * 9])
def test_few_or_none_flagged(bad):
    assert flagged.find_outstanding(np.zeros(len(bad), int), np.array(bad, bool), CLASSES) == []


def test_an_answer_that_is_none_has_no_class():
    badnet, bad = stream(500, 30, target=2)
    more = np.append(badnet, np.full(90, -1)), np.append(bad, np.full(90, True))
    assert flagged.find_outstanding(*more, CLASSES) == flagged.find_outstanding(
        badnet, bad, CLASSES
    )


def test_the_command_tells_of_pictures_and_of_datasets(tmp_path):
    """Its exit status stays as it is."""
    model, data = (ROOT / "models" / "demo_bd_net.h5", ROOT / "data")
    repaired = tmp_path / "g.h5"
    data /= "demo_clean_validation_data.h5"
    made = command("repair.py", model, data, "--output", repaired)
    assert made.returncode == 0, made.stderr
    nets = (model, "--repaired", repaired)
    poisoned = [path for path in DEMO if path.name.startswith("sunglasses")]
    several = command("eval_defence.py", *DEMO, *poisoned, *nets, "--json", "-")
    assert several.returncode == 0
    assert "flagged images with class 1: it looks like" in several.stderr
    (told,) = json.loads(several.stdout)["standing_out"]
    assert told["target"] == 1 and told["hits"] >= 8
    alone = command("eval_defence.py", poisoned[0], *nets)
    assert alone.stdout == "41\n" and "target" not in alone.stderr
    judged = command("eval_defence.py", data, *nets, "--json", "-")
    assert json.loads(judged.stdout)["clean"]["standing_out"] == []
