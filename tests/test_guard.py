"""The list of guards in guard.py: it names every guard, in the order in which they run."""

import inspect
import re

import pytest
from conftest import draw_images, write_data

import utils
from defence.base import files
from defence.load import (
    architecture,
    datasets,
    guard,
    guard_config,
    guard_hdf5,
    guard_image,
    guard_model,
    guard_onnx,
    models,
)
from defence.load.architecture import build_deepid

ROOMS = {
    "guard.py": guard,
    "guard_hdf5.py": guard_hdf5,
    "guard_image.py": guard_image,
    "guard_config.py": guard_config,
    "guard_model.py": guard_model,
    "guard_onnx.py": guard_onnx,
}
CALLERS = (architecture, models, datasets, files)
ELSEWHERE = {"check_fits", "check_step_fits"}  # the limits of memory are in limits.py
HELPERS = {"describe_array", "is_array", "open_hdf5", "walk_through"}  # they refuse no file


def read_list():
    """Return the list, [(file, guard), …], in its order."""
    rows, file = [], None
    for line in guard.__doc__.splitlines():
        if match := re.match(r"(guard\w*\.py), for ", line):
            file = match[1]
        elif match := re.match(r"    (\w+)  ", line):
            rows.append((file, match[1]))
    return rows


def test_the_list_has_every_guard_and_no_other():
    for name, room in ROOMS.items():
        functions = {
            key
            for key, value in vars(room).items()
            if inspect.isroutine(value) and value.__module__ == room.__name__ and key[0] != "_"
        }
        names = [guard for file, guard in read_list() if file == name]
        assert functions - HELPERS == set(names) - ELSEWHERE, name
        assert len(set(names)) == len(names)


@pytest.fixture
def calls(monkeypatch):
    """Return the names of the guards that are called, in the order of their first calls."""
    names_called = []

    def trace(name, function):
        def call(*arguments, **options):
            if name not in names_called:
                names_called.append(name)
            return function(*arguments, **options)

        return call

    names = [name for _, name in read_list()]
    for room in (*ROOMS.values(), *CALLERS):
        for name in names:
            if hasattr(room, name):
                monkeypatch.setattr(room, name, trace(name, getattr(room, name)))
    return names_called


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_the_guards_of_a_model_run_in_the_order_of_the_list(suffix, calls, tmp_path):
    build_deepid(4, (31, 31, 3)).save(tmp_path / f"net{suffix}")
    calls.clear()
    utils.load_badnet(tmp_path / f"net{suffix}")
    # read_shapes calls two other guards, and is listed with the guards of models.
    order = [name for name in calls if name != "read_shapes"]
    assert order == [name for _, name in read_list() if name in order]
    needed = {name for file, name in read_list() if file == "guard_model.py"} - {"check_step_fits"}
    assert needed | {"check_heaps", "rehearse", "check_links", "check_stored", "parse_json"} <= set(
        calls
    )
    assert ("open_archive" in calls) == (suffix == ".keras")


def test_the_guards_of_a_dataset_run_in_the_order_of_the_list(calls, tmp_path):
    images, labels = draw_images(9, 3, (9, 8, 3), seed=0)
    with utils.open_dataset(write_data(tmp_path / "d.h5", images, labels)):
        order = [name for name in calls if name != "check_fits"]  # of the labels, at the end
    assert order == ["inspect_file", "rehearse", "check_links", "check_stored"]
