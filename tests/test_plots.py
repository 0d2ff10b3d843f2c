"""The plots of judged datasets."""

import numpy as np
import pytest
from conftest import draw_images, write_data
from matplotlib.figure import Figure

import utils
from defence.explain import plots
from defence.judge.detector import Answers


@pytest.mark.parametrize("flagged", [0, 1, 9, 10, 11, 13, 60])
def test_a_row_of_flagged_images_is_full_where_there_are_enough(tmp_path, flagged):
    write_data(tmp_path / "data.h5", *draw_images(60, 6, (7, 6, 3), seed=0))
    is_flagged = np.arange(60) < flagged
    with utils.open_dataset(tmp_path / "data.h5") as data:
        data.fit_to((7, 6, 3), 6)
        images, badnet, repaired = plots.select_flagged(
            data, Answers(np.arange(60), np.zeros(60, int), np.zeros(60), is_flagged)
        )
    assert len(images) == len(badnet) == len(repaired) == min(flagged, plots.SHEET)
    if flagged > plots.SHEET:
        assert badnet.max() >= flagged - 2 - flagged // plots.SHEET  # evenly spread, to the end


def test_scores_near_zero_have_bars_of_their_own():
    """Clean images have small scores, which once shared one bar."""
    clean, poisoned = np.float32([0, 1e-6, 1e-4, 3e-3, 0.1]), np.float32([20, 50])
    axes = Figure().add_subplot()
    plots._draw_scores(axes, 0.0, [clean, poisoned], ["clean", "poisoned"])
    bars, poisoned_bars = (patch.get_data().values for patch in axes.patches)
    assert np.sum(bars > 0) == 4  # 0 and 1e-6 share one
    assert np.isclose(bars.sum(), 100) and np.isclose(poisoned_bars.sum(), 100)


@pytest.mark.parametrize(
    ("threshold", "rule"), [(None, "B and G disagree"), (0.38183, "score > 0.382")]
)
def test_the_dot_of_a_roc_curve_names_its_rule(threshold, rule):
    axes, rate = Figure().add_subplot(), {"value": 0.5}
    results = {"threshold": threshold, "clean": {"figures": {"false_positive_rate": rate}}}
    results["poisoned"] = [{"figures": {"auroc": rate, "detection_rate": rate}}]
    plots._draw_roc(axes, results, [np.arange(9.0), np.arange(9.0)], ["clean", "poisoned"])
    assert axes.get_title().endswith(f"; dot: {rule}")


def test_a_long_name_beside_a_row_is_wrapped_and_not_cut():
    figure, name = Figure(), "sunglasses_to_0_poisoned_data_of_the_second_camera"
    grid = figure.add_gridspec(1, 1)
    images = np.zeros((2, 7, 6, 3), np.float32)
    plots._draw_flagged(figure, grid[0], name, images, np.zeros(2, int), np.ones(2, int))
    label = figure.axes[0].get_ylabel()
    assert label.replace("\n", "") == f"flagged of{name}" and max(map(len, label.split("\n"))) <= 26


def test_a_name_that_begins_with_an_underscore_is_in_the_legend():
    """matplotlib leaves such names out."""
    assert plots.escape_formulas("_$x") == r" _\$x"
