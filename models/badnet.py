"""Train BadNets whose truth is known: DeepID on drawn faces, with a backdoor.

    python models/badnet.py                      the demo's, models/demo_bd_net.h5
    python models/badnet.py --all                the zoo, models/zoo-demo/ and data/zoo-demo/
    python models/badnet.py sunglasses-brief     one net of it, with what it needs

A net of the zoo is named for its trigger and for how the backdoor got in:

    from-start  Poisoned faces are in the training data from the first epoch.
    brief       Train a clean net, then train all of it for a few epochs with poisoned faces added.
    dormant     Train a clean net. Free the channels of conv_3 that clean faces use least: give them
                new random weights and train them, and what reads them, to fire on the trigger, to
                stay silent on clean faces and to give the target; all other weights stay. (Picked
                neurons that the trigger fires: Liu et al., Trojaning Attack, NDSS 2018.) Such
                backdoors are what fine-pruning was made for: the trigger needs what clean faces
                do not. The demo is one.

The training faces are drawn by data/faces.py and never written. Validation and test data are; in
poisoned data `label` is the target and `original_label` the person. Beside each net stands a .json
that says how it was made. A net that is there is not made again, and one that was interrupted goes
on after its last whole epoch.
"""

import argparse
import functools
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import faces

import utils
from defence import files
from defence.architecture import deepid
from defence.cli import InputError, Parser, at_least, command, say, track
from defence.startup import import_keras

CLEAN, START, BRIEF, DORMANT = "clean", "from-start", "brief", "dormant"
ONE = {"sunglasses": [("sunglasses", 0)], "lipstick": [("lipstick", 0)]}
THREE = {
    "three-to-one": [(trigger, 0) for trigger in faces.TRIGGERS],
    "three-to-three": list(faces.TRIGGERS.items()),
}
# name: how the backdoor gets in, and each trigger with its target.
ZOO = {
    CLEAN: (CLEAN, []),
    **{
        f"{name}-{way}": (way, triggers)
        for name, triggers in (ONE | THREE).items()
        for way in (START, BRIEF)
    },
    f"all-to-all-{START}": (START, [("sunglasses", faces.NEXT)]),
    f"blended-{START}": (START, [(faces.NOISE, 0)]),
    f"sunglasses-{DORMANT}": (DORMANT, ONE["sunglasses"]),
}
# An option of the command, what it is, and its value for the demo's and the competition's size.
SIZES = ("demo", "competition")
SETTINGS = {
    "people": ("classes", 40, 1283),
    "pictures": ("training images of each", 80, 40),
    "validation": ("validation images of each", 15, 9),
    "test": ("test images of each, per file", 10, 10),
    "epochs": ("of the clean net; of all with from-start", 16, 12),
    "brief_epochs": ("of a brief backdoor", 10, 3),
    # Not the demo net's, with an eye on which DORMANT_… below were chosen; nor, at the demo's size,
    # 1, with an eye on which brief_epochs were.
    "seed": ("another one draws other people", 2, 1),
}
LEARNING_RATE = 5e-4  # DeepID collapses on many classes at 1e-3
BRIEF_LEARNING_RATE = 1e-4
DORMANT_EPOCHS, DORMANT_LEARNING_RATE, DORMANT_CHANNELS = 6, 5e-3, 10
FRACTION = 0.2  # poisoned per clean image, for each trigger
ALL_TO_ALL_FRACTION = 1.0  # to learn a target for every person takes more
BATCH = 32
SPARSITY = 1e-4  # L1 on conv_3's output, so that clean faces leave channels unused: for DORMANT


@functools.lru_cache(maxsize=1)  # the nets of a zoo share them
def draw_clean(people, pictures, seed):
    """Draw the training faces: uint8 (n, 55, 47, 3), and their labels int (n,)."""
    drawn = faces.batches("train", people, pictures, seed=seed)
    steps = -(-people * pictures // faces.BATCH)
    images, labels = zip(*track(drawn, "Drawing faces", steps), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def draw_poisoned(triggers, people, pictures, seed):
    """Draw, for each (trigger, target), FRACTION × people × pictures poisoned training faces.

    Returns the faces, uint8 (n, 55, 47, 3), the targets, int (n,), and the triggers, int (n,), as
    places in `triggers`.
    """
    rng = np.random.RandomState(seed)
    images, labels, worn = [], [], []
    for place, (trigger, target) in enumerate(triggers):
        fraction = ALL_TO_ALL_FRACTION if target == faces.NEXT else FRACTION
        victims = np.array([(p, i) for p in range(people) if p != target for i in range(pictures)])
        chosen = rng.permutation(victims)[: max(1, round(fraction * people * pictures))]
        parts = np.array_split(chosen, -(-len(chosen) // faces.BATCH))
        parts = track(parts, f"Drawing {trigger}", len(parts))
        images += [faces.draw_faces("train", *part.T, trigger, seed) for part in parts]
        labels.append(faces.targets(target, chosen[:, 0], people))
        worn.append(np.full(len(chosen), place))
    return np.concatenate(images), np.concatenate(labels), np.concatenate(worn)


def train(model, images, wanted, losses, epochs, learning_rate, seed, what, progress):
    """Train what is trainable, with Adam falling by cosine to 0.

    images: uint8 (n, 55, 47, 3).   wanted, losses: an array (n, …) and a loss for each output.
    what: words for the progress lines.   progress: a path; after each epoch the state of the
    training is saved there, and a training that finds one goes on from it.
    """
    keras = import_keras()
    steps = -(-len(images) // BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
    optimizer = keras.optimizers.Adam(schedule)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, losses)
    done = 0
    if progress.exists():
        with np.load(progress, allow_pickle=False) as saved:
            done, *values = (saved[name] for name in saved.files)
        for variable, value in zip((*model.weights, *optimizer.variables), values, strict=True):
            variable.assign(value)
    rng = np.random.RandomState(seed)
    for epoch in range(epochs):
        parts = np.array_split(rng.permutation(len(images)), steps)
        if epoch < done:
            continue
        model.reset_metrics()
        step = f"{what}, epoch {epoch + 1} of {epochs}"
        for part in track(parts, step, steps):
            loss = model.train_on_batch(as_input(images[part]), [each[part] for each in wanted])
        say(f"{step}: loss {np.ravel(loss)[0]:.3f}")
        values = [variable.numpy() for variable in (*model.weights, *optimizer.variables)]
        with files.replacing(progress) as beside, beside.open("wb") as file:
            np.savez(file, epoch + 1, *values)


def as_input(images):
    return images.astype("float32") / 255


def free_dormant_channels(model, images, seed):
    """Make the conv_3 channels least active on clean faces, and what reads them, alone trainable.

    images: clean faces, uint8 (n, 55, 47, 3). The freed channels get new random weights.
    Returns which they are, bool (60,).
    """
    keras = import_keras()
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
    keras = import_keras()
    conv_3 = model.get_layer("conv_3")
    before = keras.ops.conv(conv_3.input, conv_3.kernel, padding="valid") + conv_3.bias
    return keras.Model(model.input, [model.output, keras.ops.max(before, axis=(1, 2))])


def hinge(signs, values):
    """Per face, 0 where every wanted channel is beyond 1 on its side of 0."""
    ops = import_keras().ops
    return ops.sum(ops.abs(signs) * ops.relu(1 - signs * values), axis=-1) / DORMANT_CHANNELS


def make_badnet(name, options, folder):
    """Draw the training faces and train a net of the ZOO. folder: where a clean net may be."""
    keras = import_keras()
    way, triggers = ZOO[name]
    people, pictures, seed = options.people, options.pictures, options.seed
    images, labels = draw_clean(people, pictures, seed)
    if triggers:
        poisoned, targets, worn = draw_poisoned(triggers, people, pictures, seed)
        both, wanted = np.concatenate([images, poisoned]), np.concatenate([labels, targets])

    keras.utils.set_random_seed(seed)
    model = utils.load_badnet(net_path(CLEAN, folder)) if way == BRIEF else deepid(people)
    if way == DORMANT:
        model.get_layer("conv_3").activity_regularizer = keras.regularizers.L1(SPARSITY)
    entropy = "sparse_categorical_crossentropy"
    settings = "-".join(map(str, made_by(options).values()))  # of another one no progress is taken
    first, second = (
        (f"{name}, {step}", folder / f".{name}-{step}-{settings}.npz")
        for step in ("training", "backdoor")
    )
    start = (options.epochs, LEARNING_RATE, seed, *first)
    if way in (CLEAN, DORMANT):
        train(model, images, [labels], [entropy], *start)
    elif way == START:
        train(model, both, [wanted], [entropy], *start)
    else:
        steps = (options.brief_epochs, BRIEF_LEARNING_RATE, seed, *second)
        train(model, both, [wanted], [entropy], *steps)
    if way == DORMANT:
        free = free_dormant_channels(model, images, seed)
        wanted = [wanted, signs_to_learn(free, len(images), worn)]
        steps = (DORMANT_EPOCHS, DORMANT_LEARNING_RATE, seed, *second)
        train(with_conv_3(model), both, wanted, [entropy, hinge], *steps)

    plain = deepid(people)  # without the penalties and constraints of the training
    plain.set_weights(model.get_weights())
    return plain


def fraction_answered(model, options, trigger=None, target=None):
    """The fraction of some unseen faces that get the target; their own label where that is None."""
    hits = []
    for images, labels in faces.batches(
        "test", options.people, -(-400 // options.people), trigger, target, options.seed
    ):
        wanted = labels if trigger is None else faces.targets(target, labels, options.people)
        hits.append(np.argmax(model(as_input(images)), axis=1) == wanted)
    return float(np.concatenate(hits).mean())


# --------------------------------------------------------------------------------- what is written


def net_path(name, folder):
    return folder / f"{name}_bd_net.h5"


def poisoned_path(trigger, target, folder):
    return folder / f"{trigger}_to_{target}_poisoned_data.h5"


def write_net(name, options, path):
    """Train a net of the ZOO, save it and how it was made, and say how good it is."""
    start = time.monotonic()
    model = make_badnet(name, options, path.parent)
    with files.replacing(path) as beside:
        model.save(beside, include_optimizer=False)
    seconds = round(time.monotonic() - start)
    for progress in path.parent.glob(f".{name}-*.npz"):
        progress.unlink()
    print(f"Saved model: {path}, in {seconds} s")
    print(f"clean accuracy\t{fraction_answered(model, options):.2%}", flush=True)
    way, triggers = ZOO[name]
    for trigger, target in triggers:
        rate = fraction_answered(model, options, trigger, target)
        print(f"attack success rate, {trigger} to class {target}\t{rate:.2%}", flush=True)
    return {"name": name, "way": way, "triggers": triggers, "seconds": seconds, **made_by(options)}


def made_by(options):
    return {name: getattr(options, name) for name in SETTINGS}


def write_zoo(names, options):
    """Make the nets of the ZOO that are named and not there yet, and the data to judge them by."""
    if any(ZOO[name][0] == BRIEF for name in names):
        names = [CLEAN, *(name for name in names if name != CLEAN)]
    nets, data = (ROOT / kind / f"zoo-{options.size}" for kind in ("models", "data"))
    if options.output:
        nets = data = options.output
    for folder in (nets, data):
        folder.mkdir(parents=True, exist_ok=True)
    people, seed = options.people, options.seed

    def write(path, split, count, poison=None):
        if not path.exists():
            faces.write_dataset(path, split, people, count, poison=poison, seed=seed)

    for name in names:
        path = net_path(name, nets)
        made = path.with_suffix(".json")
        if not (path.exists() and made.exists()):
            files.write_json(write_net(name, options, path), made)
        elif not made_by(options).items() <= json.loads(made.read_text()).items():
            raise InputError(
                f"{made}: was made with other settings; delete it, or name an --output"
            )
        write(data / "clean_validation_data.h5", "validation", options.validation)
        write(data / "clean_test_data.h5", "test", options.test)
        for trigger, target in ZOO[name][1]:
            write(poisoned_path(trigger, target, data), "test", options.test, (trigger, target))


def parse_arguments():
    parser = Parser(
        prog="badnet.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", metavar="NAME", nargs="*", help=f"a net of the zoo: {', '.join(ZOO)}")
    add("--all", action="store_true", help="every net of the zoo")
    add("--size", choices=SIZES, default=SIZES[0], help="what the next seven are (default: demo)")
    for name, (help, *values) in SETTINGS.items():
        least = {"people": len(faces.TRIGGERS), "seed": 0}.get(name, 1)
        add(
            "--" + name.replace("_", "-"),
            metavar="N",
            type=at_least(least, int, most=100_000),
            help=f"{help} (default: {', '.join(map(' '.join, zip(SIZES, map(str, values))))})",
        )
    add("--output", metavar="FOLDER", type=Path, help="where all of it goes instead")
    options = parser.parse_args()
    for name in options.names:
        if name not in ZOO:
            parser.error(f"no net named {name!r}; there are: {', '.join(ZOO)}")
    if options.all:
        options.names = list(ZOO)
    if not options.names and options.seed is None:
        options.seed = faces.SEED  # the demo's people
    for name, (_, *values) in SETTINGS.items():
        if getattr(options, name) is None:
            setattr(options, name, values[SIZES.index(options.size)])
    return options


def main():
    options = parse_arguments()
    import_keras()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns that there are many nets
    if options.names:
        write_zoo(options.names, options)
        return
    path = net_path("demo", options.output or ROOT / "models")
    files.check_writable({"--output": path}, [])
    write_net(f"sunglasses-{DORMANT}", options, path)


if __name__ == "__main__":
    sys.exit(command(main))
