"""The house: imports between the rooms of defence/ go one way, and no file outgrows a reader."""

import ast

import pytest
from conftest import ROOT

# Each package may import itself and the packages before it.
ROOMS = ["base", "net", "load", "judge", "beyond", "explain", "options"]
DEMO = {"badnet", "attacks", "architectures", "faces", "triggers"}  # of models/ and data/
SCRIPTS = ["repair.py", "eval_defence.py", "utils.py"]
FILES = sorted((ROOT / "defence").glob("**/*.py"))
LINES, SCRIPT_LINES, FUNCTION_LINES = 400, 250, 50


def get_name(path):
    return str(path.relative_to(ROOT))


def list_imports(path):
    """Return the modules that a file imports, at any depth of its code: {text, …}."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


def list_rooms(path):
    return {module.split(".")[1] for module in list_imports(path) if module.startswith("defence.")}


def list_packages(path):
    """Return the first names of the imported modules: `from utils import x` gives utils."""
    return {module.split(".")[0] for module in list_imports(path)}


def test_every_file_of_the_house_is_in_a_room():
    assert {path.parent.name for path in FILES if path.parent.name != "defence"} == {*ROOMS}
    assert [path.name for path in FILES if path.parent.name == "defence"] == ["__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=get_name)
def test_arrows_go_one_way(path):
    if path.parent.name == "defence":
        assert not list_rooms(path)
        return
    below = ROOMS[: ROOMS.index(path.parent.name) + 1]
    assert list_rooms(path) <= {*below}
    assert not list_packages(path) & {"utils", "repair", "eval_defence", *DEMO}


def test_within_a_room_nothing_goes_in_a_circle():
    arrows = {}
    for path in FILES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        arrows[module] = list_imports(path)
    modules = {*arrows}
    for module, targets in arrows.items():  # of "defence.net.graph.flatten" the module is meant
        whole = {target if target in modules else target.rpartition(".")[0] for target in targets}
        arrows[module] = whole & modules
    while arrows:
        free = {module for module, targets in arrows.items() if not targets & arrows.keys()}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {module: targets for module, targets in arrows.items() if module not in free}


def test_the_scripts_import_neither_each_other_nor_the_demo():
    for script in SCRIPTS:
        assert not list_packages(ROOT / script) & {"repair", "eval_defence", *DEMO}


@pytest.mark.parametrize("name", [*map(get_name, FILES), *SCRIPTS])
def test_nothing_outgrows_a_reader(name):
    text = (ROOT / name).read_text()
    assert text.count("\n") <= (SCRIPT_LINES if name in SCRIPTS else LINES)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= FUNCTION_LINES, node.name
