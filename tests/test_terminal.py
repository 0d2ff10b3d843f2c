"""The commands' output beside their results: help, warnings, progress; and Ctrl-C."""

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, B, G, assert_refused, command, run_apart, start

from defence.base.text import format_gigabytes
from defence.judge import record


def test_characters_that_the_terminal_cannot_show_are_escaped(repaired_world, tmp_path):
    """No line is lost, and an odd byte of a path stays the same byte."""
    folder, _ = repaired_world
    names = ["é.png", "😀.png", "z.png", os.fsdecode(b"\xff.png")]
    for name in names:
        shutil.copy(folder / "0.png", tmp_path / name)
    process = subprocess.run(
        [sys.executable, ROOT / "eval_defence.py", *names, folder / B, "--repaired", folder / G],
        cwd=tmp_path, capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONWARNINGS": "error"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    names = [line.split(b"\t")[0] for line in process.stdout.splitlines()]
    assert names == [b"\xe9.png", rb"\U0001f600.png", b"z.png", b"\xff.png"]


def test_sizes_are_shown_with_significant_digits():
    for size, text in ((1, "1"), (1.5, "1.50"), (1234.567, "1,234.57"), (0.0001, "0.0001")):
        assert format_gigabytes(size * 2**30) == text


def test_warnings_of_libraries_do_not_end_the_command(deepid_world, tmp_path):
    process = run_apart(
        "repair.py", deepid_world / B, deepid_world / "clean.h5", "--output", tmp_path / "g.h5",
        "--rounds", 0, cwd=tmp_path, env=os.environ | {"PYTHONWARNINGS": "error"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("script", ["repair.py", "eval_defence.py"])
def test_help_and_wrong_calls_need_no_tensorflow(script, tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = run_apart(script, "--help", env=environment)
    assert process.returncode == 0 and "MODEL" in process.stdout
    assert_refused(run_apart(script, env=environment), "--help")
    assert_refused(run_apart(script, "absent.h5", "absent.h5", env=environment), "no such file")


GROUPS = {
    "repair.py": [
        *("does it work", "hardening: a step beyond the report", "what is written"),
        *("the report's method", "general"),
    ],
    "eval_defence.py": [
        *("what is flagged", "what is written", "the nets"),
        *("on Ray, for more images than one machine can judge", "general"),
    ],
}


@pytest.mark.parametrize("script", GROUPS)
def test_help_shows_the_options_in_groups(script):
    process = command(script, "--help")
    assert (process.returncode, process.stderr) == (0, "")
    titles = [
        line[:-1] for line in process.stdout.splitlines() if line[:1].strip() and line[-1] == ":"
    ]
    assert [title for title in titles if title in GROUPS[script]] == GROUPS[script]
    assert "%%" not in process.stdout
    assert script == "repair.py" or "95 % interval" in " ".join(process.stdout.split())


@pytest.mark.parametrize("script", ["repair.py", "eval_defence.py"])
def test_the_version_is_that_of_the_record(script):
    assert command(script, "--version").stdout == f"{script} {record.VERSION}\n"


@pytest.mark.parametrize(
    "moment", ["loading", "pixels", "prune 1:", "epoch 1", "round 1", "harden, epoch"]
)
def test_interrupted_at_any_step_leaves_no_file_and_no_traceback(deepid_world, tmp_path, moment):
    (tmp_path / "models").mkdir()
    arguments = [
        deepid_world / B,
        deepid_world / "clean.h5",
        "--threshold",
        "0.5",
        "--harden",
        "--json",
        "r.json",
    ]
    process = start("repair.py", *arguments, cwd=tmp_path)
    line = ""
    while moment not in line:
        line = process.stderr.readline()
        assert line, "the process ended before that step"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert output == "" and "Traceback" not in errors
    assert sorted(os.listdir(tmp_path)) == ["models"] and os.listdir(tmp_path / "models") == []


def test_on_a_terminal_a_bar_is_shown_and_an_interrupt_gives_the_cursor_back(
    deepid_world, tmp_path
):
    terminal, child_end = pty.openpty()
    arguments = [deepid_world / B, deepid_world / "clean.h5", "--output", tmp_path / "g.h5"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "repair.py", *map(str, arguments)],
        stderr=child_end,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(child_end)
    output = b""
    while b"retrain, epoch 1" not in output:
        output += os.read(terminal, 4096)
    assert "━".encode() in output and b"\x1b[?25l" in output  # a bar, and the cursor hidden
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(terminal, 4096):
            output += part
    assert process.wait(timeout=120) == 130
    assert output.rstrip().endswith(b"\x1b[?25h") and b"Traceback" not in output
    assert os.listdir(tmp_path) == []
