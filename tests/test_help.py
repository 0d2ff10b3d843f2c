"""What --help shows, and a rate that is meant as a percentage."""

import argparse
import re

import pytest
from conftest import assert_refused, command

import eval_defence
from defence.options import judge, repair

SCRIPTS = ["repair.py", "eval_defence.py"]


def list_options(text):
    return set(re.findall(r"^  (?:-\w, )?(--?[\w-]+)", text, re.MULTILINE))


@pytest.mark.parametrize(("script", "module"), [*zip(SCRIPTS, (repair, judge))])
def test_help_shows_the_usual_options_and_names_the_rest(script, module):
    usual, all_options = (command(script, name) for name in ("--help", "--help-all"))
    assert (usual.returncode, all_options.returncode) == (0, 0)
    few, many = list_options(usual.stdout), list_options(all_options.stdout)
    assert few == {*module.USUAL, "--help", "--help-all"} and len(module.USUAL) == 10
    names = module.make_parser()._option_string_actions
    assert many == {name for name in names if name.startswith("--")} > few
    line = f"--help-all shows {len(many - few)} more options; README.md lists the documents."
    assert usual.stdout.splitlines()[-1] == line
    last = all_options.stdout.splitlines()[-1]
    assert last.startswith("--help shows only the options that most people need; ")


def test_a_flagged_image_counts_more_than_an_unread_one():
    for fail, flagged, unread, status in ((1, 1, 1, 3), (1, 0, 1, 2), (0, 1, 1, 2), (0, 1, 0, 0)):
        arguments = argparse.Namespace(fail_on_flagged=bool(fail))
        detector = argparse.Namespace(better_rate=None)
        assert eval_defence.conclude(detector, arguments, flagged, unread) == status


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_exit_statuses(script):
    text = " ".join(command(script, "--help").stdout.split())
    if script == "repair.py":
        assert "Exit status: 0 done; 1 failed, or --check warned; 2 wrong input; 3 --scan" in text
        return
    words = "3 an image was flagged (with --fail-on-flagged, even if another could not be read)."
    assert words in text and "2 wrong input, or an image could not be read;" in text


@pytest.mark.parametrize(
    ("rate", "problem"),
    [
        ("1", "'1' means 100 % of clean images, and 50 % is the most; for 1 % write 0.01"),
        ("5", "'5' means 500 % of clean images, and 50 % is the most; for 5 % write 0.05"),
        ("0.7", "'0.7' means 70 % of clean images, and 50 % is the most; for 1 % write 0.01"),
        ("2 %", "'2 %' is a percentage; for 2 % write 0.02"),
    ],
)
def test_a_percentage_is_no_rate(rate, problem):
    process = command("eval_defence.py", "img/demo", "demo_bd_net", "--fpr", rate)
    assert_refused(process, f"argument --fpr: {problem} (see")
    assert judge.parse_rate("0.5") == 0.5 and judge.parse_rate("1e-2") == 0.01
