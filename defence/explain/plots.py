"""Plots that people look at: the pruning curve of a repair, and what judging datasets gave."""

import io
import textwrap
from pathlib import Path

import numpy as np

from defence.base.errors import InputError
from defence.base.files import replace_file
from defence.base.text import escape_surrogates

FORMATS = (".png", ".svg", ".pdf")
SHEET, SHEET_ROWS = 10, 6  # flagged images in a row of the contact sheet, and its rows
NAME = {"width": 26, "max_lines": 3, "placeholder": " …"}  # of a file, beside such a row
ATTRACTING = 20  # classes that get most of the wrong answers, shown
CHART = (4.8, 3.2)  # of a page, in inches
EDGES = {"left": 0.2, "right": 0.98, "bottom": 0.16, "top": 0.92}
BINS, LEAST = 40, 1e-6  # of the histograms, and the score that a smaller one is shown as


def require_format(path):
    """Raises InputError where matplotlib is missing or it is none of FORMATS: before, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from error
    if Path(path).suffix not in FORMATS:
        raise InputError(f"{path}: a plot's name ends in one of {', '.join(FORMATS)}")


def escape_formulas(name):
    """A file's name as matplotlib shows it as it is: it takes $ for the start of a formula."""
    return escape_surrogates(name).replace("$", r"\$")


def save_figure(figure, path):
    with replace_file(path) as beside:
        figure.savefig(beside, dpi=150)


def plot_pruning_curve(record, path):
    """Draw the pruning curve of a RepairRecord into a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    _draw_pruning(figure.add_subplot(), record)
    save_figure(figure, path)


def _draw_pruning(axes, record):
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
    axes.legend(loc="best", fontsize="small")


def _draw_activations(axes, record):
    """The mean activation of each channel, in the order of pruning; what was pruned stands out."""
    means = np.array(record.mean_activation)[record.order]
    pruned = np.isin(record.order, record.pruned)
    for label, chosen, colour in (("pruned", pruned, "C3"), ("kept", ~pruned, "C0")):
        axes.bar(np.flatnonzero(chosen), means[chosen], color=colour, label=label)
    axes.set(xlabel=f"channels of {record.layer}, by mean activation", ylabel="mean activation")
    axes.legend(loc="best", fontsize="small")


def _draw_wrong_answers(axes, finding):
    """How many wrong answers each class gets, the twenty with most of them and all others."""
    rows = sorted(finding.classes, key=lambda row: -row["count"])
    first, rest = rows[:ATTRACTING], rows[ATTRACTING:]
    named = [str(row["class"]) for row in first]
    colours = ["C3" if row["class"] in finding.targets else "C0" for row in first]
    axes.bar(named, [row["count"] for row in first], color=colours)
    if rest:
        axes.bar("rest", np.mean([row["count"] for row in rest]), color="grey")
    axes.tick_params(axis="x", labelsize="x-small")
    axes.set(xlabel="class; of the rest the mean", ylabel="wrong answers to disturbed pictures")


def draw_repair_charts(record, finding):
    """Yield (words, chart) of a page about a repair. finding: a whole Finding, or None."""
    yield "accuracy while channels are pruned", draw_chart(_draw_pruning, record)
    yield "mean activation of each channel", draw_chart(_draw_activations, record)
    if finding and finding.classes:
        yield "wrong answers that each class gets", draw_chart(_draw_wrong_answers, finding)


def plot_evaluation(results, datasets, all_answers, path):
    """Draw ROC curves, histograms of the scores and a contact sheet of flagged images into a file.

    results: as in eval_defence.py's JSON.  datasets: the Datasets, the clean one first.
    all_answers: detector.Answers for each of them.
    """
    from matplotlib.figure import Figure

    files = (results["clean"], *results["poisoned"])
    names = [escape_formulas(Path(each["file"]).stem) for each in files]
    scores = [answers.score for answers in all_answers]
    flagged = [select_flagged(*pair) for pair in zip(datasets, all_answers)]
    rows = [(name, *each) for name, each in zip(names, flagged) if len(each[0])][:SHEET_ROWS]
    figure = Figure(figsize=(11, 4.5 + 1.7 * len(rows)), layout="constrained")
    heights = [4.5, *[1.7] * len(rows)]
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    graphs = grid[0].subgridspec(1, 2)
    if results["poisoned"]:
        _draw_roc(figure.add_subplot(graphs[0]), results, scores, names)
    beside = graphs[1] if results["poisoned"] else graphs[:]
    _draw_scores(figure.add_subplot(beside), results["threshold"], scores, names)
    for place, row in enumerate(rows, start=1):
        _draw_flagged(figure, grid[place], *row)
    save_figure(figure, path)


def draw_judged_charts(parts, threshold, results):
    """Yield the charts of a page about judged images, as `chart` gives them.

    parts: [where.Looked, …].  threshold: of the score, or None.
    results: as for `evaluation`, or None for pictures.
    """
    paths = [each.stream.path for each in parts]
    names = [escape_formulas(path.stem) if path else "pictures" for path in paths]
    scores = [each.stream.answers.score for each in parts]
    if not any(map(len, scores)):
        return
    yield draw_chart(_draw_scores, threshold, scores, names)
    if results and results["poisoned"]:
        yield draw_chart(_draw_roc, results, scores, names)


def draw_chart(draw, *given):
    """A chart of a page: (SVG as bytes, its size in inches). draw: of (axes, *given)."""
    import matplotlib
    from matplotlib.figure import Figure

    figure, file = Figure(figsize=CHART), io.BytesIO()
    figure.subplots_adjust(**EDGES)  # a layout that is sought takes as long as all else
    draw(figure.add_subplot(), *given)
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "chart"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue(), CHART


def select_flagged(data, answers):
    """Up to SHEET of the flagged images of a Dataset, evenly spread, and both classes of each."""
    flagged = np.flatnonzero(answers.flagged)
    count = min(SHEET, len(flagged))
    some = flagged[np.arange(count) * len(flagged) // max(1, count)]
    chosen = np.isin(np.arange(len(data)), some)
    return data.take(chosen), answers.badnet[some], answers.repaired[some]


def _draw_roc(axes, results, scores, names):
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


def _draw_scores(axes, threshold, scores, names):
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


def _draw_flagged(figure, place, name, images, badnet, repaired):
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
