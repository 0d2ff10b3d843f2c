"""Plots: the pruning curve of a repair, the scores and flagged images of judged datasets."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from defence.base.errors import InputError
from defence.base.files import replace_file
from defence.base.limits import Name
from defence.base.text import escape_surrogates
from defence.judge.detector import name_rule

if TYPE_CHECKING:
    from defence.beyond.finding import Finding
    from defence.explain.trigger import StreamFindings
    from defence.judge.detector import Answers
    from defence.judge.record import RepairRecord
    from defence.load.datasets import Dataset

FORMATS = (".png", ".svg", ".pdf")
SHEET, SHEET_ROWS = 10, 6  # flagged images in a row of the contact sheet, and rows, at most
NAME_COLUMNS, NAME_LINES = 26, 3  # of a file's name beside such a row, at most
CLASS_LENGTH = 14  # characters of a class's name, at most
ATTRACTING = 20  # classes with the most wrong answers that are shown, at most
CHART = (4.8, 3.2)  # a page's chart without its legend, in inches
LEGEND_LINE, LEGEND_COLUMNS = 0.2, 50  # of a legend: inches of a line, and characters in it
EDGES = {"left": 0.2, "right": 0.98, "bottom": 0.16, "top": 0.92}
NAMES_EDGE = 0.44  # the bottom edge of a chart with names below it
BINS, LEAST = 40, 1e-6  # of the histograms; smaller scores are shown as LEAST

Chart = tuple[bytes, tuple[float, float]]  # SVG, and its size in inches


def require_format(path: Name) -> None:
    """Raise InputError where matplotlib is missing or `path` has none of the FORMATS."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from error
    if Path(path).suffix not in FORMATS:
        raise InputError(f"{path}: a plot's name ends in one of {', '.join(FORMATS)}")


def escape_formulas(name: str) -> str:
    """Escape a file's name for matplotlib, which takes $ for the start of a formula.

    Put a space before a name that begins with _, which matplotlib would leave out of a legend.
    """
    return " " * name.startswith("_") + escape_surrogates(name).replace("$", r"\$")


def place_legend(axes: Any) -> None:
    """Put the legend below the axes, where it hides no curve. Wrap long names."""
    axes.legend(loc="upper left", bbox_to_anchor=(-0.05, -0.2), fontsize="small", frameon=False)
    for text in axes.get_legend().get_texts():
        text.set_text(_wrap_name(text.get_text(), LEGEND_COLUMNS))


def count_legend_lines(axes: Any) -> int:
    """Return how many lines the legend below the axes has; 0 where there is none."""
    legend = axes.get_legend()
    if legend is None or legend.get_frame_on():  # one within the axes has a frame
        return 0
    return sum(text.get_text().count("\n") + 1 for text in legend.get_texts())


def shorten_class(label: int, class_names: Sequence[str] | None) -> str:
    """Return the number of a class, from 1, and its name, short. label: 0..N-1, or -1 for NaN."""
    if label < 0:
        return "NaN"
    name = class_names[label] if class_names else ""
    short = name if len(name) <= CLASS_LENGTH else f"{name[: CLASS_LENGTH - 1]}…"
    return escape_formulas(f"{label + 1} {short}".strip())


def save_figure(figure: Any, path: Name) -> None:
    """Write a matplotlib figure to a file, whole or not at all."""
    with replace_file(path) as beside:
        figure.savefig(beside, dpi=150)


# ------------------------------------------------------------------------------------ a repair


def plot_pruning_curve(record: RepairRecord, path: Name) -> None:
    """Draw the pruning curve of a repair to a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    _draw_pruning(figure.add_subplot(), record)
    save_figure(figure, path)


def _draw_pruning(axes: Any, record: RepairRecord) -> None:
    """Draw accuracy and attack success against the number of pruned channels."""
    accuracy, success = record.accuracy, record.attack_success_rate
    curves = {"validation accuracy": [accuracy["before"], *accuracy["after_each_channel"]]}
    for name, rates in success["after_each_channel"].items():
        curves[f"attack success, {escape_formulas(name)}"] = [success["before"][name], *rates]
    for label, fractions in curves.items():
        axes.plot(np.multiply(fractions, 100), marker=".", label=label)
    enough = 100 * record.settings["threshold"] * accuracy["before"]
    axes.axhline(enough, color="grey", linestyle="--", label=f"threshold {enough:.2f} %")
    count = len(record.pruned)
    axes.axvline(count, color="black", linestyle=":", label=f"stopped at {count} channels")
    axes.set(xlabel=f"channels of {record.layer} pruned", ylabel="%", ylim=(-2, 102))
    axes.xaxis.get_major_locator().set_params(integer=True)
    place_legend(axes)


def _draw_activations(axes: Any, record: RepairRecord) -> None:
    """Draw the mean activation of each channel in the order of pruning, pruned ones in red."""
    means = np.array(record.mean_activation)[record.order]
    pruned = np.isin(record.order, record.pruned)
    for label, mask, colour in (("pruned", pruned, "C3"), ("kept", ~pruned, "C0")):
        axes.bar(np.flatnonzero(mask), means[mask], color=colour, label=label)
    axes.set(xlabel=f"channels of {record.layer}, by mean activation", ylabel="mean activation")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper left", fontsize="small")  # the bars rise to the right


def _draw_wrong_answers(axes: Any, finding: Finding, class_names: Sequence[str] | None) -> None:
    """Draw the number of wrong answers of the ATTRACTING classes, and the mean of the rest."""
    rows = sorted(finding.classes, key=lambda row: -row["count"])
    top, tail = rows[:ATTRACTING], rows[ATTRACTING:]
    labels = [shorten_class(row["class"] - 1, class_names) for row in top]
    colours = ["C3" if row["class"] in finding.targets else "C0" for row in top]
    axes.bar(labels, [row["count"] for row in top], color=colours)
    if tail:
        axes.bar("rest", np.mean([row["count"] for row in tail]), color="grey")
    axes.tick_params(axis="x", labelsize="x-small", rotation=90 if class_names else 0)
    axes.set(xlabel="class (rest: their mean)", ylabel="wrong answers to disturbed images")
    if class_names:
        axes.figure.subplots_adjust(bottom=NAMES_EDGE)
        axes.set_ylabel("wrong answers to\ndisturbed images")


def draw_repair_charts(
    record: RepairRecord, finding: Finding | None, class_names: Sequence[str] | None = None
) -> Iterator[tuple[str, Chart]]:
    """Yield (description, chart) for the page of a repair.

    finding: the whole Finding, not the part in the record.
    """
    yield "accuracy while channels are pruned", draw_chart(_draw_pruning, record)
    yield "mean activation of each channel", draw_chart(_draw_activations, record)
    if finding and finding.classes:
        chart = draw_chart(_draw_wrong_answers, finding, class_names)
        yield "wrong answers that each class gets", chart


def draw_chart(draw: Callable, *arguments: Any) -> Chart:
    """Draw a chart for a page, by draw(axes, *arguments)."""
    import matplotlib
    from matplotlib.figure import Figure

    figure, file = Figure(), io.BytesIO()
    axes = figure.add_subplot()
    draw(axes, *arguments)
    # Room for the legend: a computed layout would take as long as the whole drawing.
    width, height = CHART
    legend = LEGEND_LINE * count_legend_lines(axes)
    size = width, height + legend
    low = max(EDGES["bottom"], figure.subplotpars.bottom)  # names below the axes take more room
    top, bottom = ((legend + height * edge) / size[1] for edge in (EDGES["top"], low))
    figure.set_size_inches(size)
    figure.subplots_adjust(**EDGES | {"top": top, "bottom": bottom})
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "chart"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue(), size


# ------------------------------------------------------------------------------- judged images


def plot_evaluation(
    results: dict,
    datasets: Sequence[Dataset],
    all_answers: Sequence[Answers],
    path: Name,
    class_names: Sequence[str] | None = None,
) -> None:
    """Draw ROC curves, histograms of the scores and a contact sheet of flagged images to a file.

    results: as in eval_defence.py's JSON.  datasets: the clean one first.
    all_answers: for each dataset.
    """
    from matplotlib.figure import Figure

    dataset_results = (results["clean"], *results["poisoned"])
    names = [escape_formulas(Path(result["file"]).stem) for result in dataset_results]
    scores = [answers.score for answers in all_answers]
    flagged = [select_flagged(data, answers) for data, answers in zip(datasets, all_answers)]
    rows = [(name, *row) for name, row in zip(names, flagged) if len(row[0])][:SHEET_ROWS]
    figure = Figure(figsize=(11, 4.5 + 1.7 * len(rows)), layout="constrained")
    heights = [4.5, *[1.7] * len(rows)]
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    graphs = grid[0].subgridspec(1, 2)
    if results["poisoned"]:
        _draw_roc(figure.add_subplot(graphs[0]), results, scores, names)
    cell = graphs[1] if results["poisoned"] else graphs[:]
    _draw_scores(figure.add_subplot(cell), results["threshold"], scores, names)
    for number, row in enumerate(rows, start=1):
        _draw_flagged(figure, grid[number], *row, class_names)
    save_figure(figure, path)


def draw_judged_charts(
    findings_list: Sequence[StreamFindings], threshold: float | None, results: dict | None
) -> Iterator[Chart]:
    """Yield the charts of a page about judged images.

    threshold: of the score.  results: as for plot_evaluation, or None for images.
    """
    paths = [findings.stream.path for findings in findings_list]
    names = [escape_formulas(path.stem) if path else "images" for path in paths]
    scores = [findings.stream.answers.score for findings in findings_list]
    if not any(map(len, scores)):
        return
    yield draw_chart(_draw_scores, threshold, scores, names)
    if results and results["poisoned"]:
        yield draw_chart(_draw_roc, results, scores, names)


def select_flagged(data: Dataset, answers: Answers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return up to SHEET flagged images of a dataset, evenly spread, and both classes of each."""
    flagged = np.flatnonzero(answers.flagged)
    count = min(SHEET, len(flagged))
    rows = flagged[np.arange(count) * len(flagged) // max(1, count)]
    mask = np.isin(np.arange(len(data)), rows)
    return data.take(mask), answers.badnet[rows], answers.repaired[rows]


def _draw_roc(axes: Any, results: dict, scores: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Draw ROC curves and a dot for the verdict; the false-positive axis is logarithmic."""
    from scipy import stats

    clean, *poisoned = [stats.ecdf(dataset_scores).sf for dataset_scores in scores]
    false_positives = results["clean"]["figures"]["false_positive_rate"]["value"]
    least = 0.5 / len(scores[0])
    for number, result in enumerate(results["poisoned"], start=1):
        name, curve = names[number], poisoned[number - 1]
        colour, figures = f"C{number}", result["figures"]  # the colour of its histogram
        thresholds = np.concatenate([[-np.inf], np.union1d(clean.quantiles, curve.quantiles)])
        rates = np.maximum(clean.evaluate(thresholds), least)
        label = f"{name}: AUROC {figures['auroc']['value']:.3f}"
        axes.plot(rates, curve.evaluate(thresholds), colour, label=label)
        detection_rate = figures["detection_rate"]["value"]
        axes.plot(max(false_positives, least), detection_rate, "o", color=colour)
    axes.set(xscale="log", xlim=(least, 1.1), ylim=(-0.02, 1.02))
    axes.set(
        xlabel="false-positive rate (clean: score > t)",
        ylabel="detection rate (poisoned: score > t)",
    )
    rule = name_rule(results["threshold"])
    axes.set_title(f"ROC curve of the anomaly score; dot: {rule}", fontsize="medium")
    axes.grid(alpha=0.3)
    place_legend(axes)


def _draw_scores(
    axes: Any, threshold: float | None, scores: Sequence[np.ndarray], names: Sequence[str]
) -> None:
    """Draw histograms of the scores, both axes logarithmic: most clean scores are close to 0."""
    from matplotlib.ticker import LogFormatter

    edges = np.geomspace(LEAST, max(1, *map(np.max, scores)), BINS + 1)
    for number, (name, dataset_scores) in enumerate(zip(names, scores)):
        clipped = np.clip(np.float64(dataset_scores), LEAST, edges[-1])
        percent = 100 * (np.histogram(clipped, edges)[0] / len(dataset_scores))
        style = {"color": f"C{number}", "fill": number == 0, "alpha": 0.7}
        axes.stairs(percent, edges, label=name, **style)
    if threshold is not None:
        axes.axvline(
            max(LEAST, threshold), color="black", linestyle=":", label=f"threshold {threshold:.4f}"
        )
    axes.set(xscale="log", yscale="log")
    for place in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        place(LogFormatter(minor_thresholds=(2, 0.5)))  # 20, not 2×10¹
    xlabel = f"how far apart B and G answer (first bar: ≤ {LEAST:g})"
    least = 50 / max(map(len, scores))  # half an image, so that the bar of one shows
    axes.set(xlabel=xlabel, ylabel="% of images", ylim=(least, 150))
    axes.set_title("Anomaly scores", fontsize="medium")
    place_legend(axes)


def _draw_flagged(
    figure: Any,
    cell: Any,
    name: str,
    images: np.ndarray,
    badnet: np.ndarray,
    repaired: np.ndarray,
    class_names: Sequence[str] | None = None,
) -> None:
    """Draw a row of the contact sheet: flagged images, with B's class and G's above."""
    columns = cell.subgridspec(1, SHEET)
    for column, (image, *classes) in enumerate(zip(images, badnet, repaired)):
        axes = figure.add_subplot(columns[column], xticks=[], yticks=[])
        pixels = image if image.shape[-1] == 3 else image[..., 0]
        axes.imshow(pixels / 255, cmap="gray", vmin=0, vmax=1)
        labels = [shorten_class(number, class_names) for number in classes]
        arrow, size = ("\n→ ", "xx-small") if class_names else (" → ", "small")
        axes.set_title(arrow.join(labels), fontsize=size)
        if column == 0:
            axes.set_ylabel(f"flagged of\n{_wrap_name(name)}", fontsize="x-small")


def _wrap_name(name: str, columns: int = NAME_COLUMNS) -> str:
    """Wrap a file's name, also after underscores."""
    spaced = name.replace("_", "_ ")
    lines = textwrap.wrap(spaced, columns, max_lines=NAME_LINES, placeholder=" …")
    return "\n".join(lines).replace("_ ", "_")
