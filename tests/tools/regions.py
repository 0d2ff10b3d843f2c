"""How well the place of a trigger is found on flagged images, of which nobody knows the truth.

    python tests/tools/regions.py                       the zoo of the demo's size
    python tests/tools/regions.py NAME …                some of its nets, on stdout alone

For each net and trigger of a zoo, whose nets and NAME_hardened.h5 `make results` leaves in
models/zoo-SIZE, the clean test images and a tenth as many poisoned ones are judged together, by the
threshold of results.py, and looked at as eval_defence.py --report does; and, of a net with several
targets, those of all triggers at once, a tenth in all. Writes
tests/results/regions-SIZE.md. A net that is not there is left out.

A place belongs to the trigger where the poisoned image and the clean one of the same face are more
than TOLD grey levels apart. IoU is the intersection over the union of that and of what was found.
"""

import argparse
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data"), str(ROOT / "tests" / "tools")]

import badnet
import faces
import h5py
import numpy as np
from results import RATES, RESULTS, SIZES

from defence.base import files
from defence.base.arguments import Parser
from defence.base.process import run_command
from defence.base.progress import say
from defence.explain import flagged, streams, trigger
from defence.judge import backends

TOLD = 8  # grey levels
ALARMS, FLAGGED = 0.2, 4  # --fpr at which clean images are flagged; classes that are looked at
SHARE = 0.1  # of poisoned images, per clean one
LEVELS = np.linspace(0, 0.95, 39)  # of the images, whose trigger is at a place
IN_PLACES = 0.4  # of the most, what of one image's map counts as the place of the trigger
HEAD = """# Where the trigger is, and whether what is found is one

`{command}`

Of the clean test images alone (trigger: none), and with a tenth as many poisoned ones, judged by
the hardened net with `--fpr {rate}`: whether the target is found, since it stands out among the
flagged images or, "by the test", since what its images have in common works as a trigger; how
well the region that they share, and the places on a single one, cover the trigger, as the
intersection over the union with the true place, in the mean over the poisoned images that were
looked at; and how many of the images on which the cut-out was pasted get the target from the BadNet
and from the repaired net. Best region: what one region for all images can reach that is drawn where
most true places are. [regions.py](../tools/regions.py) says more.

"""
COLUMNS = (
    *("net", "trigger → class", "found", "region: IoU", "one image: IoU"),
    *("pasted: BadNet", "pasted: repaired", "works as a trigger?"),
)


def read(path):
    """The images of a dataset, float32 (n, height, width, channels), and their true labels."""
    with h5py.File(path) as file:
        images = np.moveaxis(file["data"][:], 1, 3).astype(np.float32)
        return images, file["original_label" if "original_label" in file else "label"][:].astype(
            int
        )


def mixed(clean, labels, poisoned, persons, rng):
    """A stream of clean and poisoned images: (images, the trigger's place on each), in that order.

    labels, persons: true labels; the clean and the poisoned image of a face come in one order.
    """
    place = np.arange(len(poisoned)) - np.searchsorted(persons, persons)
    same = clean[np.searchsorted(labels, persons) + place]
    chosen = np.sort(rng.choice(len(poisoned), round(SHARE * len(clean)), replace=False))
    changed = abs(poisoned - same).max(axis=3) > TOLD
    nowhere = np.zeros(clean.shape[:3], bool)
    return np.concatenate([clean, poisoned[chosen]]), np.concatenate([nowhere, changed[chosen]])


def judged(found, images):
    """The Stream of images, judged by a Detector."""
    answers = trigger.judge_in_batches(found.judge, found.shape)(images)
    return streams.Stream(None, found.shape, found.classes, answers, images.__getitem__, str)


def look(found, images):
    """What eval_defence.py sees in a stream, a where.Looked, as {class, 0..N-1: (how, Seen)}.

    how: "yes" where it stands out, else "by the test".  Seen: None of all but the first.
    """
    stream = judged(found, images)
    answers = stream.answers
    unusual = flagged.find_candidates(answers.badnet, answers.flagged, found.classes)
    looked = trigger.find_targets(stream, unusual, found.judge)
    return {
        each.target - 1: ("yes" if each.stands_out else "by the test", seen)
        for each, seen in itertools.zip_longest(looked.candidates, looked.evidence)
    }


def overlap(region, place):
    """The intersection over the union of two regions, or None where there is nothing."""
    union = np.sum(region | place)
    return np.sum(region & place) / union if union else None


def which(seen, targets):
    """Which classes were found, as text. seen: as `look` gives it.  targets: the right ones."""
    right = [seen[each][0] if each in seen else "no" for each in targets]
    wrong = [f"class {each}: {seen[each][0]}" for each in seen if each not in targets]
    return ", ".join(right + wrong) or "none"


def cells(found, target, places):
    """The cells of a row, behind net and trigger.

    found: as `look` gives it.  places: of the trigger on each image.
    """
    stands, (_, seen) = which(found, [target]), found.get(target, ("", None))
    if seen is None:
        return [stands, *["–"] * 5]
    worn = [row for row in seen.rows if places[row].any()]
    of_region = [overlap(seen.region, places[row]) for row in worn]
    of_one = [
        overlap(found > IN_PLACES, places[row])
        for found, row in zip(seen.places, seen.rows)
        if places[row].any()
    ]
    shares = [f"{np.mean(each):.2f}" if each else "–" for each in (of_region, of_one)]
    if seen.pasted is None:
        return [stands, "no region", shares[1], "–", "–", "not shown"]
    hits = [f"{seen.pasted[net]} of {seen.pasted['images']}" for net in ("badnet", "repaired")]
    return [stands, *shares, *hits, "yes" if seen.is_trigger else "not shown"]


def row(*cells):
    """A line of the table; the cells that are not given are empty."""
    return f"| {' | '.join([*cells, *['–'] * (len(COLUMNS) - len(cells))])} |"


def best(places):
    """The IoU, in the mean, of the one region that suits true places best: where most of them are.

    places: bool (n, height, width).
    """
    often = places.mean(axis=0)
    return max(np.mean([overlap(often > most, each) for each in places]) for most in LEVELS)


def means(measured):
    """Yield the lines of a table of the means over nets. measured: {trigger: [IoUs, …]}."""
    heads = ("trigger, in the mean over nets", "nets", "region: IoU", "one image: IoU")
    yield f"| {' | '.join((*heads, 'best region: IoU'))} |"
    yield "|---|--:|--:|--:|--:|"
    for name, ious in measured.items():
        shares = " | ".join(f"{mean:.2f}" for mean in np.mean(ious, axis=0))
        yield f"| {name} | {len(ious)} | {shares} |"


def passing(found, clean, targets):
    """Yield, of classes flagged among clean images, (whether it is a target, whether it passes).

    The FLAGGED with the most of these images, where there are enough to be looked at.
    """
    stream = judged(found, clean)
    answers = stream.answers
    counts = np.bincount(answers.badnet[answers.flagged], minlength=found.classes)
    for each in np.argsort(-counts, kind="stable")[:FLAGGED]:
        if counts[each] >= trigger.FEWEST:
            yield (
                int(each) in targets,
                trigger.locate_trigger(stream, int(each), found.judge).is_trigger,
            )


def rows(names, size, nets_folder, data_folder):
    """Yield the lines of the table, and one about clean images alone.

    size: of the zoo, whose threshold is taken.
    """
    passed, measured = {True: [], False: []}, {}
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|---|---|---|{'--:|' * 4}---|"
    for name in names:
        path = badnet.net_path(name, nets_folder)
        repaired = path.with_name(f"{path.stem}_hardened.h5")
        if not repaired.exists():
            say(f"{repaired}: is not there; left out")
            continue
        found = backends.load_detector([path, repaired], fpr=RATES[size])
        clean, labels = read(data_folder / "clean_test_data.h5")
        yield row(name, "none", which(look(found, clean), []))
        targets, worn = sorted({to for _, to in badnet.ZOO[name].triggers}), []
        every = list(range(found.classes)) if targets == [faces.NEXT] else targets
        for kind, to in badnet.ZOO[name].triggers:
            poisoned, persons = read(badnet.poisoned_path(kind, to, data_folder))
            rng = np.random.default_rng(0)
            images, places = mixed(clean, labels, poisoned, persons, rng)
            told = cells(look(found, images), to, places)
            if told[1][:1].isdigit():
                ious = *map(float, told[1:3]), best(places[places.any(axis=(1, 2))])
                measured.setdefault(kind, []).append(ious)
            yield row(name, f"{kind} → {to}", *told)
            worn.append(images[len(clean) :])
        if len(targets) > 1:
            parts = [images[i :: len(worn)] for i, images in enumerate(worn)]
            told = which(look(found, np.concatenate([clean, *parts])), targets)
            yield row(name, f"all → {', '.join(map(str, targets))}", told)
        many = backends.load_detector([path, repaired], fpr=ALARMS)
        for is_target, passes in passing(many, clean, every):
            passed[is_target].append(passes)
    yield ""
    yield from means(measured)
    yield ""
    told = [f"{sum(each)} of {len(each)}" for each in (passed[False], passed[True])]
    yield (
        f"Among clean test images alone, with `--fpr {ALARMS}`, what the flagged images of a class "
        f"have in common works as a trigger for {told[0]} classes that are no target, and for "
        f"{told[1]} targets: of each net the {FLAGGED} with the most flagged images were looked at."
    )


def main():
    parser = Parser(
        prog="regions.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="of nets (default: all)")
    parser.add_argument("--size", choices=SIZES, default="demo", help="of the zoo (default: demo)")
    parser.add_argument("--folder", type=Path, help="with NAMEs: of their nets and datasets")
    given = parser.parse_args()
    names = given.names or SIZES[given.size]
    called = f"python tests/tools/regions.py --size {given.size}"
    text = HEAD.format(command=called, rate=RATES[given.size])
    folders = [given.folder or ROOT / kind / f"zoo-{given.size}" for kind in ("models", "data")]
    for line in rows(names, given.size, *folders):
        print(line, flush=True)
        text += line + "\n"
    if not given.names:
        with files.replace_file(RESULTS / f"regions-{given.size}.md") as beside:
            beside.write_text(text)


if __name__ == "__main__":
    sys.exit(run_command(main))
