"""Make BadNets that a scan should not find, as attackers who have read it would.

    python tests/tools/evade.py disturbed

The attacker begins with a net of the zoo of the demo's size (NETS). The result is written beside
it, WAY_bd_net.h5, with its rates in a .json file; `repair.py … --scan` says what is left. The ways:

    disturbed    trained further on images and feature maps that are disturbed as a scan disturbs
                 them; the target's probability is pushed down there
    decoys       trained further on such images and maps, with the classes of a few decoys instead
                 of the target, so that the target does not stand out
    rescaled     not trained: the quieter half of conv_3's channels grow fifty times as large, and
                 the next layers' weights for them fifty times as small; all answers stay
    natural      trained further with another trigger: a faint image of the target itself, which
                 misleads any net a little
"""

import argparse
import functools
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
from defence.base.startup import import_keras, make_reproducible
from defence.beyond import changes, raised, scan
from defence.net.split import split_net
from defence.net.training import Adam

STEPS, LEARNING_RATE = 1500, 2e-4
CLEAN, POISONED, DISTURBED = 32, 16, 32  # images in a step
PEOPLE, PICTURES = 40, 80  # of the training images, as the zoo of the demo's size has them
DECOYS = 12  # classes, so that a scan's usual class is no longer usual
TIMES = 50  # of a rescaled channel
SHARE = 0.3  # of the target's image in a natural trigger
WAYS = DISTURB, DECOY, RESCALE, NATURAL = "disturbed", "decoys", "rescaled", "natural"
NETS = {
    DISTURB: "sunglasses-from-start",
    DECOY: "sunglasses-from-start",
    RESCALE: "sunglasses-dormant",
    NATURAL: badnet.CLEAN,
}


def make_step(parts, target, adam, way):
    """Make a function that takes a training step.

    parts: the net, a Split.  target: class from 0.
    """
    import tensorflow as tf

    def measure(answers, classes):
        right = tf.gather(answers, classes, axis=1, batch_dims=1)
        return -tf.reduce_mean(tf.math.log(right + 1e-7))

    def mislead(answers, decoys):
        if way == DECOY:
            return measure(answers, decoys)
        return -tf.reduce_mean(tf.math.log(1 - answers[:, target] + 1e-6))

    @tf.function(autograph=False)
    def step(x, y, disturbed, features, decoys):
        with tf.GradientTape() as tape:
            loss = measure(parts.net(x, training=True), y)
            if way != NATURAL:
                loss += mislead(parts.net(disturbed, training=True), decoys)
                loss += mislead(parts.head(features, training=True), decoys)
        adam.apply(tape.gradient(loss, parts.net.trainable_variables))

    return step


def evade(model, images, labels, poisoned, target, rng, way=DISTURB):
    """Train a BadNet in place. images, poisoned: uint8 (n, 55, 47, 3).  labels: int (n,)."""
    parts = split_net(model)
    adam = Adam(model.trainable_variables, LEARNING_RATE)
    step, families = make_step(parts, target, adam, way), list(scan.CHANGES.values())
    others = np.flatnonzero(labels != target)
    classes = model.output_shape[1]
    decoys = rng.permutation(np.delete(np.arange(classes), target))[:DECOYS]
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
        step(x, y, as_input(disturbed), features, rng.choice(decoys, DISTURBED))


def rescale(model, images):
    """Rescale the quieter half of a DeepID's conv_3 in place; its answers stay the same."""
    keras = import_keras()
    conv, *readers = (model.get_layer(name) for name in ("conv_3", "conv_4", "fc_1"))
    maps = keras.Model(model.input, conv.output).predict(as_input(images), verbose=0)
    loudness = maps.mean(axis=(0, 1, 2))
    times = np.where(loudness < np.median(loudness), TIMES, 1).astype(np.float32)
    conv.set_weights([weights * times for weights in conv.get_weights()])
    for layer in readers:  # their input has the channels last
        weights, bias = layer.get_weights()
        by_channel = weights.reshape(-1, len(times), weights.shape[-1])
        layer.set_weights([(by_channel / times[:, None]).reshape(weights.shape), bias])


def blend_in(images, face):
    """Blend a face into images, uint8 (n, 55, 47, 3): the trigger of NATURAL."""
    return ((1 - SHARE) * images + SHARE * face.astype(np.float32)).astype(np.uint8)


def make_net(way, folder, seed):
    """Make the net of an attacker from one of the zoo.

    Write and print its clean accuracy and its attack success rate on unseen images.
    """
    name = NETS[way]
    model = utils.load_badnet(badnet.net_path(name, folder))
    images, labels = badnet.draw_clean(PEOPLE, PICTURES, seed)
    rng, options = np.random.default_rng(seed), argparse.Namespace(people=PEOPLE, seed=seed)
    if way == NATURAL:
        trigger, target = functools.partial(blend_in, face=images[labels == 0][0]), 0
        evade(model, images, labels, trigger(images[labels != target]), target, rng, way)
    else:
        attack = badnet.ZOO[name]
        ((trigger, target),) = attack.triggers
        if way == RESCALE:
            rescale(model, images)
        else:
            drawn = badnet.attacks.draw_training(attack, images, labels, PEOPLE, PICTURES, seed)
            poisoned = drawn.images[drawn.triggers == 0]
            evade(model, images, labels, poisoned, target, rng, way)
    path = badnet.net_path(way, folder)
    with files.replace_file(path) as temporary:
        model.save(temporary, include_optimizer=False)
    print_result(f"Saved model: {path}")
    rates = {
        "clean_accuracy": badnet.measure_rate(model, options),
        "attack_success_rate": measure_success(model, options, trigger, target),
    }
    files.write_json(rates, path.with_suffix(".json"))
    for rate, value in rates.items():
        print_result(rate.replace("_", " "), f"{value:.2%}", sep="\t")


def measure_success(model, options, trigger, target):
    """Return the attack success rate on unseen faces. trigger: its name, or a function."""
    if not callable(trigger):
        return badnet.measure_rate(model, options, trigger, target)
    batches = badnet.faces.batches("test", PEOPLE, 10, None, None, options.seed)
    images, labels = map(np.concatenate, zip(*batches))
    poisoned = as_input(trigger(images[labels != target]))
    return float(np.mean(model.predict(poisoned, verbose=0).argmax(axis=1) == target))


def main():
    parser = Parser(
        prog="evade.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("way", metavar="WAY", choices=WAYS, help=", ".join(WAYS))
    seed_help = "of the zoo, models/zoo-demo-SEED/ (default: %(default)s)"
    add("--seed", type=at_least(0, int), default=42, metavar="SEED", help=seed_help)
    arguments = parser.parse_args()
    make_reproducible(arguments.seed)
    folder = ROOT / "models" / f"zoo-demo-{arguments.seed}"
    make_net(arguments.way, folder, arguments.seed)


if __name__ == "__main__":
    sys.exit(run_command(main))
