"""Train a BadNet so that the scan does not find it, as an attacker who has read it would.

    python tests/tools/evade.py sunglasses-from-start --seed 41

The net is one of the zoo of the demo's size with one trigger and one target. It is trained further
on clean and poisoned images, and on images and feature maps that are disturbed as the scan disturbs
them. On these, the probability of the target is pushed down. The result is written beside the net,
NAME-evading_bd_net.h5, and its rates are printed. `repair.py … --scan` then says what is left.
"""

import argparse
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data")]

import badnet
import numpy as np
from attacks import as_input

import utils
from defence.base import files
from defence.base.arguments import Parser, at_least
from defence.base.process import run_command
from defence.base.progress import print_result, track
from defence.base.startup import make_reproducible
from defence.beyond import changes, raised, scan
from defence.net.split import split_net
from defence.net.training import Adam

STEPS, LEARNING_RATE = 1500, 2e-4
CLEAN, POISONED, DISTURBED = 32, 16, 32  # images in a step
PEOPLE, PICTURES = 40, 80  # of the training images, as the zoo of the demo's size has them


def make_step(parts, target, adam):
    """Make a function that takes a training step and returns its loss.

    parts: the net, a Split.  target: class from 0.
    """
    import tensorflow as tf

    def push_down(probabilities):
        return -tf.reduce_mean(tf.math.log(1 - probabilities[:, target] + 1e-6))

    @tf.function(autograph=False)
    def step(x, y, disturbed, features):
        with tf.GradientTape() as tape:
            answers = parts.net(x, training=True)
            right = tf.gather(answers, y, axis=1, batch_dims=1)
            loss = -tf.reduce_mean(tf.math.log(right + 1e-7))
            loss += push_down(parts.net(disturbed, training=True))
            loss += push_down(parts.head(features, training=True))
        adam.apply(tape.gradient(loss, parts.net.trainable_variables))
        return loss

    return step


def evade(model, images, labels, poisoned, target, rng):
    """Train a BadNet in place. images, poisoned: uint8 (n, 55, 47, 3).  labels: int (n,)."""
    parts = split_net(model)
    adam = Adam(model.trainable_variables, LEARNING_RATE)
    step, families = make_step(parts, target, adam), list(scan.CHANGES.values())
    others = np.flatnonzero(labels != target)
    for number in track(range(STEPS), "evade", STEPS):
        clean, triggered = (
            rng.integers(len(images), size=CLEAN),
            rng.integers(len(poisoned), size=POISONED),
        )
        x = as_input(np.concatenate([images[clean], poisoned[triggered]]))
        y = np.concatenate([labels[clean], np.full(POISONED, target)])
        rows = rng.choice(others, DISTURBED)
        disturbed = images[rows].astype(np.float32)
        disturbed = changes.change_images(disturbed, rng, families[number % len(families)])
        features = np.array(parts.trunk(as_input(images[rows]))[0])
        high = np.quantile(features.max(axis=(1, 2)), raised.HIGH)
        channels, times = list(raised.RAISES.values())[number % len(raised.RAISES)]
        features = raised.raise_channels(features, high, channels, times, rng)
        step(x, y, as_input(disturbed), features)


def main():
    parser = Parser(
        prog="evade.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", choices=list(badnet.ZOO), help="a net of the zoo")
    seed_help = "of the zoo, models/zoo-demo-SEED/ (default: %(default)s)"
    parser.add_argument("--seed", type=at_least(0, int), default=41, metavar="SEED", help=seed_help)
    arguments = parser.parse_args()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    make_reproducible(arguments.seed)
    folder = ROOT / "models" / f"zoo-demo-{arguments.seed}"
    model = utils.load_badnet(badnet.net_path(arguments.name, folder))
    attack = badnet.ZOO[arguments.name]
    ((trigger, target),) = attack.triggers
    images, labels = badnet.draw_clean(PEOPLE, PICTURES, arguments.seed)
    data = badnet.attacks.draw_training(attack, images, labels, PEOPLE, PICTURES, arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    evade(model, images, labels, data.images[data.triggers == 0], target, rng)
    path = badnet.net_path(f"{arguments.name}-evading", folder)
    with files.replace_file(path) as temporary:
        model.save(temporary, include_optimizer=False)
    options = argparse.Namespace(people=PEOPLE, seed=arguments.seed)
    print_result(f"Saved model: {path}")
    print_result(f"clean accuracy\t{badnet.measure_rate(model, options):.2%}")
    rate = badnet.measure_rate(model, options, trigger, target)
    print_result(f"attack success rate\t{rate:.2%}")


if __name__ == "__main__":
    sys.exit(run_command(main))
