"""The commands without their environment: another Python, or no packages."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from defence.base import begin

SCRIPTS = ["repair.py", "eval_defence.py"]
ACTIVATE = ". .venv/bin/activate"
INSTALL = "python -m pip install -r requirements.txt"
MAKE = f"-m venv --clear .venv && {ACTIVATE} && {INSTALL}"


def find_python(version):
    """Return another Python of this machine that runs, or None."""
    python = shutil.which(f"python{version}")
    runs = python and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0
    return python if runs else None


@pytest.fixture(params=SCRIPTS)
def bare(request, tmp_path):
    """Return a function that runs a script of a copy of the code by a Python without packages."""
    shutil.copytree(ROOT / "defence", tmp_path / "defence", ignore=shutil.ignore_patterns("__*__"))
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)

    def run(python=sys._base_executable, cwd=tmp_path):
        call = [python, "-S", tmp_path / request.param, "x"]
        return subprocess.run(call, cwd=cwd, capture_output=True, text=True)

    run.script, run.folder = request.param, tmp_path
    return run


def test_without_the_environment_one_line_says_what_to_type(bare):
    """First where there is none, then where there is one, and then from another folder."""
    start = f"{bare.script}: error: numpy is not installed for this Python; type: "
    process = bare()
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f"{start}python3 {MAKE}\n"
    (bare.folder / ".venv" / "bin").mkdir(parents=True)
    (bare.folder / ".venv" / "bin" / "activate").touch()
    assert bare().stderr == f"{start}{ACTIVATE}\n"
    process = bare(cwd=ROOT)
    assert process.stderr == f"{start}cd {bare.folder} && {ACTIVATE}\n"


def test_the_suggested_commands_are_those_of_the_readme():
    commands = MAKE.removeprefix("-m venv --clear .venv && ").split(" && ")
    readme = (ROOT / "README.md").read_text()
    assert all(line in readme for line in ("python3 -m venv .venv", *commands))


def test_an_older_python_is_refused_in_one_line(bare, monkeypatch):
    """First this one, taken for too old; then an older one, where there is one."""
    monkeypatch.setattr(begin, "OLDEST", (3, 99))
    monkeypatch.setattr(sys, "argv", [bare.script])
    with pytest.raises(SystemExit, match="which is too old; use Python 3.99; type: .*python3.12"):
        begin.begin("Python 3.99")
    for version in ("3.8", "3.9"):
        if python := find_python(version):
            process = bare(python)
            words = f"this is Python {version}, which is too old; use Python 3.10 to 3.13; type: "
            assert process.returncode == 1
            assert process.stderr == f"{bare.script}: error: {words}python3.12 {MAKE}\n"


def test_python_2_stops_at_a_line_that_says_which_python_to_use(bare):
    """It reads no further than the first line that is not its own syntax, and shows that line."""
    lines = (ROOT / bare.script).read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if re.match(r"\w+: ", line))
    assert lines[number].startswith('NEEDS: str = "Python 3.10 to 3.13"')
    assert "see README.md" in lines[number] and "\n".join(lines[: number + 1]).isascii()
    assert lines[number - 1] == "" and lines[number - 2] == '"""'  # the docstring ends here
    if python := find_python("2.7"):
        process = bare(python)
        assert process.returncode == 1 and lines[number] in process.stderr


def test_a_package_that_is_missing_later_is_named_too(tmp_path):
    (tmp_path / "h5py.py").write_text("raise ModuleNotFoundError('No module', name='h5py')")
    call = [sys.executable, ROOT / "repair.py", "models/demo_bd_net.h5", "x.h5"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=environment)
    error = f"repair.py: error: h5py is not installed for this Python; type: {INSTALL}\n"
    assert (process.returncode, process.stderr) == (1, error)
