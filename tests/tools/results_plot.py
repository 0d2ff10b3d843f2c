"""The figure of results.py: the attack success rates of all triggers."""

import numpy as np
from PIL import Image
from results_tables import name_attack

from defence.base import files

# Columns of the figure: name, marker and colour (Okabe and Ito's palette).
MARKERS = {
    "attack_success_rate_badnet": ("the BadNet B", "o", "#000000"),
    "report_attack_success_rate_repaired": ("G after the report's steps", "s", "#D55E00"),
    "hardened_attack_success_rate_repaired": ("G hardened", "^", "#0072B2"),
}
FONT = 12


def draw(rows, path):
    """Draw the attack success rates of all triggers into a file, a panel for each size.

    rows: {size: rows of results.csv}.
    """
    from matplotlib.figure import Figure

    attacks = [[row for row in rows[size] if row["trigger"]] for size in rows]
    attacks = sorted(filter(None, attacks), key=len)
    heights = [len(size_rows) + 1 for size_rows in attacks]
    figure = Figure(figsize=(10, 1.5 + 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, size_rows in zip(panels, attacks):
        draw_panel(axes, size_rows)
        title = f"the {size_rows[0]['size']}'s size, {size_rows[0]['people']:,} people"
        axes.set_title(title, fontsize=FONT)
    panels[-1].set_xlabel("attack success rate, % (lines: 95 % intervals)", fontsize=FONT)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=FONT)
    with files.replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
        # In 64 colours it looks the same and takes a third of the space.
        Image.open(temporary).convert("RGB").quantize(64).save(temporary, optimize=True)


def draw_panel(axes, rows):
    """Draw a line for each row of results.csv, with its markers one below another in it."""
    for number, (column, (name, marker, colour)) in enumerate(MARKERS.items()):
        ends = [[100 * row[column + ending] for row in rows] for ending in ("", "_low", "_high")]
        value, low, high = map(np.array, ends)
        style = {"fmt": marker, "color": colour, "markersize": 7, "elinewidth": 2}
        height = np.arange(len(rows)) + 0.24 * (number - 1)
        axes.errorbar(value, height, xerr=(value - low, high - value), label=name, **style)
    nets = [row["net"] for row in rows]
    for first in sorted({nets.index(net) for net in nets}):
        offset = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate(nets[first], (0, first), (-340, 0), fontsize=FONT, va="center", **offset)
        axes.axhline(first - 0.5, color="0.6", linewidth=1)
    axes.set_yticks(range(len(rows)), [name_attack(row) for row in rows])
    axes.set(xlim=(-2, 102), ylim=(len(rows) - 0.5, -0.5))
    axes.tick_params(labelsize=FONT)
    axes.grid(axis="x", alpha=0.4)
