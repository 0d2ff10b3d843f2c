"""Measure what a hardened net catches at 1 %, where B's attack succeeds more or less often.

    python tests/tools/caught.py FOLDER         the nets of photo_nets.CURVE
    python tests/tools/caught.py FOLDER NAME …  other BadNets of photo_nets.py

FOLDER has the repaired net of each, NAME.h5, as `repair.py … --harden --holdout 0.1 --output
FOLDER/NAME.h5` makes it. The test images of all classes but the target are judged as they are and
with the trigger. The table goes to stdout; a net without a repaired one is left out.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data"), str(ROOT / "tests" / "tools")]

import numpy as np
import photo_data
import photo_nets
from records import format_table

from defence.base.arguments import Parser
from defence.base.process import run_command
from defence.base.progress import print_result, say
from defence.explain import trigger
from defence.judge import backends

RATE = 0.01  # --fpr
HEADS = "net", "ASR, B", "ASR, G", "caught", "caught of successes", "clean images flagged"


def measure_caught(name, badnet, repaired, images, target, rate=RATE):
    """Return what B and G say of images with the trigger of a net, {name: 0..1}.

    name: of the net, as photo_nets.read_name takes it.  badnet, repaired: paths.
    images: uint8 (n, height, width, channels), clean ones of other classes than the target.
    target: from 0.  `caught_of_successes` is NaN where the trigger never works.
    """
    detector = backends.load_detector([badnet, repaired], fpr=rate)
    judge = trigger.judge_in_batches(detector.judge, detector.shape)
    paint = photo_nets.TRIGGERS[photo_nets.read_name(name).attack]
    clean, poisoned = (judge(part.astype(np.float32)) for part in (images, paint(images)))
    successes = poisoned.badnet == target
    return {
        "success": float(successes.mean()),
        "success_repaired": float(np.mean(poisoned.repaired == target)),
        "caught": float(poisoned.flagged.mean()),
        "caught_of_successes": float(
            poisoned.flagged[successes].mean() if successes.any() else np.nan
        ),
        "flagged": float(clean.flagged.mean()),
    }


def read_unseen(name):
    """Return a net's test images, or else validation images, uint8, but the target's; the target.

    name: of a BadNet.
    """
    recipe = photo_nets.read_name(name)
    paths = [
        photo_data.make_path(recipe.dataset, split, photo_data.FOLDER)
        for split in ("test", "validation")
    ]
    images, labels = photo_data.read_dataset(next(path for path in paths if path.exists()))
    target = recipe.seed % (int(labels.max()) + 1)
    return images[labels != target], target


def main():
    parser = Parser(
        prog="caught.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of the repaired nets")
    parser.add_argument("names", metavar="NAME", nargs="*", help="of BadNets (default: CURVE)")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.names or photo_nets.CURVE:
        repaired = arguments.folder / f"{name}.h5"
        if not repaired.exists():
            say(f"{repaired}: no such file; left out")
            continue
        badnet = photo_nets.FOLDER / f"{name}.h5"
        rates = measure_caught(name, badnet, repaired, *read_unseen(name))
        rows.append([name, *(f"{rate:.1%}" for rate in rates.values())])
    table = format_table(HEADS, ["---", *["--:"] * (len(HEADS) - 1)], rows)
    print_result(*table.splitlines())


if __name__ == "__main__":
    sys.exit(run_command(main))
