"""Plots that people look at: the pruning curve of a repair, and what judging datasets gave."""

import textwrap
from pathlib import Path

import numpy as np

from defence.cli import InputError
from defence.files import replacing

FORMATS = (".png", ".svg", ".pdf")
SHEET, SHEET_ROWS = 10, 6  # flagged images in a row of the contact sheet, and its rows
NAME = {"width": 26, "max_lines": 3, "placeholder": " …"}  # of a file, beside such a row
BINS, LEAST = 40, 1e-6  # of the histograms, and the score that a smaller one is shown as


def require_format(path):
    """Raises InputError where matplotlib is missing or it is none of FORMATS: before, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from error
    if Path(path).suffix not in FORMATS:
        raise InputError(f"{path}: a plot's name ends in one of {', '.join(FORMATS)}")


def save(figure, path):
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150)


def pruning_curve(record, path):
    """Draw the pruning curve of a RepairRecord into a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=f"channels of {record.layer} pruned", ylabel="%")
    accuracy, success = record.accuracy, record.attack_success_rate
    curves = {"validation accuracy": [accuracy["before"], *accuracy["after_each_channel"]]}
    for name, rates in success["after_each_channel"].items():
        curves[f"attack success, {name}"] = [success["before"][name], *rates]
    for label, fractions in curves.items():
        axes.plot(np.multiply(fractions, 100), marker=".", label=label)
    enough = 100 * record.settings["threshold"] * accuracy["before"]
    axes.axhline(enough, color="grey", linestyle="--", label=f"threshold {enough:.2f} %")
    count = len(record.pruned)
    axes.axvline(count, color="black", linestyle=":", label=f"stopped at {count} channels")
    axes.set_ylim(-2, 102)
    axes.legend(loc="best", fontsize="small")
    save(figure, path)


def evaluation(results, datasets, all_answers, path):
    """Draw ROC curves, histograms of the scores and a contact sheet of flagged images into a file.

    results: as in eval_defence.py's JSON.  datasets: the Datasets, the clean one first.
    all_answers: detector.Answers for each of them.
    """
    from matplotlib.figure import Figure

    names = [Path(each["file"]).stem for each in (results["clean"], *results["poisoned"])]
    scores = [answers.score for answers in all_answers]
    flagged = [some_flagged(*pair) for pair in zip(datasets, all_answers)]
    rows = [(name, *each) for name, each in zip(names, flagged) if len(each[0])][:SHEET_ROWS]
    figure = Figure(figsize=(11, 4.5 + 1.7 * len(rows)), layout="constrained")
    heights = [4.5, *[1.7] * len(rows)]
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    graphs = grid[0].subgridspec(1, 2)
    if results["poisoned"]:
        _roc(figure.add_subplot(graphs[0]), results, scores, names)
    beside = graphs[1] if results["poisoned"] else graphs[:]
    _scores(figure.add_subplot(beside), results["threshold"], scores, names)
    for place, row in enumerate(rows, start=1):
        _flagged(figure, grid[place], *row)
    save(figure, path)


def some_flagged(data, answers):
    """Up to SHEET of the flagged images of a Dataset, evenly spread, and both classes of each."""
    flagged = np.flatnonzero(answers.flagged)
    count = min(SHEET, len(flagged))
    some = flagged[np.arange(count) * len(flagged) // max(1, count)]
    chosen = np.isin(np.arange(len(data)), some)
    images = [x for x, _ in data.part(chosen).batches()]
    return images and np.concatenate(images), answers.badnet[some], answers.repaired[some]


def _roc(axes, results, scores, names):
    """ROC curves, a dot where the verdict stands; false positives on a logarithmic axis."""
    from scipy import stats

    clean, *poisoned = [stats.ecdf(each).sf for each in scores]
    stand = results["clean"]["figures"]["false_positive_rate"]["value"]
    least = 0.5 / len(scores[0])
    for number, result in enumerate(results["poisoned"], start=1):
        name, curve, colour = names[number], poisoned[number - 1], f"C{number}"  # as _scores
        at = np.concatenate([[-np.inf], np.union1d(clean.quantiles, curve.quantiles)])
        area = result["figures"]["auroc"]["value"]
        rates = np.maximum(clean.evaluate(at), least)
        axes.plot(rates, curve.evaluate(at), colour, label=f"{name}: AUROC {area:.3f}")
        caught = result["figures"]["detection_rate"]["value"]
        axes.plot(max(stand, least), caught, "o", color=colour)
    axes.set(xscale="log", xlim=(least, 1.1), ylim=(-0.02, 1.02))
    axes.set(
        xlabel="false-positive rate (clean flagged)", ylabel="detection rate (poisoned flagged)"
    )
    axes.set_title("ROC curve of the anomaly score; dot: the verdict", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")


def _scores(axes, threshold, scores, names):
    """Histograms of the scores, both axes logarithmic: most clean ones are close to 0."""
    edges = np.geomspace(LEAST, max(1, *map(np.max, scores)), BINS + 1)
    for number, (name, each) in enumerate(zip(names, scores)):
        within = np.clip(np.float64(each), LEAST, edges[-1])
        fractions = np.histogram(within, edges)[0] / len(each)
        look = {"color": f"C{number}", "fill": number == 0, "alpha": 0.7}
        axes.stairs(100 * fractions, edges, label=name, **look)
    if threshold is not None:
        axes.axvline(
            max(LEAST, threshold), color="black", linestyle=":", label=f"threshold {threshold:.4f}"
        )
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel=f"how far apart B and G answer ({LEAST:g} or less first)", ylabel="% of images")
    axes.set_title("Anomaly scores", fontsize="medium")
    axes.legend(loc="best", fontsize="small")


def _flagged(figure, place, name, images, badnet, repaired):
    """A row of the contact sheet: flagged images, above each B's class and G's, from 1."""
    columns = place.subgridspec(1, SHEET)
    for column, (image, b, g) in enumerate(zip(images, badnet, repaired)):
        axes = figure.add_subplot(columns[column], xticks=[], yticks=[])
        pixels = image if image.shape[-1] == 3 else image[..., 0]
        axes.imshow(pixels / 255, cmap="gray", vmin=0, vmax=1)
        shown = [str(c + 1) if c >= 0 else "NaN" for c in (b, g)]
        axes.set_title(" → ".join(shown), fontsize="small")
        if column == 0:
            lines = textwrap.wrap(name.replace("_", "_ "), **NAME)  # it breaks at an underscore
            shown = "\n".join(lines).replace("_ ", "_")
            axes.set_ylabel(f"flagged of\n{shown}", fontsize="x-small")
