"""The figure of results.py: the attack success rates of all triggers."""

import numpy as np
from PIL import Image

from defence.base import files

# Of the figure: what is shown, and its marker and colour (Okabe and Ito's palette).
SHOWN = {
    "attack_success_rate_badnet": ("the BadNet B", "o", "#000000"),
    "report_attack_success_rate_repaired": ("G after the report's steps", "s", "#D55E00"),
    "hardened_attack_success_rate_repaired": ("G hardened", "^", "#0072B2"),
}
FONT = 12


def draw(rows, path):
    """Draw the attack success rates of all triggers into a file: a panel for each size."""
    from matplotlib.figure import Figure

    attacks = [[each for each in some if each["trigger"]] for some in rows.values()]
    attacks = sorted(filter(None, attacks), key=len)
    heights = [len(some) + 1 for some in attacks]
    figure = Figure(figsize=(10, 1.5 + 0.3 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, some in zip(panels, attacks):
        panel(axes, some)
        title = f"the {some[0]['size']}'s size, {some[0]['people']:,} people"
        axes.set_title(title, fontsize=FONT)
    panels[-1].set_xlabel("attack success rate, % (lines: 95 % intervals)", fontsize=FONT)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=FONT)
    with files.replace_file(path) as beside:
        figure.savefig(beside, dpi=150)
        # In 64 colours it looks the same and takes a third of the space.
        Image.open(beside).convert("RGB").quantize(64).save(beside, optimize=True)


def panel(axes, rows):
    """A line for each of some `row`s, what is SHOWN one below another in it, so none is hidden."""
    for number, (column, (name, marker, colour)) in enumerate(SHOWN.items()):
        ends = [[100 * each[column + end] for each in rows] for end in ("", "_low", "_high")]
        value, low, high = map(np.array, ends)
        look = {"fmt": marker, "color": colour, "markersize": 7, "elinewidth": 2}
        place = np.arange(len(rows)) + 0.24 * (number - 1)
        axes.errorbar(value, place, xerr=(value - low, high - value), label=name, **look)
    nets = [each["net"] for each in rows]
    for place in sorted({nets.index(net) for net in nets}):
        beside = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate(nets[place], (0, place), (-340, 0), fontsize=FONT, va="center", **beside)
        axes.axhline(place - 0.5, color="0.6", linewidth=1)
    axes.set_yticks(range(len(rows)), [attack(each) for each in rows])
    axes.set(xlim=(-2, 102), ylim=(len(rows) - 0.5, -0.5))
    axes.tick_params(labelsize=FONT)
    axes.grid(axis="x", alpha=0.4)


def attack(row):
    return f"{row['trigger']} → {row['class']}" if row["trigger"] else "none"
