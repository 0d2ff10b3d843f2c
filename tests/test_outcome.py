"""What a repair says about its outcome, and what it says to do next."""

import csv
import shlex
import shutil

import numpy as np
import pytest
from conftest import ROOT, B, command

from defence.explain import outcome, tables
from defence.judge import detector, figures
from defence.judge.record import RepairRecord

REPORT = ("before", "pruned", "retrained", "fine_tuned")
NETS = ["models/b.h5"]


def make_record(rates=None, images=100, hardened=False, held_out=None, **settings):
    """Make a record. rates: the attack success rates of a.h5, before and on G."""
    steps = (*REPORT, "hardened") if hardened else REPORT
    success = {step: {} for step in steps}
    if rates:
        before, after = rates
        success = dict.fromkeys(steps, {"a.h5": before}) | {steps[-1]: {"a.h5": after}}
    return RepairRecord(
        *("0", {}, {"file": "b.h5"}, {"file": "clean.h5", "images": 540}),
        {"harden": hardened, "harden_steps": 10000, **settings},
        *("0..1", "conv_3", 1, [0], [0.0], [], dict.fromkeys(steps, 0.9), success),
        {"answers": 0.0, "weights": 0.0},
        holdout=held_out,
        poisoned=[{"file": "a.h5", "images": images}] if rates else [],
    )


def test_a_failed_repair_is_called_failed():
    (line,) = outcome.describe_outcome(make_record((1.0, 0.75)))
    assert line == (
        "The repair failed: G still carries the backdoor. It answers 75.00 % of a.h5 with the "
        "target (95 % interval 65.70 % .. 82.45 %)."
    )
    assert outcome.find_left(make_record((1.0, 0.75))) == ["a.h5"]
    assert outcome.find_left(make_record((1.0, 0.75), hardened=True)) == ["a.h5"]
    for after, images in ((0.0, 100), (0.1, 100), (0.5, 2)):
        assert outcome.find_left(make_record((1.0, after), images)) == []


def test_a_backdoor_that_no_longer_works_proves_nothing_about_others():
    first, second = outcome.describe_outcome(make_record((1.0, 0.0)))
    assert first == (
        "G answers 0.00 % of a.h5 with the target (95 % interval 0.00 % .. 3.70 %), B 100.00 %."
    )
    assert second.startswith("This does not prove that no other trigger works: ")


def test_images_that_do_not_fool_the_badnet_show_nothing():
    first, _ = outcome.describe_outcome(make_record((0.03, 0.0)))
    assert first.startswith("B answers only 3.00 % of a.h5 with the target")


def test_the_reports_steps_alone_say_what_they_left_in_the_zoo():
    (line,) = outcome.describe_outcome(make_record())
    assert line == (
        "This does not prove that the backdoor is gone: after these steps alone, 44 of 59 triggers "
        "in our tests still worked on more than half of the images."
    )
    with open(ROOT / "tests" / "results" / "results.csv", newline="") as file:
        rates = [row["report_attack_success_rate_repaired"] for row in csv.DictReader(file)]
    rates = [float(rate) for rate in rates if rate]
    assert len(rates) == outcome.TRIGGERS
    assert sum(rate > 0.5 for rate in rates) == outcome.LEFT_IN


@pytest.mark.parametrize("words", [["a b.h5", "c.h5"], ["--labels", "l.txt", "--", "-a.h5", "c"]])
def test_the_next_command_is_the_same_one_with_hardening(words):
    line = outcome.describe_next(make_record(), ["repair.py", *words], NETS)
    start, _, text = line.partition(": ")
    assert start == "To remove more backdoors, harden it"
    python, script, *rest = shlex.split(text)
    assert (python, script) == ("python", "repair.py")
    options = ["--harden", "--holdout", "0.1"]
    end = words.index("--") if "--" in words else len(words)
    assert rest == words[:end] + options + words[end:]


def test_what_was_held_out_is_not_asked_for_again():
    held_out = {"expected_false_positive_rate": {"fpr": 0.0164}}
    words = ["repair.py", "b.h5", "c.h5", "--holdout", "0.1"]
    line = outcome.describe_next(make_record(held_out=held_out), words, NETS)
    assert line.endswith("repair.py b.h5 c.h5 --holdout 0.1 --harden")
    hardened = make_record(held_out=held_out, hardened=True)
    line = outcome.describe_next(hardened, words, NETS)
    assert line == "Judge images: python eval_defence.py IMAGES models/b.h5 --fpr 0.0164"
    line = outcome.describe_next(make_record(hardened=True), ["repair.py", "b", "c"], NETS)
    assert line == "To set a threshold, hold out images: python repair.py b c --holdout 0.1"


@pytest.mark.parametrize(("images", "rate"), [(60, "0.0164"), (120, "0.01")])
def test_a_hardened_net_shows_the_rate_of_fpr_and_no_other(images, rate):
    of_clean = dict.fromkeys(tables.CLEAN, figures.estimate_proportion(np.arange(images) < 20))
    expected = figures.expect_false_positives(np.linspace(0, 9, images).tolist())
    held_out = {"images": images, **of_clean, "expected_false_positive_rate": expected}
    plain, hardened = (
        "\n".join(tables.list_remarks(make_record(held_out=held_out, hardened=is_hardened), None))
        for is_hardened in (False, True)
    )
    assert "false-positive rate (B and G disagree) " in plain
    assert "clean accuracy of the two together" in plain
    assert f"  … expected with --fpr {rate} " in plain
    assert "(B and G disagree)" not in hardened and "together" not in hardened
    assert f"  false-positive rate (--fpr {rate}) " in hardened


@pytest.mark.parametrize(("wrong", "hardened"), [(15, True), (5, True), (15, False)])
def test_a_loss_of_clean_accuracy_is_said_where_it_is_sure(wrong, hardened):
    """Of 100 held-out images B errs on two; five errors of G may be chance, fifteen are not."""
    badnet, repaired = (
        figures.estimate_proportion(np.arange(100) >= errors) for errors in (2, wrong)
    )
    held_out = {"clean_accuracy_badnet": badnet, "clean_accuracy_repaired": repaired}
    lines = outcome.describe_loss(make_record(held_out=held_out, hardened=hardened))
    if wrong < 15 or not hardened:
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith("G's clean accuracy on held-out images is 13.0 points below B's. ")
        assert "Do not serve G alone" in line


def test_a_failed_hardening_says_what_is_left_to_do():
    record = make_record((1.0, 0.75), hardened=True)
    assert outcome.describe_next(record, ["repair.py"], NETS) == (
        "Use neither B nor G on images that others can choose. In our tests, more clean images "
        "helped; this repair had 540 images."
    )
    record = make_record((1.0, 0.75), hardened=True, harden_steps=100)
    line = outcome.describe_next(record, ["repair.py"], NETS)
    assert "leave --harden-steps out, which takes 5000 steps, not 100" in line


def test_the_last_line_of_a_repair_is_the_next_command(deepid_world, tmp_path):
    output = tmp_path / "g 1.h5"
    call = ("repair.py", B, "clean.h5", "--output", output, "--rounds", 0, "--no-export")
    process = command(*call, cwd=deepid_world)
    assert process.returncode == 0, process.stderr
    *_, last = process.stderr.splitlines()
    assert last.startswith("To remove more backdoors, harden it: python ")
    assert last.endswith(f"--output '{output}' --rounds 0 --no-export --harden --holdout 0.1")


@pytest.fixture(scope="module")
def hardened(repaired_world, tmp_path_factory):
    """Return a folder with B, a hardened G with held-out scores, and an image; and G's repair."""
    folder = tmp_path_factory.mktemp("hardened")
    (folder / "models").mkdir()
    for name in (B, "clean.h5", "poisoned.h5", "0.png"):
        shutil.copy(repaired_world[0] / name, folder / name)
    steps = ("--rounds", 0, "--harden", "--harden-steps", 2, "--holdout", 0.2)
    process = command("repair.py", B, "clean.h5", "--poisoned", "poisoned.h5", *steps, cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder, process


def test_a_hardened_repair_shows_the_rate_of_the_fpr_that_judges(hardened):
    lines = hardened[1].stdout.splitlines()
    assert any(line.startswith("  false-positive rate (--fpr 0.0323) ") for line in lines)
    assert "(B and G disagree)" not in hardened[1].stdout
    *_, last = hardened[1].stderr.splitlines()
    assert last == f"Judge images: python eval_defence.py IMAGES {B} --fpr 0.0323"


BETTER = "G is hardened, so add --fpr 0.0323: anomaly scores tell more than disagreement does"


@pytest.mark.parametrize("backend", ["keras", "onnx", None])
def test_a_hardened_net_is_judged_better_with_fpr_and_the_last_line_says_so(hardened, backend):
    folder, _ = hardened
    nets = (B, "--backend", backend) if backend else ("models/small_bd_net_detector.onnx",)
    process = command("eval_defence.py", "0.png", *nets, cwd=folder)
    assert process.stdout.strip().isdigit()
    assert process.stderr.splitlines()[1:] == [BETTER]
    process = command("eval_defence.py", "0.png", "0.png", *nets, cwd=folder)
    assert process.stderr.splitlines()[-1] == BETTER and process.stderr.count("--fpr") == 1
    process = command("eval_defence.py", "clean.h5", *nets, cwd=folder)
    assert process.stderr.splitlines()[-1] == BETTER
    for options in (("--fpr", 0.05), ("--quiet",)):
        process = command("eval_defence.py", "0.png", *nets, *options, cwd=folder)
        assert process.returncode == 0 and "so add" not in process.stderr


def test_an_export_says_what_the_file_flags(hardened, tmp_path):
    shutil.copytree(hardened[0] / "models", tmp_path / "models")
    call = ("eval_defence.py", B, "--export")
    process = command(*call, cwd=tmp_path)
    assert process.stdout == "Saved detector: models/small_bd_net_detector.onnx\n"
    flags = "the detector's file flags images on which B and G disagree"
    assert process.stderr.splitlines() == [flags, BETTER]
    process = command(*call, "--fpr", 0.05, cwd=tmp_path)
    flags = "the detector's file flags images whose anomaly score is above "
    assert process.stderr.startswith(flags) and "held-out clean images exceed" in process.stderr
    assert process.stderr.count("\n") == 1


def test_a_record_without_usable_scores_gives_no_advice():
    held_out = {"score": detector.name_score(hardened=True), "scores": [0.5]}
    assert make_record(harden=True, held_out=held_out).find_better_rate() == 0.5
    for settings, scores in (({"harden": False}, held_out), ({"harden": True}, None)):
        assert make_record(**settings, held_out=scores).find_better_rate() is None
    for change in ({"scores": "x"}, {"score": detector.SCORE}):  # damaged; of one view
        assert make_record(harden=True, held_out=held_out | change).find_better_rate() is None
