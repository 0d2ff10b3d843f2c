"""The page of eval_defence.py --report: what was flagged, which class is behind it, the trigger."""

import numpy as np

from defence.base.text import format_percent
from defence.explain import flagged, page, plots, streams, tables
from defence.load.class_names import name_class

NETS = {"badnet": "BadNet", "repaired": "repaired net"}
FEW = 50  # images, of which the number of flagged ones tells little
SOME = 12  # flagged images that no class stands for, shown


def write_judged_page(path, found, parts, class_names, unread=(), unread_count=0, results=None):
    """Write the page.

    found: the Detector.  parts: [where.Looked, …].  called: names of the classes, or None.
    unread: [why a picture could not be read, …], the first of so many.
    results: of datasets, as in eval_defence.py's JSON; or None.
    """
    bad = np.concatenate([part.stream.answers.flagged for part in parts])
    of_files = [results["clean"], *results["poisoned"]] if results else [None] * len(parts)
    nets = {f"{NETS[net]}, SHA-256": digest for net, digest in found.sha256.items()}
    page.write_page(
        path,
        "judged.html",
        title=describe_flagged(bad),
        parts=[
            describe_stream(part, found, class_names, file) for part, file in zip(parts, of_files)
        ],
        charts=[
            page.make_chart(*each)
            for each in plots.draw_judged_charts(parts, found.threshold, results)
        ],
        rule=found.rule,
        unread=unread,
        unread_count=unread_count,
        provenance=page.describe_provenance(detector=str(found.path), **nets),
    )


def describe_flagged(flagged):
    """How many images are flagged, as text. flagged: bool (n,)."""
    images = "image" if len(flagged) == 1 else "images"
    return f"{flagged.sum():,} of {len(flagged):,} {images} flagged"


def describe_stream(part, found, class_names, file):
    """What the page tells of a where.Looked, as a dict.  file: its figures, or None."""
    stream, seen = part.stream, [each.target - 1 for each in part.candidates[: len(part.evidence)]]
    rest = streams.select_highest(stream.answers, ~np.isin(stream.answers.badnet, seen), None)
    tone, lines = describe_verdict(part, found, class_names)
    return {
        "name": stream.path and str(stream.path),
        "count": len(stream.answers.score),
        "tone": tone,
        "lines": lines,
        "targets": [
            describe_target(stream, *each, class_names)
            for each in zip(part.candidates, part.evidence)
        ],
        "rest": [
            describe_image(stream, row, pixels, class_names, part.attributions.get(row))
            for row, pixels in zip(*streams.fetch_images(stream, rest[:SOME]))
        ],
        "rest_count": len(rest),
        "figures": file and list(list_figures(file["figures"])),
    }


def describe_verdict(part, found, class_names):
    """What is to be said first: ("alarm", "open" or "calm", [line, …])."""
    bad = part.stream.answers.flagged
    if not len(bad):
        return "open", ["No image could be judged."]
    usual, says = None, describe_flagged(bad)
    if found.held_out is None:
        says += "; how many clean ones would be is not known (repair.py --holdout 0.1, --fpr)."
    else:
        usual, least, most = flagged.predict_flagged(found.held_out, found.threshold, len(bad))
        says += f"; of clean ones {usual:,.0f} are to be expected, {least:,} to {most:,}."
    if part.candidates:
        numbers = [str(each.target) for each in part.candidates]
        targets = "targets are classes" if len(numbers) > 1 else "target is class"
        first = f"Some of these images are probably poisoned: the {targets} {', '.join(numbers)}."
        words = [
            flagged.describe_candidate(each, find_name(each.target, class_names))
            for each in part.candidates
        ]
        return "alarm", [first, says, *words]
    no_proof = "That does not prove that none is poisoned."
    if not bad.any():
        return "calm", ["Nothing is flagged: no sign of poisoned images.", says, no_proof]
    if usual is None or len(bad) < FEW:
        either = "Whether these are poisoned, or clean and flagged by mistake, cannot be told."
        return "open", ["Images are flagged, and no class stands out among them.", says, either]
    if bad.sum() > most:
        first = "More images are flagged than clean ones would be, but no class stands out."
        why = "They may be poisoned with many targets, or unlike the clean data; of clean streams"
        return "alarm", [first, says, f"{why} one in forty has as many."]
    first = "No more images are flagged than clean ones would be, and no class stands out."
    return "calm", [first, says, no_proof]


def find_name(number, class_names):
    """The name of a class, or None. number: from 1.  called: the names, or None."""
    return class_names and name_class(number, class_names)


def describe_target(stream, standing, seen, class_names):
    """What the page tells of a class that stands out, as a dict."""
    region = seen.region
    return {
        "number": standing.target,
        "name": find_name(standing.target, class_names),
        "region": region.any(),
        "whole": seen.whole,
        "fraction": format_percent(region.mean()),
        "trials": [
            (what, trial)
            for what, trial in (("pasted", seen.pasted), ("covered", seen.covered))
            if trial
        ],
        "is_trigger": seen.is_trigger,
        "usual": None if seen.usual is None else page.make_image(seen.usual),
        "mean": None if seen.mean is None else page.make_image(seen.mean),
        "cut_out": page.make_lit_image(seen.cut_out, np.float32(region)) if region.any() else None,
        "more": page.make_image(127.5 + seen.mean - seen.usual) if region.any() else None,
        "images": [
            describe_image(stream, row, pixels, class_names, places)
            for row, pixels, places in zip(seen.rows, seen.flagged, seen.places)
        ],
        "looked_at": len(seen.rows),
    }


def describe_image(stream, row, pixels, class_names, places=None):
    """What the page shows of an image, as a dict.

    row: of the Stream.  places: float32 (height, width), where its answer comes from, or None.
    """

    def net(answer):
        if answer < 0:
            return "NaN"
        name = find_name(answer + 1, class_names)
        return f"{answer + 1} ({name})" if name else str(answer + 1)

    answers = stream.answers
    return {
        "name": stream.name(int(row)),
        "picture": page.make_image(pixels),
        "badnet": net(int(answers.badnet[row])),
        "repaired": net(int(answers.repaired[row])),
        "score": f"{answers.score[row]:.3g}",
        "lit": None if places is None else page.make_lit_image(pixels, places),
    }


def list_figures(found):
    """Yield (what, value, interval) of each of the figures, as text.

    found: {name: figure}, as figures.py gives them.
    """
    for name, label in (tables.CLEAN | tables.POISONED).items():
        if name in found:
            value, _, interval = tables.format_cells(found[name]).strip().partition("   ")
            yield label, value, interval
