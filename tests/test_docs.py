"""README and docs: the commands print what the console blocks show."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser

from defence.load import guard_config

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SLOW = {"serving.md"}  # starts Ray and Node
LINES, ALL_LINES, COLUMNS = 180, 1400, 8  # at most: of README; of docs/; of any table
RESULT_LINES = 5000  # of tests/results/, at most
VARIES = re.compile(r"\d+(\.\d+)?(?= %|,|$)")  # seconds and rates, which differ between machines
POINTS = 1.0  # by which a rate may differ, in %
SAVE = re.compile(r"save\s+this\s+as\s+`([^`]+)`", re.IGNORECASE)  # the block that follows
LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")


def list_blocks(path, language):
    """Return the code blocks of a language in a document, in their order."""
    parser = CodeBlockParser(language, lambda example: None)
    return list(Sybil([parser]).parse(path).examples())


def copy_checkout(folder):
    """Copy what a reader has: the committed files, and the packages to install."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in files.stdout.decode().rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    packages = ROOT / ".venv" / "node_modules"
    if packages.exists():
        (folder / "node_modules").symlink_to(packages)


def run_console(example, folder):
    """Run the commands of a console block, and compare their output with the block.

    Return a command that was not run because Node or its packages are absent, or None.
    """
    for text in re.split(r"^\$ ", str(example.parsed), flags=re.MULTILINE)[1:]:
        line, _, expected = text.partition("\n")
        if line.startswith("node ") and not (folder / "node_modules" / "pngjs").exists():
            return line
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        process = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if "error: " in expected else subprocess.PIPE,
            text=True,
        )
        output = process.stdout
        assert agree(output, expected), f"$ {line}\n{output}{process.stderr or ''}"


def agree(printed, expected):
    """Return whether two texts are equal, except for seconds and for rates within POINTS."""
    ours, theirs = printed.splitlines(), expected.rstrip().splitlines()
    return len(ours) == len(theirs) and all(map(lines_agree, ours, theirs))


def lines_agree(ours, theirs):
    if ours == theirs:
        return True
    timed, rates = ours.startswith("seconds: "), "%" in ours
    numbers = [[float(match[0]) for match in VARIES.finditer(line)] for line in (ours, theirs)]
    same = VARIES.sub("0", ours) == VARIES.sub("0", theirs)
    near = all(abs(a - b) <= POINTS for a, b in zip(*numbers))
    return same and (timed or (rates and near))


def test_lines_agree_where_they_should_and_only_there():
    assert lines_agree("accuracy 98.67 %", "accuracy 98.83 %")
    assert lines_agree("seconds: prune 0.5, total 9.1", "seconds: prune 0.3, total 4.0")
    for ours, theirs in (
        ("accuracy 98.67 %", "accuracy 96.67 %"),
        ("accuracy 98.67 %", "accuracy of B 98.67 %"),
        ("a.png\t41", "a.png\t4"),
        ("pruned 34 of 60 channels", "pruned 35 of 60 channels"),
    ):
        assert not lines_agree(ours, theirs)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.name, marks=[pytest.mark.slow] * (path.name in SLOW))
        for path in DOCUMENTS
    ],
)
def test_the_commands_print_what_console_blocks_show(path, tmp_path):
    consoles = list_blocks(path, "console")
    if not consoles:
        pytest.skip("has no console block")
    copy_checkout(tmp_path)
    for language in ("python", "js"):
        for example in list_blocks(path, language):
            name = SAVE.findall(example.document.text[: example.start])[-1]
            (tmp_path / name).write_text(str(example.parsed))
    if skipped := list(filter(None, [run_console(example, tmp_path) for example in consoles])):
        pytest.skip(f"the rest agrees, but Node or its packages are absent: {', '.join(skipped)}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_short_and_their_links_work(path):
    text = path.read_text()
    assert path.name != "README.md" or len(text.splitlines()) <= LINES
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace(r"\|", "").count("|") <= COLUMNS + 1 for line in rows)
    for target, _ in LINK.findall(text):
        assert (path.parent / target).exists(), target


def test_the_documents_and_the_results_stay_short():
    def count(paths):
        return sum(len(path.read_text().splitlines()) for path in paths if path.is_file())

    assert count(DOCUMENTS[1:]) <= ALL_LINES
    assert count((ROOT / "tests" / "results").glob("**/*")) <= RESULT_LINES


def test_the_documented_lists_equal_the_guards_lists():
    path = ROOT / "docs" / "security.md"
    for language, allowed in (
        ("layers", guard_config.LAYERS + guard_config.PREPARE),
        ("activations", guard_config.ACTIVATIONS),
    ):
        (example,) = list_blocks(path, language)
        assert re.split(r",\s+", str(example.parsed).strip()) == allowed.split()
