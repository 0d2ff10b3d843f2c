"""Judge the zoo's images by our detector and by published ones, and write a table.

    python tests/tools/results.py                      train and repair the nets first
    python tests/tools/peers.py                        tests/results/peers-demo.md
    python tests/tools/peers.py --size competition     tests/results/peers-competition.md

Each detector uses the BadNet B and gets the same clean images as our repair: nine tenths of the
validation set to learn from, and the held-out tenth for the threshold, which a fraction of these
images exceed. peer_detectors.py says what the methods are.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data"), str(ROOT / "tests" / "tools")]

import badnet
import numpy as np
from peer_detectors import PEERS, compute_answers, make_pair
from records import RESULTS, name_class
from results import HARDEN, RATES, SIZES

import utils
from defence.base import files
from defence.base.arguments import Parser, at_least
from defence.base.process import run_command
from defence.base.progress import say
from defence.base.startup import make_reproducible
from defence.judge import figures
from defence.load.datasets import hold_out

SCALE = "0..1"  # of the zoo's pixels
HEAD = """# Our detector and published ones

{command}

Each cell has, in %, the detection rate on the poisoned images that the attack works on / the
false-positive rate on clean test images. Both are at the threshold that flags {rate:g} of the
held-out clean images, on at most {limit} images of each file, at even distances. Classes count
from 1. [peer_detectors.py](../tools/peer_detectors.py) says what the methods are and how we adapted
them.

"""


# ------------------------------------------------------------------------------------ the table


def read(path, net, limit=None):
    """Return a dataset's images, 0..1, and labels: at most `limit`, at even distances."""
    with utils.open_dataset(path) as data:
        data.fit_to(net.input_shape[1:], net.output_shape[1])
        if limit and limit < len(data):
            chosen = np.zeros(len(data), bool)
            chosen[np.linspace(0, len(data) - 1, limit).astype(int)] = True
            data = data.part(chosen)
        return np.concatenate([x for x, _ in data.batches(SCALE)]), data.labels


def read_validation(path, net):
    """Return the validation set as repair.py splits it: ((images, labels), held-out images)."""
    with utils.open_dataset(path) as data:
        data.fit_to(net.input_shape[1:], net.output_shape[1])
        repair_part, held_out = hold_out(data, float(HARDEN[-1]), seed=0)
        images, held_out_images = (
            np.concatenate([x for x, _ in part.batches(SCALE)]) for part in (repair_part, held_out)
        )
        return (images, repair_part.labels), held_out_images


def judge(name, nets_folder, data_folder, rate, limit):
    """Judge a net's images by every method.

    Return {method: (each trigger's detection rate, or None; false-positive rate; seconds an
    image)}.
    """
    path = badnet.net_path(name, nets_folder)
    net = utils.load_badnet(path)
    repaired = utils.load_badnet(path.with_name(f"{path.stem}_hardened.h5"))
    validation, held_out = read_validation(data_folder / "clean_validation_data.h5", net)
    clean, _ = read(data_folder / "clean_test_data.h5", net, limit)
    paths = [badnet.poisoned_path(*pair, data_folder) for pair in badnet.ZOO[name].triggers]
    poisoned = [read(path, net, limit) for path in paths]
    works = [compute_answers(net, x).argmax(axis=1) == targets for x, targets in poisoned]

    results, ours = {}, make_pair(net, repaired, hardened=True)
    for method in ("ours", *PEERS):
        rng = np.random.default_rng(0)
        score = PEERS[method](net, *validation, rng) if method in PEERS else ours
        threshold = figures.find_threshold(score(held_out), rate)
        start = time.monotonic()
        false_positives = np.mean(score(clean) > threshold)
        seconds = (time.monotonic() - start) / len(clean)
        detection = [
            np.mean(score(x)[hits] > threshold) if hits.any() else None
            for (x, _), hits in zip(poisoned, works)
        ]
        results[method] = detection, false_positives, seconds
        say(f"{name}, {method}: {false_positives:.4f} of clean flagged, {seconds:.4f} s an image")
    return results


def make_lines(names, folders, rate, limit):
    """Yield the lines of the table, and a line of times."""
    methods = ("ours", *PEERS)
    yield f"| net | trigger → class | {' | '.join(methods)} |"
    yield f"|---|---|{'--:|' * len(methods)}"
    seconds = []
    for name in names:
        results = judge(name, *folders, rate, limit)
        seconds.append([results[method][2] for method in methods])
        for number, pair in enumerate(badnet.ZOO[name].triggers or [None]):
            cells = [name, f"{pair[0]} → {name_class(pair[1])}" if pair else "none"]
            for method in methods:
                detection, false_positives, _ = results[method]
                share = detection[number] if pair else None
                share = "–" if share is None else f"{100 * share:.1f}"
                cells.append(f"{share} / {100 * false_positives:.1f}")
            yield f"| {' | '.join(cells)} |"
    ratios = np.median(seconds, axis=0) / np.median(seconds, axis=0)[0]
    yield ""
    times = ", ".join(f"{method} {ratio:.1f}" for method, ratio in zip(methods, ratios))
    yield f"Time for an image, as a multiple of ours, median over the nets: {times}."


def main():
    parser = Parser(
        prog="peers.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="demo", help="of the zoo (default: demo)")
    limit = at_least(1, int)
    parser.add_argument("--limit", type=limit, default=400, help="images per file (default: 400)")
    options = parser.parse_args()
    make_reproducible(0)
    size, rate = options.size, RATES[options.size]
    folders = [ROOT / kind / f"zoo-{size}" for kind in ("models", "data")]
    command = f"`python tests/tools/peers.py --size {size} --limit {options.limit}`"
    text = HEAD.format(command=command, rate=rate, limit=options.limit)
    text += "\n".join(make_lines(SIZES[size], folders, rate, options.limit))
    with files.replace_file(RESULTS / f"peers-{size}.md") as temporary:
        temporary.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
