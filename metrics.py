"""Figures that tell whether a repair worked, each with its 95 % interval, and plots.

The words are the field's; README gives every formula. Classes here count from 0.
"""

import dataclasses
from pathlib import Path

import numpy as np

import utils
from terminal import InputError, printable

CONFIDENCE = 0.95
RESAMPLES = 1000  # of the bootstrap
RATES = (0.01, 0.05)  # false-positive rates at which the share caught is given
THRESHOLDS = 1000  # false-positive rates, evenly spaced, whose thresholds a repair record keeps
SHEET, SHEET_ROWS = 10, 6  # flagged images in a row of the contact sheet, and its rows
BINS = 40

# What each figure is called in the table.
CLEAN = {
    "clean_accuracy_badnet": "clean accuracy of B",
    "clean_accuracy_repaired": "clean accuracy of G",
    "clean_accuracy_together": "clean accuracy of the two together",
    "false_positive_rate": "false-positive rate (clean flagged)",
}
POISONED = {
    "attack_success_rate_badnet": "attack success rate on B",
    "attack_success_rate_repaired": "attack success rate on G",
    "true_positive_rate": "true-positive rate (poisoned caught)",
    "true_positive_rate_of_successes": "… of those that the attack works on",
    "true_positive_rate_at_0.01": "… where 1 % of clean are flagged",
    "true_positive_rate_at_0.05": "… where 5 % of clean are flagged",
    "robust_accuracy": "robust accuracy of G",
    "auroc": "AUROC of the score",
    "defense_effectiveness_rating": "defense effectiveness rating",
}


@dataclasses.dataclass
class Answers:
    """What B and G answer to the images of one data set.

    badnet, repaired: int (n,), the classes, 0..N-1; -1 where a net gave NaN.
    score: float32 (n,), from 0 up, how suspect each image is, as nets.suspicion gives it.
    flagged: bool (n,), whether it counts as poisoned.
    """

    badnet: np.ndarray
    repaired: np.ndarray
    score: np.ndarray
    flagged: np.ndarray


def clean_figures(answers, labels):
    """The figures of CLEAN on clean images. labels: int (n,), 0..N-1."""
    kept = ~answers.flagged
    return {
        "clean_accuracy_badnet": share(answers.badnet == labels),
        "clean_accuracy_repaired": share(answers.repaired == labels),
        "clean_accuracy_together": share(kept & (answers.badnet == labels)),
        "false_positive_rate": share(answers.flagged),
    }


def poisoned_figures(answers, targets, true_labels, clean_scores, clean):
    """The figures of POISONED on poisoned images.

    targets: int (n,), the attacker's classes.  true_labels: int (n,), or None where unknown: then
    there is no robust accuracy.  clean_scores: float64 (m,), the scores of the clean images.
    clean: what clean_figures returned for these.
    """
    works = answers.badnet == targets
    figures = {
        "attack_success_rate_badnet": share(works),
        "attack_success_rate_repaired": share(answers.repaired == targets),
        "true_positive_rate": share(answers.flagged),
        "true_positive_rate_of_successes": share(answers.flagged[works]),
    }
    for rate in RATES:
        caught = answers.score > threshold(clean_scores, rate)
        figures[f"true_positive_rate_at_{rate}"] = share(caught)
    if true_labels is not None:
        figures["robust_accuracy"] = share(answers.repaired == true_labels)
    figures["auroc"] = auroc(clean_scores, answers.score)
    figures["defense_effectiveness_rating"] = defense_effectiveness(clean | figures)
    return figures


def share(hits):
    """The share of True in bool (n,), with its Wilson interval.

    Returns {"value", "low", "high", "hits", "of"}; the first three, 0..1, are None where n is 0.
    Source: E. B. Wilson, Probable Inference, JASA 1927.
    """
    from scipy import stats

    of, hits = len(hits), int(np.sum(hits))
    if not of:
        return {"value": None, "low": None, "high": None, "hits": 0, "of": 0}
    low, high = stats.binomtest(hits, of).proportion_ci(CONFIDENCE, method="wilson")
    return {"value": hits / of, "low": float(low), "high": float(high), "hits": hits, "of": of}


def auroc(clean, poisoned):
    """The chance that a poisoned image scores higher than a clean one, ties counting half.

    clean, poisoned: float (m,), (n,), scores.  Returns {"value", "low", "high"}, 0..1; the interval
    is that of a percentile bootstrap, seeded.
    Source: J. A. Hanley, B. J. McNeil, Radiology 1982: the Mann-Whitney statistic over m × n.
    """
    from scipy import stats

    def area(poisoned, clean, axis=-1):
        u = stats.mannwhitneyu(poisoned, clean, axis=axis, method="asymptotic").statistic
        return u / (poisoned.shape[axis] * clean.shape[axis])

    value = float(area(poisoned, clean))
    if min(len(poisoned), len(clean)) < 2:
        return {"value": value, "low": None, "high": None}
    resampled = stats.bootstrap(
        (poisoned, clean),
        area,
        n_resamples=RESAMPLES,
        batch=max(1, 2**20 // (len(poisoned) + len(clean))),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=0,
    )
    low, high = map(float, resampled.confidence_interval)
    return {"value": value, "low": low, "high": high}


def threshold(scores, rate):
    """The lowest of the scores that at most this share of them lies above.

    scores: float (n,).  rate: 0..1, or an array of rates.  Returns as many floats.
    """
    above = np.floor(np.multiply(rate, len(scores)) + 1e-9)  # 0.07 × 100 is 7.000000000000001
    return np.sort(scores)[::-1][np.minimum(np.int64(above), len(scores) - 1)]


def thresholds(scores):
    """The thresholds for false-positive rates 0, 1/THRESHOLDS, …, 1: a list for a repair record."""
    return threshold(scores, np.arange(THRESHOLDS + 1) / THRESHOLDS).tolist()


def defense_effectiveness(figures):
    """The defense effectiveness rating, 0..1: how far attack success fell, less what it cost.

    Source: M. Zhu, S. Wei, L. Shen, Y. Fan, B. Wu, Enhancing Fine-Tuning Based Backdoor Defense
    with Sharpness-Aware Minimization, ICCV 2023.
    """

    def fall(name):
        values = [figures[f"{name}_{net}"]["value"] for net in ("badnet", "repaired")]
        return max(0, values[0] - values[1])

    return {"value": (fall("attack_success_rate") - fall("clean_accuracy") + 1) / 2}


# ------------------------------------------------------------------------------------------- shown


def percent(share):
    return f"{100 * share:.2f} %"


def table(results):
    """Results of data sets, as in eval_defence.py's JSON, as the text of one table."""
    lines = [f"{'':<40}{'':>12}   95 % interval"]
    for of_data in (results["clean"], *results["poisoned"]):
        rate = of_data["images"] / of_data["seconds"]
        lines.append(
            f"{printable(of_data['file'])}: {of_data['images']} images, {rate:.0f} a second"
        )
        for name, label in (CLEAN | POISONED).items():
            if name in of_data["figures"]:
                lines.append(f"  {label:<38}{cells(of_data['figures'][name])}")
    return "\n".join(lines)


def cells(figure):
    """A figure and its interval, as the columns of a table."""
    if figure["value"] is None:
        return f"{'none':>12}"
    show = "{:.4f}".format if "hits" not in figure else percent  # an area is no share
    value, low, high = (figure.get(key) for key in ("value", "low", "high"))
    return f"{show(value):>12}" + ("" if low is None else f"   {show(low)} .. {show(high)}")


STEPS = ("before", "pruned", "retrained", "fine_tuned", "hardened")


def summary(record):
    """The closing table of a repair, as text."""
    accuracy, rates = record["accuracy"], record["attack_success_rate"]
    steps = [step for step in STEPS if step in accuracy]
    rows = [("", *(step.replace("_", "-") for step in steps))]
    rows.append(("validation accuracy", *(percent(accuracy[step]) for step in steps)))
    for name in rates["before"]:
        rows.append((f"attack success, {name}", *(percent(rates[step][name]) for step in steps)))
    width = max(len(row[0]) for row in rows)
    table = [row[0].ljust(width) + "".join(cell.rjust(12) for cell in row[1:]) for row in rows]
    seconds = record["seconds"].items()
    steps = ", ".join(f"{step.replace('_', '-')} {s:.1f}" for step, s in seconds if s >= 0.05)
    return "\n".join(
        [
            f"pruned {len(record['pruned'])} of {record['channels']} channels of "
            f"{record['layer']}; pixels {record['input_scale']}",
            *table,
            f"seconds: {steps}",
            *known(record),
        ]
    )


def known(record):
    """What clean data alone tell of a repair, and what they do not: lines of text."""
    accuracy, pruned = record["accuracy"], record["pruned"]
    silent = sum(record["mean_activation"][channel] == 0 for channel in pruned)
    moved, held_out = record["moved"], record.get("holdout")
    yield (
        f"worth of the pruned channels: {percent(accuracy['before'] - accuracy['pruned'])} of "
        f"validation accuracy; {silent} of {len(pruned)} fired on no image"
    )
    yield (
        f"G answers {percent(moved['answers'])} of the validation images otherwise than B; its "
        f"weights moved by {percent(moved['weights'])}"
    )
    if held_out:
        yield f"on {held_out['images']} held-out images:{'95 % interval':>46}"
        for name, label in CLEAN.items():
            yield f"  {label:<38}{cells(held_out[name])}"
    else:
        yield "No image was held out (--holdout 0.1): accuracies after training are flattered."
    where = "in channels that clean images use, it survives unseen"
    if "hardened" in accuracy:
        where = "a trigger that is like no patch may survive unseen"
    yield f"This does not prove that the backdoor is gone: {where}."


# ------------------------------------------------------------------------------------------- plots


def require_plot_format(path):
    """Raises InputError where matplotlib is missing or has no such format: before, not after."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from error
    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lstrip(".") not in formats:
        raise InputError(f"{path}: a plot's name ends in one of .{', .'.join(sorted(formats))}")


def save(figure, path):
    with utils.replacing(path) as beside:
        figure.savefig(beside, dpi=150)


def plot_pruning(record, path):
    """Draw the pruning curve of a repair record into a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=f"channels of {record['layer']} pruned", ylabel="%")
    accuracy, success = record["accuracy"], record["attack_success_rate"]
    curves = {"validation accuracy": [accuracy["before"], *accuracy["after_each_channel"]]}
    for name, rates in success["after_each_channel"].items():
        curves[f"attack success, {name}"] = [success["before"][name], *rates]
    for label, shares in curves.items():
        axes.plot(np.multiply(shares, 100), marker=".", label=label)
    enough = 100 * record["settings"]["threshold"] * accuracy["before"]
    axes.axhline(enough, color="grey", linestyle="--", label=f"threshold {enough:.2f} %")
    count = len(record["pruned"])
    axes.axvline(count, color="black", linestyle=":", label=f"stopped at {count} channels")
    axes.set_ylim(-2, 102)
    axes.legend(loc="best", fontsize="small")
    save(figure, path)


def plot_judging(results, scores, flagged, path):
    """Draw ROC curves, histograms of the scores and a contact sheet of flagged images into a file.

    results: as in eval_defence.py's JSON.  scores: float (n,), for each data set, the clean first.
    flagged: for each data set, up to SHEET flagged images float32 (k, height, width, channels),
    0..255, and their classes by B and by G, int (k,).
    """
    from matplotlib.figure import Figure

    names = [Path(each["file"]).stem for each in (results["clean"], *results["poisoned"])]
    rows = [(name, *each) for name, each in zip(names, flagged) if len(each[0])][:SHEET_ROWS]
    figure = Figure(figsize=(11, 4.5 + 1.7 * len(rows)), layout="constrained")
    heights = [4.5, *[1.7] * len(rows)]
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    graphs = grid[0].subgridspec(1, 2)
    if results["poisoned"]:
        plot_roc(figure.add_subplot(graphs[0]), results, scores, names)
    beside = graphs[1] if results["poisoned"] else graphs[:]
    plot_scores(figure.add_subplot(beside), results["threshold"], scores, names)
    for place, row in enumerate(rows, start=1):
        plot_flagged(figure, grid[place], *row)
    save(figure, path)


def plot_roc(axes, results, scores, names):
    """ROC curves, a dot where the verdict stands; false positives on a logarithmic axis."""
    from scipy import stats

    clean, *poisoned = [stats.ecdf(each).sf for each in scores]
    stand = results["clean"]["figures"]["false_positive_rate"]["value"]
    least = 0.5 / len(scores[0])
    for number, result in enumerate(results["poisoned"], start=1):
        name, curve, colour = names[number], poisoned[number - 1], f"C{number}"  # as plot_scores
        at = np.concatenate([[-np.inf], np.union1d(clean.quantiles, curve.quantiles)])
        area = result["figures"]["auroc"]["value"]
        rates = np.maximum(clean.evaluate(at), least)
        axes.plot(rates, curve.evaluate(at), colour, label=f"{name}: AUROC {area:.3f}")
        caught = result["figures"]["true_positive_rate"]["value"]
        axes.plot(max(stand, least), caught, "o", color=colour)
    axes.set(xscale="log", xlim=(least, 1.1), ylim=(-0.02, 1.02))
    axes.set(xlabel="false-positive rate (clean flagged)", ylabel="true-positive rate (caught)")
    axes.set_title("ROC curve of the score; dot: the verdict", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")


def plot_scores(axes, limit, scores, names):
    """Histograms of the scores; the share of images on a logarithmic axis."""
    edges = np.linspace(0, max(1, *map(np.max, scores)), BINS + 1)
    for number, (name, each) in enumerate(zip(names, scores)):
        shares = np.histogram(each, edges)[0] / len(each)
        look = {"color": f"C{number}", "fill": number == 0, "alpha": 0.7}
        axes.stairs(100 * shares, edges, label=name, **look)
    if limit is not None:
        axes.axvline(limit, color="black", linestyle=":", label=f"threshold {limit:.4f}")
    axes.set(yscale="log", xlabel="score: how far apart B and G answer", ylabel="% of images")
    axes.set_title("Scores", fontsize="medium")
    axes.legend(loc="best", fontsize="small")


def plot_flagged(figure, place, name, images, badnet, repaired):
    """A row of the contact sheet: flagged images, above each B's class and G's, from 1."""
    columns = place.subgridspec(1, SHEET)
    for column, (image, b, g) in enumerate(zip(images, badnet, repaired)):
        axes = figure.add_subplot(columns[column], xticks=[], yticks=[])
        pixels = image if image.shape[-1] == 3 else image[..., 0]
        axes.imshow(pixels / 255, cmap="gray", vmin=0, vmax=1)
        shown = [str(c + 1) if c >= 0 else "NaN" for c in (b, g)]
        axes.set_title(" → ".join(shown), fontsize="small")
        if column == 0:
            axes.set_ylabel(f"flagged of\n{name[:28]}", fontsize="x-small")
