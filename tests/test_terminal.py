"""The commands' output beside their results: help, warnings, progress; and Ctrl-C."""

import ast
import contextlib
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, B, G, assert_refused, command, run_apart, start

from defence.base.arguments import Parser
from defence.base.startup import import_keras
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
    process = command(script, "--help-all")
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
    assert errors.splitlines()[-1] == "repair.py: interrupted; nothing was saved"
    assert sorted(os.listdir(tmp_path)) == ["models"] and os.listdir(tmp_path / "models") == []


EVIL = "\x1b]0;y\x07[red]\nrepair.py: error: z:x:"  # a title, a colour, a line, an emoji
SHOWN = r"\x1b]0;y\x07[red]\nrepair.py: error: z:x:"


def run_on_a_terminal(script, *arguments, cwd):
    """Return (exit status, all that the command wrote to the terminal, bytes)."""
    terminal, child_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / script, *map(os.fsencode, arguments)],
        cwd=cwd, stdout=child_end, stderr=child_end,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
    )  # fmt: skip
    os.close(child_end)
    output = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(terminal, 4096):
            output += part
    return process.wait(timeout=120), output


def test_a_name_is_neither_a_command_to_the_terminal_nor_markup(repaired_world, tmp_path):
    folder, _ = repaired_world
    odd = os.fsdecode(b"\x9b31m.png")
    shutil.copy(folder / "clean.h5", tmp_path / f"{EVIL}.h5")
    for name in (f"{EVIL}.png", odd):
        shutil.copy(folder / "0.png", tmp_path / name)
    nets = ("--model", folder / B, "--repaired", folder / G)
    for call in ((f"{EVIL}.h5",), (f"{EVIL}.png", odd), (f"{EVIL}.png", odd, "--csv", "-")):
        status, output = run_on_a_terminal("eval_defence.py", *call, *nets, cwd=tmp_path)
        assert status == 0, output
        assert SHOWN.encode() in output
        assert b"\x1b]" not in output and b"\x9b31m" not in output
        assert b"\nrepair.py: error:" not in output
    assert rb"\udc9b31m.png" in output


def test_results_escape_what_files_are_called(deepid_world, tmp_path):
    shutil.copy(deepid_world / "clean.h5", tmp_path / f"{EVIL}.h5")
    call = ("repair.py", deepid_world / B, f"{EVIL}.h5")
    outputs = ("--output", f"g{EVIL}.h5", "--report", f"p{EVIL}.html", "--rounds", 0)
    for options in (("--check",), ("--poisoned", f"{EVIL}.h5", *outputs)):
        process = command(*call, *options, cwd=tmp_path)
        assert process.stdout.count(SHOWN) == (1 if options == ("--check",) else 5)
        assert not any(part in process.stdout + process.stderr for part in ("\x1b", "\nrepair.py"))


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("repair.py", ("b.h5", "d.h5", EVIL)),
        ("repair.py", ("b.h5", "d.h5", "-x" + EVIL)),
        ("repair.py", ("b.h5", "d.h5", "--scale", EVIL)),
        ("repair.py", ("b.h5", "d.h5", "--ha=" + EVIL)),  # --harden, --harden-steps, …
        ("eval_defence.py", ("a.png", "b.h5", "--formats", EVIL)),
        ("eval_defence.py", ("--poisoned", "d.h5", "--fpr", EVIL)),
    ],
)
def test_an_error_about_the_command_line_is_one_line(script, arguments):
    process = command(script, *arguments)
    assert_refused(process, SHOWN, f"(see {script} --help)")
    assert process.stderr.count("\n") == 1
    assert process.stderr[:-1].isprintable()


def test_a_mistyped_option_gets_the_one_that_is_meant():
    for option in ("--holdot", "--holdot=0.1"):
        process = command("repair.py", "b.h5", "d.h5", option)
        assert_refused(process, f"unrecognized arguments: {option}", "; did you mean --holdout?")
    assert_refused(command("repair.py", "b.h5", "d.h5", "-7x"), "; a file of that name is ./-…")


def test_a_model_name_that_no_file_can_have_does_not_exist():
    process = command("eval_defence.py", "a.png", "x" * 300)
    assert_refused(process, "no such file; models/ has the BadNets")


def test_a_long_error_about_the_command_line_is_cut():
    process = command("repair.py", "b.h5", "d.h5", *[f"-{'x' * 200}"] * 500)
    assert_refused(process, "unrecognized arguments: -xxx", "; a file of that name is ./-…")
    assert len(process.stderr) < 1_200


def test_the_name_of_the_program_is_escaped_too(capsys):
    parser = Parser(prog=EVIL)
    parser.add_argument("--version", action="version", version="%(prog)s 1")
    for call in (["--version"], ["--help"], ["x"]):
        with pytest.raises(SystemExit):
            parser.parse_args(call)
        output, errors = capsys.readouterr()
        assert SHOWN in output + errors
        assert not any(part in output + errors for part in ("\x1b", "\nrepair.py"))


def test_only_one_module_prints():
    """And process.py, the error that ends a command. Both escape what they print."""
    printers = set()
    scripts = [ROOT / "repair.py", ROOT / "eval_defence.py"]
    for path in (*scripts, *(ROOT / "defence").glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if function == "print" or function.startswith(("sys.stdout.w", "sys.stderr.w")):
                printers.add(path.relative_to(ROOT).as_posix())
    assert printers == {"defence/base/progress.py", "defence/base/process.py"}


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
    last = b"\x1b[?25h\r\nrepair.py: interrupted; nothing was saved\r\n"
    assert output.endswith(last) and b"Traceback" not in output
    assert os.listdir(tmp_path) == []


def test_a_signal_says_what_it_leaves(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from defence.base import files, process, progress\n"
        "def main():\n"
        "    progress.set_quiet(sys.argv[2] == 'quiet')\n"
        "    if sys.argv[2] == 'saved':\n"
        "        with files.replace_file('out.h5') as path: path.write_text('x')\n"
        "    os.kill(os.getpid(), getattr(signal, sys.argv[1]))\n"
        "process.run_command(main, sys.argv[3])\n"
    )
    for name, mode, unsaved, expected in (
        ("SIGINT", "", "nothing was saved", "work.py: interrupted; nothing was saved\n"),
        ("SIGTERM", "", "nothing was saved", "work.py: ended by SIGTERM; nothing was saved\n"),
        ("SIGINT", "saved", "nothing was saved", "work.py: interrupted; saved: out.h5\n"),
        ("SIGINT", "", "", "work.py: interrupted\n"),
        ("SIGINT", "quiet", "nothing was saved", ""),
    ):
        process = subprocess.run(
            [sys.executable, script, name, mode, unsaved],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 128 + getattr(signal, name)
        assert process.stdout == "" and process.stderr == expected


def test_tensorflow_does_not_warn_of_its_functions():
    """A scan compiles more functions than TensorFlow takes for wise."""
    import_keras()
    assert not logging.getLogger("tensorflow").isEnabledFor(logging.WARNING)
