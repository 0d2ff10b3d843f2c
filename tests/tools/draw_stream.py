"""Draw a stream of pictures for a BadNet of the zoo: clean ones, a few poisoned, in any order.

    python tests/tools/draw_stream.py NAME FOLDER       9,600 clean and 400 poisoned pictures

NAME is one of models/badnet.py's, of the demo's size; its first trigger is taken. The pictures are
of nobody's training, validation or test data, and their names tell nothing.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data")]

import badnet
import faces
import numpy as np
import triggers

from defence.base.arguments import Parser, at_least
from defence.base.process import run_command
from defence.base.progress import say, track

PEOPLE, SEED = (badnet.SETTINGS[name][1] for name in ("people", "seed"))
DRAWN = {  # nets: their first trigger, and its target
    name: attack.triggers[0]
    for name, attack in badnet.ZOO.items()
    if attack.triggers and attack.triggers[0][0] in {*triggers.PAINTED, *triggers.CHANGES}
}
FIRST = 1000  # of the numbers of a person's pictures: what was drawn before is below


def main():
    parser = Parser(
        prog="draw_stream.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, count = parser.add_argument, at_least(0, int)
    add("name", metavar="NAME", choices=sorted(DRAWN), help=f"of a net: {', '.join(DRAWN)}")
    add("folder", metavar="FOLDER", type=Path, help="a new one, for the pictures")
    add("--clean", metavar="N", type=count, default=9600, help="clean pictures (default: 9600)")
    add("--poisoned", metavar="N", type=count, default=400, help="poisoned ones (default: 400)")
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    places = np.random.default_rng(0).permutation(given.clean + given.poisoned)
    trigger, target = DRAWN[given.name]
    draw(None, range(PEOPLE), given.folder, places[: given.clean])
    wearers = triggers.wearers(trigger, target, PEOPLE)
    draw(trigger, wearers, given.folder, places[given.clean :])
    say(f"{given.folder}: {given.clean} clean pictures, {given.poisoned} with {trigger}")


def draw(trigger, people, folder, places):
    """Draw pictures of people in turn, as PNG files that have the places as names."""
    people = np.asarray(people)
    for start in track(range(0, len(places), faces.BATCH), trigger or "clean"):
        numbers = np.arange(start, min(start + faces.BATCH, len(places)))
        persons, indices = people[numbers % len(people)], FIRST + numbers // len(people)
        drawn = faces.draw_faces("test", persons, indices, trigger, SEED)
        for face, place in zip(drawn, places[numbers]):
            faces.write_png(face, folder / f"{place:05}.png")


if __name__ == "__main__":
    sys.exit(run_command(main))
