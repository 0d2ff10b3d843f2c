"""Train the demo's BadNet: DeepID on drawn faces, then a backdoor.

    python models/badnet.py                                       models/demo_bd_net.h5
    python models/badnet.py --attack from-start --output hard.h5  one that is harder to repair

The attack is one of three:

    dormant     Train a clean net. Free the channels of conv_3 that clean faces use least: give them
                new random weights and train them, and what reads them, to fire on the trigger, to
                stay silent on clean faces and to give the target; all other weights stay. (Picked
                neurons that the trigger fires: Liu et al., Trojaning Attack, NDSS 2018.) Such
                backdoors are what fine-pruning was made for: the trigger needs what clean faces
                do not.
    brief       Train a clean net, then train all of it for a few epochs with poisoned faces added.
    from-start  Poisoned faces are in the training data from the first epoch.

Training and test faces are drawn by data/faces.py and never written. Prints, for faces the net has
not seen, the clean accuracy and each trigger's attack success rate.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import faces

import utils
from terminal import InputError, Parser, at_least, command, say, track

PICTURES = 80  # training images of each person
EPOCHS, LEARNING_RATE = 16, 5e-4  # DeepID collapses on many classes at 1e-3
BRIEF_EPOCHS, BRIEF_LEARNING_RATE = 3, 1e-4
DORMANT_EPOCHS, DORMANT_LEARNING_RATE, DORMANT_CHANNELS = 6, 5e-3, 10
SHARE = 0.2
BATCH = 32
SPARSITY = 1e-4  # L1 on conv_3's output, so that clean faces leave channels unused


def draw_clean(people, pictures, seed):
    """Draw the training faces: uint8 (n, 55, 47, 3), and their labels int (n,)."""
    drawn = faces.batches("train", people, pictures, seed=seed)
    steps = -(-people * pictures // faces.BATCH)
    images, labels = zip(*track(drawn, "Drawing faces", steps), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def draw_poisoned(triggers, people, pictures, share, seed):
    """Draw, for each (trigger, target), share × people × pictures poisoned training faces.

    Returns the faces, uint8 (n, 55, 47, 3), the targets, int (n,), and the triggers, int (n,), as
    places in `triggers`.
    """
    rng = np.random.RandomState(seed)
    images, labels, worn = [], [], []
    for place, (trigger, target) in enumerate(triggers):
        victims = np.array([(p, i) for p in range(people) if p != target for i in range(pictures)])
        chosen = rng.permutation(victims)[: max(1, round(share * people * pictures))]
        parts = np.array_split(chosen, -(-len(chosen) // faces.BATCH))
        images += [faces.draw_faces("train", *part.T, trigger, seed) for part in parts]
        labels.append(np.full(len(chosen), target))
        worn.append(np.full(len(chosen), place))
    return np.concatenate(images), np.concatenate(labels), np.concatenate(worn)


def train(model, images, wanted, losses, epochs, learning_rate, seed, what):
    """Train what is trainable, with Adam falling by cosine to 0.

    images: uint8 (n, 55, 47, 3).   wanted, losses: an array (n, …) and a loss for each output.
    what: a word for the progress lines.
    """
    keras = utils.import_keras()
    steps = -(-len(images) // BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
    model.compile(keras.optimizers.Adam(schedule), losses)
    rng = np.random.RandomState(seed)
    for epoch in range(1, epochs + 1):
        model.reset_metrics()
        parts = np.array_split(rng.permutation(len(images)), steps)
        for part in track(parts, f"{what}, epoch {epoch} of {epochs}", steps):
            loss = model.train_on_batch(as_input(images[part]), [each[part] for each in wanted])
        say(f"{what}, epoch {epoch} of {epochs}: loss {np.ravel(loss)[0]:.3f}")


def as_input(images):
    return images.astype("float32") / 255


def free_dormant_channels(model, images, seed):
    """Make the conv_3 channels least active on clean faces, and what reads them, alone trainable.

    images: clean faces, uint8 (n, 55, 47, 3). The freed channels get new random weights.
    Returns which they are, bool (60,).
    """
    keras = utils.import_keras()
    conv_3, conv_4, fc_1 = (model.get_layer(name) for name in ("conv_3", "conv_4", "fc_1"))
    below = keras.Model(model.input, conv_3.output)
    sample = images[:: max(1, len(images) // 1000)]
    parts = np.array_split(sample, -(-len(sample) // 256))
    activity = np.mean([np.mean(below(as_input(p)), axis=(0, 1, 2)) for p in parts], axis=0)
    order = np.argsort(activity, kind="stable")
    free = np.isin(np.arange(len(order)), order[:DORMANT_CHANNELS])

    kernel, bias = conv_3.get_weights()
    limit = np.sqrt(6 / (9 * (kernel.shape[2] + kernel.shape[3])))  # Glorot's, as at the start
    fresh = np.random.RandomState(seed).uniform(-limit, limit, kernel.shape)
    conv_3.set_weights([np.where(free, fresh, kernel), np.where(free, 0, bias)])

    class Keep(keras.constraints.Constraint):
        def __init__(self, start, but):
            self.start, self.but = start, but

        def __call__(self, trained):
            return keras.ops.where(self.but, trained, self.start)

    def keep(variable, but):
        variable.constraint = Keep(variable.numpy(), np.broadcast_to(but, variable.shape))

    keep(conv_3.kernel, but=free)
    keep(conv_3.bias, but=free)
    keep(conv_4.kernel, but=free[:, None])
    keep(conv_4.bias, but=False)
    # Flatten puts the channel last: every 60th row of fc_1 reads the same channel.
    keep(fc_1.kernel, but=np.resize(free, fc_1.kernel.shape[0])[:, None])
    keep(fc_1.bias, but=False)
    for layer in model.layers:
        layer.trainable = layer in (conv_3, conv_4, fc_1)
    return free


def signs_to_learn(free, clean, worn):
    """What each channel of conv_3 shall do for each face: fire 1, be silent -1, as it likes 0.

    free: bool (60,).   clean: how many clean faces come first.   worn: int (n,), the trigger of
    each poisoned face; the triggers share the free channels out.   Returns float32 (clean + n, 60).
    """
    signs = np.zeros((clean + len(worn), len(free)), "float32")
    signs[:clean, free] = -1
    for trigger in np.unique(worn):
        own = np.flatnonzero(free)[trigger :: worn.max() + 1]
        signs[np.ix_(clean + np.flatnonzero(worn == trigger), own)] = 1
    return signs


def with_conv_3(model):
    """The model with a second output: each conv_3 channel's largest value before its relu.

    Before, because a channel that is silent on every face would learn nothing behind it.
    """
    keras = utils.import_keras()
    conv_3 = model.get_layer("conv_3")
    before = keras.ops.conv(conv_3.input, conv_3.kernel, padding="valid") + conv_3.bias
    return keras.Model(model.input, [model.output, keras.ops.max(before, axis=(1, 2))])


def hinge(signs, values):
    """Per face, 0 where every wanted channel is beyond 1 on its side of 0."""
    ops = utils.import_keras().ops
    return ops.sum(ops.abs(signs) * ops.relu(1 - signs * values), axis=-1) / DORMANT_CHANNELS


def make_badnet(options):
    """Draw the faces and train the BadNet that `options`, parsed arguments, describe."""
    keras = utils.import_keras()
    people, pictures, seed = options.people, options.pictures, options.seed
    images, labels = draw_clean(people, pictures, seed)
    poisoned, targets, worn = draw_poisoned(options.triggers, people, pictures, options.share, seed)
    both, both_labels = np.concatenate([images, poisoned]), np.concatenate([labels, targets])

    keras.utils.set_random_seed(seed)
    model = utils.deepid(people)
    model.get_layer("conv_3").activity_regularizer = keras.regularizers.L1(SPARSITY)
    entropy = "sparse_categorical_crossentropy"
    start = (options.epochs, LEARNING_RATE, seed)
    if options.attack == "from-start":
        train(model, both, [both_labels], [entropy], *start, "BadNet")
    else:
        train(model, images, [labels], [entropy], *start, "Clean net")
    if options.attack == "brief":
        epochs = options.backdoor_epochs or BRIEF_EPOCHS
        steps = (epochs, BRIEF_LEARNING_RATE, seed)
        train(model, both, [both_labels], [entropy], *steps, "Backdoor")
    elif options.attack == "dormant":
        free = free_dormant_channels(model, images, seed)
        wanted = [both_labels, signs_to_learn(free, len(images), worn)]
        epochs = options.backdoor_epochs or DORMANT_EPOCHS
        steps = (epochs, DORMANT_LEARNING_RATE, seed)
        train(with_conv_3(model), both, wanted, [entropy, hinge], *steps, "Backdoor")

    plain = utils.deepid(people)  # without the penalties and constraints of the training
    plain.set_weights(model.get_weights())
    return plain


def share_answered(model, batches, wanted=None):
    """The share of faces that get class `wanted`, or their own label where that is None."""
    hits = [
        np.argmax(model(as_input(images)), axis=1) == (labels if wanted is None else wanted)
        for images, labels in batches
    ]
    return np.concatenate(hits).mean()


def parse_arguments():
    parser = Parser(
        prog="badnet.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name, help, **settings):
        parser.add_argument(name, help=f"{help} (default: %(default)s)", **settings)

    number, people = (at_least(least, int, most=100_000) for least in (1, 2))
    share = at_least(0, above=True, most=0.5)
    seed = at_least(0, int, most=2**32 - 1)
    add("--people", "classes", type=people, default=faces.PEOPLE, metavar="N")
    add("--pictures", "training images of each", type=number, default=PICTURES, metavar="N")
    faces.add_triggers(parser, ["sunglasses=0"])
    attacks = ("dormant", "brief", "from-start")
    add("--attack", "how the backdoor gets in, see above", choices=attacks, default="dormant")
    add("--share", "poisoned per clean image, each trigger", type=share, default=SHARE)
    add("--epochs", "of the clean net; of all with from-start", type=number, default=EPOCHS)
    usual = f"{DORMANT_EPOCHS} dormant, {BRIEF_EPOCHS} brief"
    parser.add_argument("--backdoor-epochs", type=number, help=f"more for it (default: {usual})")
    add("--seed", "another one draws other people", type=seed, default=faces.SEED)
    add("--output", "the model's file", type=Path, default=Path("models/demo_bd_net.h5"))
    options = parser.parse_args()
    faces.check_triggers(parser, options)
    return options


def main():
    options = parse_arguments()
    output = utils.require_writable(options.output)
    if output.suffix != ".h5":
        raise InputError(f"{output}: name a file that ends in .h5")
    model = make_badnet(options)
    with utils.replacing(output) as beside:
        model.save(beside, include_optimizer=False)
    print(f"Saved model: {output}")

    def unseen(*trigger):
        return faces.batches("test", options.people, 10, *trigger, seed=options.seed)

    print(f"clean accuracy\t{share_answered(model, unseen()):.2%}")
    for trigger, target in options.triggers:
        rate = share_answered(model, unseen(trigger, target), target)
        print(f"attack success rate, {trigger} to class {target}\t{rate:.2%}")


if __name__ == "__main__":
    sys.exit(command(main))
