"""The list of guards in guard.py: it is all of them, in the order in which they run."""

import inspect
import re

import pytest
from conftest import draw_images, write_data

import utils
from defence import guard, guard_model, guard_onnx
from defence.architecture import deepid

ROOMS = {"guard.py": guard, "guard_model.py": guard_model, "guard_onnx.py": guard_onnx}
HELPERS = {"describe", "is_array", "output_sizes"}  # they refuse nothing


def listed():
    """{file: its guards, in the order of the list}."""
    found, room = {}, None
    for line in guard.__doc__.splitlines():
        if match := re.match(r"(guard\w*\.py), for ", line):
            room = found.setdefault(match[1], [])
        elif match := re.match(r"    (\w+)  ", line):
            room.append(match[1])
    return found


def test_the_list_has_every_guard_and_no_other():
    for name, room in ROOMS.items():
        own = {
            key
            for key, value in vars(room).items()
            if inspect.isroutine(value) and value.__module__ == room.__name__ and key[0] != "_"
        }
        assert own - HELPERS == set(listed()[name]), name
        assert len(set(listed()[name])) == len(listed()[name])


@pytest.fixture
def calls(monkeypatch):
    """The guards that were called, each when it was first."""
    seen = []

    def traced(name, function):
        def call(*arguments, **options):
            if name not in seen:
                seen.append(name)
            return function(*arguments, **options)

        return call

    names = sum(listed().values(), [])
    for room in (*ROOMS.values(), utils.architecture):
        for name in names:
            if hasattr(room, name):
                monkeypatch.setattr(room, name, traced(name, getattr(room, name)))
    return seen


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_the_guards_of_a_model_run_in_the_order_of_the_list(suffix, calls, tmp_path):
    deepid(4, (31, 31, 3)).save(tmp_path / f"net{suffix}")
    calls.clear()
    utils.load_badnet(tmp_path / f"net{suffix}")
    order = listed()["guard.py"] + listed()["guard_model.py"]
    # declared_shapes is the one that calls two others, and stands with the models'.
    found = [name for name in calls if name != "declared_shapes"]
    expected = [name for name in order if name in found]
    assert found == expected
    needed = set(listed()["guard_model.py"]) - {"check_step_fits"}
    assert needed | {"check_heaps", "check_links", "check_stored", "parse_json"} <= set(calls)
    assert ("open_archive" in calls) == (suffix == ".keras")


def test_the_guards_of_a_dataset_run_in_the_order_of_the_list(calls, tmp_path):
    images, labels = draw_images(9, 3, (9, 8, 3), seed=0)
    with utils.open_dataset(write_data(tmp_path / "d.h5", images, labels)):
        found = [name for name in calls if name != "check_fits"]  # of the labels, at the end
    assert found == ["inspecting", "check_links", "check_stored"]
