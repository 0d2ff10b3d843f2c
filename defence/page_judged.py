"""The page of eval_defence.py --report: what was flagged, which class is behind it, the trigger."""

import numpy as np

from defence import flagged, page, plots, tables, where
from defence.cli import percent

NETS = {"badnet": "BadNet", "repaired": "repaired net"}
FEW = 50  # images, of which the number of flagged ones tells little
SOME = 12  # flagged images that no class stands for, shown
UNREAD = 50  # pictures that could not be read, named


def write(path, found, parts, called, unread=(), unread_count=None, results=None):
    """Write the page.

    found: the Detector.  parts: [where.Looked, …].  called: names of the classes, or None.
    unread: [(path, why), …], the first of unread_count, or all.
    results: of datasets, as in eval_defence.py's JSON; or None.
    """
    bad, count = (
        sum(int(np.size(of(part.stream.answers))) for part in parts)
        for of in (lambda answers: np.flatnonzero(answers.flagged), lambda answers: answers.score)
    )
    of_files = [results["clean"], *results["poisoned"]] if results else [None] * len(parts)
    nets = {f"{NETS[net]}, SHA-256": digest for net, digest in found.sha256.items()}
    page.write(
        path,
        "judged.html",
        title=f"{bad:,} of {count:,} {'image' if count == 1 else 'images'} flagged",
        parts=[tell(part, found, called, file) for part, file in zip(parts, of_files)],
        charts=[page.chart(*each) for each in plots.judged(parts, found.threshold, results)],
        rule=found.rule,
        unread=unread[:UNREAD],
        unread_count=len(unread) if unread_count is None else unread_count,
        provenance=page.provenance(detector=str(found.path), **nets),
    )


def tell(part, found, called, file):
    """What the page tells of a where.Looked, as a dict.  file: its figures, or None."""
    answers, looked = part.stream.answers, [each.target - 1 for each in part.standing]
    rest = where.highest(answers, ~np.isin(answers.badnet, looked), len(answers.score))
    tone, lines = verdict(part, found, called)
    some = rest[:SOME]
    return {
        "name": part.stream.path and str(part.stream.path),
        "count": len(answers.score),
        "tone": tone,
        "lines": lines,
        "targets": [
            tell_target(part.stream, *each, called) for each in zip(part.standing, part.seen)
        ],
        "unseen": len(part.standing) - len(part.seen),
        "rest": [
            shown(part.stream, row, pixels, called, part.alone.get(row))
            for row, pixels in zip(some, where.fetch(part.stream, some))
        ],
        "rest_count": len(rest),
        "figures": file and list(table(file["figures"])),
    }


def verdict(part, found, called):
    """What is to be said first: ("alarm", "open" or "calm", [line, …])."""
    answers = part.stream.answers
    count, bad = len(answers.score), int(answers.flagged.sum())
    most = None
    says = f"{bad:,} of {count:,} {'image' if count == 1 else 'images'} flagged"
    if found.held_out is None:
        says += "; how many clean ones would be is not known (repair.py --holdout 0.1, --fpr)."
    else:
        usual, least, most = flagged.expected(found.held_out, found.threshold, count)
        says += f"; of clean ones {usual:,.0f} are to be expected, {least:,} to {most:,}."
    if part.standing:
        these = " and ".join(f"class {each.target}" for each in part.standing[: where.CLASSES])
        sure = "are" if any(seen.is_trigger for seen in part.seen) else "are probably"
        first = f"Some of these images {sure} poisoned: the target is {these}."
        words = [flagged.in_words(each, named(each.target, called)) for each in part.standing]
        return "alarm", [first, says, *words]
    no_proof = "That does not prove that none is poisoned."
    if bad == 0:
        return "calm", ["Nothing is flagged: no sign of poisoned images.", says, no_proof]
    if most is None or count < FEW:
        either = "Whether these are poisoned, or clean and flagged by mistake, cannot be told."
        return "open", ["Images are flagged, and no class stands out among them.", says, either]
    if bad > most:
        first = "More images are flagged than clean ones would be, but no class stands out."
        return "alarm", [
            first,
            says,
            "They are poisoned with many targets, or unlike the clean data.",
        ]
    first = "No more images are flagged than clean ones would be, and no class stands out."
    return "calm", [first, says, no_proof]


def named(number, called):
    """The name of a class, or None. number: from 1.  called: the names, or None."""
    return called and called[number - 1]


def tell_target(stream, standing, seen, called):
    """What the page tells of a class that stands out, as a dict."""
    region = seen.region
    return {
        "number": standing.target,
        "name": named(standing.target, called),
        "region": region.any(),
        "whole": seen.whole,
        "fraction": percent(region.mean()),
        "trials": [
            (what, trial)
            for what, trial in (("pasted", seen.pasted), ("covered", seen.covered))
            if trial
        ],
        "is_trigger": seen.is_trigger,
        "usual": None if seen.usual is None else page.picture(seen.usual),
        "mean": None if seen.mean is None else page.picture(seen.mean),
        "cut_out": page.lit(seen.cut_out, np.float32(region)) if region.any() else None,
        "more": page.picture(127.5 + seen.mean - seen.usual) if region.any() else None,
        "images": [
            shown(stream, row, pixels, called, places)
            for row, pixels, places in zip(seen.rows, seen.flagged, seen.places)
        ],
        "looked_at": len(seen.rows),
    }


def shown(stream, row, pixels, called, places=None):
    """What the page shows of an image, as a dict.

    row: of the Stream.  places: float32 (height, width), where its answer comes from, or None.
    """

    def net(answer):
        if answer < 0:
            return "NaN"
        name = named(answer + 1, called)
        return f"{answer + 1} ({name})" if name else str(answer + 1)

    answers = stream.answers
    return {
        "name": stream.named(int(row)),
        "picture": page.picture(pixels),
        "badnet": net(int(answers.badnet[row])),
        "repaired": net(int(answers.repaired[row])),
        "score": f"{answers.score[row]:.3g}",
        "lit": None if places is None else page.lit(pixels, places),
    }


def table(found):
    """Yield (what, value, from, to) of each of the figures, as text."""
    for name, label in (tables.CLEAN | tables.POISONED).items():
        if name in found:
            value, _, interval = tables.cells(found[name]).strip().partition("   ")
            yield label, value, interval
