"""Classes of the flagged images: whether a class stands out, and the message about it."""

import html
import json

import numpy as np
import pytest
from conftest import ROOT, command

from defence.explain import flagged

CLASSES = 40
DEMO = sorted((ROOT / "img" / "demo").glob("*.png"))


def draw_stream(clean, poisoned=0, target=0, rate=0.02, seed=0):
    """Draw (classes, flags): clean images, few of them flagged, then flagged poisoned images."""
    rng = np.random.default_rng(seed)
    badnet = np.append(rng.integers(0, CLASSES, clean), np.full(poisoned, target))
    return badnet, np.append(rng.random(clean) < rate, np.full(poisoned, True))


def find_outstanding(*stream):
    return [candidate for candidate in flagged.find_candidates(*stream) if candidate.stands_out]


def test_a_target_stands_out():
    (candidate,) = find_outstanding(*draw_stream(960, 40, target=7), CLASSES)
    assert candidate.target == 8 and candidate.hits >= 40
    assert candidate.p_value < flagged.LEVEL
    assert "flagged images with class 8 (Ann): " in flagged.describe_candidate(candidate, "Ann")


def test_several_targets_stand_out_among_many_classes():
    badnet = np.concatenate([np.arange(1283), np.full(50, 3), np.full(40, 5)])
    candidates = find_outstanding(badnet, np.arange(len(badnet)) >= 1283, 1283)
    assert [candidate.target for candidate in candidates] == [4, 6]


def test_hardly_any_clean_stream_has_a_class_that_stands_out():
    """Classes are as hard as the method assumes; tests/tools/streams.py measures real nets."""
    alarms, rng = 0, np.random.default_rng(1)
    for _ in range(400):
        hard = rng.dirichlet(np.full(CLASSES, flagged.WEIGHT))
        badnet = np.append(rng.integers(0, CLASSES, 500), rng.choice(CLASSES, 12, p=hard))
        alarms += bool(find_outstanding(badnet, np.arange(512) >= 500, CLASSES))
    assert alarms <= 400 * flagged.LEVEL


def test_a_stream_of_one_person_accuses_nobody():
    badnet = np.full(300, 6)
    assert find_outstanding(badnet, np.arange(300) < 20, CLASSES) == []


@pytest.mark.parametrize("bad", [[], [True], [False] * 9])
def test_few_or_none_flagged(bad):
    assert find_outstanding(np.zeros(len(bad), int), np.array(bad, bool), CLASSES) == []


def test_images_without_an_answer_have_no_class():
    badnet, bad = draw_stream(500, 30, target=2)
    extended = np.append(badnet, np.full(90, -1)), np.append(bad, np.full(90, True))
    assert find_outstanding(*extended, CLASSES) == find_outstanding(badnet, bad, CLASSES)


@pytest.mark.parametrize(
    ("hits", "rest", "answer"),
    [(4, 0, "target"), (4, 2, "suspect"), (4, 4, None), (16, 3, "target")],
)
def test_one_rule_answers_for_few_images_and_many(hits, rest, answer):
    """The demo's images, with and without those of other triggers, and more of them."""
    badnet = np.concatenate([np.full(hits, 0), 1 + np.arange(rest), 9 + np.arange(10)])
    candidates = flagged.find_candidates(badnet, np.arange(len(badnet)) < hits + rest, CLASSES)
    suspect = flagged.find_suspect(candidates)
    assert any(candidate.stands_out for candidate in candidates) == (answer == "target")
    assert (suspect is not None) == (answer == "suspect")
    if suspect:
        assert flagged.describe_suspect(suspect, "Ann").startswith(
            "class 1 (Ann) may be a backdoor's target, but 4 of 6 flagged images do not suffice to "
            "tell (chance in a clean stream: 0.0"
        )


def test_the_command_reports_a_target_for_images_and_datasets(tmp_path):
    """The exit status stays 0."""
    model, data = (ROOT / "models" / "demo_bd_net.h5", ROOT / "data")
    repaired = tmp_path / "g.h5"
    data /= "demo_clean_validation_data.h5"
    process = command("repair.py", model, data, "--output", repaired)
    assert process.returncode == 0, process.stderr
    nets = (model, "--repaired", repaired)
    poisoned = [path for path in DEMO if path.name.startswith("sunglasses")]
    process = command("eval_defence.py", *DEMO, *poisoned, *nets, "--json", "-")
    assert process.returncode == 0
    assert "flagged images with class 1: it looks like" in process.stderr
    (candidate,) = json.loads(process.stdout)["standing_out"]
    assert candidate["target"] == 1 and candidate["hits"] >= 8
    kinds = ("clean", "sunglasses", "lipstick", "eyebrows")
    few = [ROOT / "img" / "demo" / f"{kind}_{i}.png" for kind in kinds for i in range(1, 5)]
    page = tmp_path / "x.html"
    process = command("eval_defence.py", *few, *nets, "--report", page)
    said = "lass 1 may be a backdoor's target, but 4 of 6 flagged images do not suffice to tell"
    assert f"c{said}" in process.stderr and f"C{said}" in html.unescape(page.read_text())
    process = command("eval_defence.py", poisoned[0], *nets)
    assert process.stdout == "41\n" and "target" not in process.stderr
    process = command("eval_defence.py", data, *nets, "--json", "-")
    assert json.loads(process.stdout)["clean"]["standing_out"] == []
