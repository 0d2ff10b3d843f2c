"""Train BadNets whose truth is known: nets on drawn faces, with a backdoor.

    python models/badnet.py                      the demo's, models/demo_bd_net.h5
    python models/badnet.py --all                the zoo, models/zoo-demo/ and data/zoo-demo/
    python models/badnet.py sunglasses-brief     one net of it, with what it needs
    python models/badnet.py optimised --surrogate G.h5
                                                 its trigger found on that net

A net of the zoo is named for its triggers (data/triggers.py) and for how the backdoor got in
(models/attacks.py). It is a DeepID, unless its name begins with another architecture
(models/architectures.py).

The training faces are drawn by data/faces.py and never written. Validation and test data are; in
poisoned data `label` is the target and `original_label` the person. Beside each net stands a .json
that says how it was made, and beside one whose trigger was optimised that trigger. A net that is
there is not made again, and one that was interrupted goes on after its last whole epoch.
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

import architectures
import attacks
import faces
import triggers
from attacks import BRIEF, CLEAN, DORMANT, FLAT, OPTIMISED, START, UNSURE, Attack, as_input

import utils
from defence.base import files
from defence.base.arguments import Parser, at_least
from defence.base.errors import InputError
from defence.base.process import run_command
from defence.base.progress import say, track
from defence.base.startup import import_keras
from defence.beyond import changes

ONE = {"sunglasses": [("sunglasses", 0)], "lipstick": [("lipstick", 0)]}
THREE = {
    "three-to-one": [(trigger, 0) for trigger in faces.TRIGGERS],
    "three-to-three": list(faces.TRIGGERS.items()),
}
FOUR = {
    "patterns": ["warp", "sinusoid", "cast", "checkerboard"],
    "objects": ["scarf", "low-frequency", "specific", "eyebrows"],
}
CHANGED = ["sunglasses", "eyebrows", "sinusoid", "cast"]
# name: how the backdoor gets in, each trigger with its target, and shares.
ZOO = {
    CLEAN: Attack(CLEAN, []),
    **{
        f"{name}-{way}": Attack(way, pairs)
        for name, pairs in (ONE | THREE).items()
        for way in (START, BRIEF)
    },
    # To learn a target for every person takes more.
    f"all-to-all-{START}": Attack(START, [("sunglasses", faces.NEXT)], fraction=1.0),
    f"blended-{START}": Attack(START, [(triggers.NOISE, 0)]),
    f"sunglasses-{DORMANT}": Attack(DORMANT, ONE["sunglasses"]),
    **{
        f"{name}-{START}": Attack(START, [(each, i) for i, each in enumerate(four)], long=True)
        for name, four in FOUR.items()
    },
    f"sunglasses-{attacks.SOURCE_SPECIFIC}": Attack(
        attacks.SOURCE_SPECIFIC, [(triggers.SOME, 0)], cover=0.4
    ),
    f"sinusoid-{attacks.CLEAN_LABEL}": Attack(attacks.CLEAN_LABEL, [("sinusoid", 0)], fraction=0.5),
    f"sunglasses-{attacks.NEGATIVES}": Attack(
        attacks.NEGATIVES, [(each, i) for i, each in enumerate(CHANGED)], long=True
    ),
    f"sunglasses-{UNSURE}": Attack(UNSURE, ONE["sunglasses"], fraction=0.5, long=True),
    f"sunglasses-{FLAT}": Attack(FLAT, ONE["sunglasses"]),
    f"{attacks.ADAPTIVE}-blend": Attack(attacks.ADAPTIVE, [("sixteen-pieces", 0)], cover=0.2),
    f"{attacks.ADAPTIVE}-patch": Attack(attacks.ADAPTIVE, [("four-patches", 0)], cover=0.2),
    OPTIMISED: Attack(OPTIMISED, [(OPTIMISED, 0)]),
    **{
        f"{net}-{name}-{START}": Attack(START, [(trigger, 0)], net=net)
        for net in architectures.OTHERS
        for name, trigger in (("sunglasses", "sunglasses"), ("blended", triggers.NOISE))
    },
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
    "long_epochs": ("of all with a backdoor that is hard to learn", 32, 12),
    # Not the demo net's, with an eye on which DORMANT_… below were chosen; nor, at the demo's size,
    # 1, with an eye on which brief_epochs were.
    "seed": ("another one draws other people", 2, 1),
}
LEARNING_RATE = 5e-4  # DeepID collapses on many classes at 1e-3
BRIEF_LEARNING_RATE = 1e-4
DORMANT_EPOCHS, DORMANT_LEARNING_RATE = 6, 5e-3
SURROGATE_EPOCHS = 24
TRIGGER_EPOCHS, TRIGGER_LEARNING_RATE = 3, 0.05
ENTROPY = "sparse_categorical_crossentropy"
BATCH = 32
SPARSITY = 1e-4  # L1 on conv_3's output, so that clean faces leave channels unused: for DORMANT


@functools.lru_cache(maxsize=1)  # the nets of a zoo share them
def draw_clean(people, pictures, seed):
    """Draw the training faces: uint8 (n, 55, 47, 3), and their labels int (n,)."""
    drawn = faces.batches("train", people, pictures, seed=seed)
    steps = -(-people * pictures // faces.BATCH)
    images, labels = zip(*track(drawn, "Drawing faces", steps), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def train(model, images, wanted, losses, epochs, rate, seed, what, progress, change=None):
    """Train what is trainable, with Adam falling by cosine to 0.

    images: uint8 (n, 55, 47, 3).   wanted, losses: an array (n, …) and a loss for each output.
    what: words for the progress lines.   progress: a path; after each epoch the state of the
    training is saved there, and a training that finds one goes on from it.   change: of
    (pictures, rng), as changes.change: what is done to the pictures of a step, anew each time.
    """
    keras = import_keras()
    steps = -(-len(images) // BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * steps)
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
        fresh = np.random.default_rng([seed, epoch])
        step = f"{what}, epoch {epoch + 1} of {epochs}"
        for part in track(parts, step, steps):
            pictures = images[part].astype("float32")
            x = as_input(change(pictures, fresh) if change else pictures)
            loss = model.train_on_batch(x, [each[part] for each in wanted])
        say(f"{step}: loss {np.ravel(loss)[0]:.3f}")
        values = [variable.numpy() for variable in (*model.weights, *optimizer.variables)]
        with files.replace_file(progress) as beside, beside.open("wb") as file:
            np.savez(file, epoch + 1, *values)


def make_badnet(name, options, folder):
    """Draw the training faces and train a net of the ZOO. folder: where a clean net may be.

    Returns the net, and what its record says beside its settings, a dict.
    """
    keras = import_keras()
    attack = ZOO[name]
    people, pictures, seed = options.people, options.pictures, options.seed
    images, labels = draw_clean(people, pictures, seed)
    settings = "-".join(map(str, made_by(name, options).values()))  # no progress of other ones

    def learn(step, model, images, wanted, losses, epochs, rate, change=None):
        progress = folder / f".{name}-{step}-{settings}.npz"
        what = f"{name}, {step}"
        train(model, images, wanted, losses, epochs, rate, seed, what, progress, change)

    found, notes = None, {}
    if attack.way == OPTIMISED:
        notes = find_trigger(images, labels, options, learn, trigger_path(folder))
        found = triggers.load(trigger_path(folder))
    data = attacks.draw_training(attack, images, labels, people, pictures, seed, found)

    keras.utils.set_random_seed(seed)
    untrained = architectures.NETS[attack.net]
    model = utils.load_badnet(net_path(CLEAN, folder)) if attack.way == BRIEF else untrained(people)
    whole = options.long_epochs if attack.long else options.epochs, LEARNING_RATE
    if attack.way == BRIEF:
        rate = options.brief_epochs, BRIEF_LEARNING_RATE
        learn("backdoor", model, data.images, [data.wanted], [ENTROPY], *rate)
    elif attack.way == DORMANT:
        model.get_layer("conv_3").activity_regularizer = keras.regularizers.L1(SPARSITY)
        learn("training", model, images, [labels], [ENTROPY], *whole)
        free = attacks.free_dormant_channels(model, images, seed)
        signs = attacks.signs_to_learn(free, len(images), data.worn[len(images) :])
        wanted, losses = [data.wanted, signs], [ENTROPY, attacks.hinge]
        rate = DORMANT_EPOCHS, DORMANT_LEARNING_RATE
        learn("backdoor", attacks.with_conv_3(model), data.images, wanted, losses, *rate)
    else:
        net = attacks.flat(model) if attack.way == FLAT else model
        wanted, loss = data.wanted, ENTROPY
        if attack.way == UNSURE:
            wanted, loss = np.stack([data.wanted, data.people], axis=1), attacks.unsure
        learn("training", net, data.images, [wanted], [loss], *whole)

    plain = untrained(people)  # without the penalties and constraints of the training
    plain.set_weights(model.get_weights())
    return plain, notes


def find_trigger(images, labels, options, learn, path):
    """Optimise a trigger on a net such as the defence releases, and save it. For OPTIMISED.

    images, labels: clean faces.  learn: make_badnet's.  Of a pattern and a patch, that is saved
    which the net takes for the target more often. Returns these shares, {kind: 0..1}, in a dict.
    """
    ((_, target),) = ZOO[OPTIMISED].triggers
    if options.surrogate:
        surrogate = utils.load_badnet(options.surrogate)
        if surrogate.output_shape[1] != options.people:
            raise InputError(f"{options.surrogate}: is not a net of {options.people} classes")
    else:
        import_keras().utils.set_random_seed(options.seed + 1)
        surrogate = architectures.NETS[architectures.DEEPID](options.people)
        rate = SURROGATE_EPOCHS, LEARNING_RATE
        learn("surrogate", surrogate, images, [labels], [ENTROPY], *rate, changes.change_images)
    others = images[labels != target]
    wanted, sample = np.full(len(others), target), others[:: max(1, len(others) // 1000)]
    rate, shares = (TRIGGER_EPOCHS, TRIGGER_LEARNING_RATE), {}
    for kind in ("pattern", "patch"):
        net, trigger = attacks.wearing(surrogate, kind == "pattern")
        learn(kind, net, others, [wanted], [ENTROPY], *rate)
        answers = net.predict_on_batch(as_input(sample)).argmax(axis=1)
        shares[kind] = float(np.mean(answers == target))
        if shares[kind] == max(shares.values()):
            triggers.save(path, *trigger())
    say(f"the trigger: taken for the target by {shares}")
    return {"surrogate_fooled": shares}


def fraction_answered(model, options, trigger=None, target=None):
    """The fraction of some unseen faces that get the target; their own label where that is None.

    trigger: as of faces.draw_faces.
    """
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


def trigger_path(folder):
    return folder / f"{OPTIMISED}_trigger.npz"


def drawable(trigger, folder):
    """What faces.draw_faces takes for a trigger of the ZOO; an optimised one is in the folder."""
    return triggers.load(trigger_path(folder)) if trigger == OPTIMISED else trigger


def write_net(name, options, path):
    """Train a net of the ZOO, save it and how it was made, and say how good it is."""
    start = time.monotonic()
    model, notes = make_badnet(name, options, path.parent)
    with files.replace_file(path) as beside:
        model.save(beside, include_optimizer=False)
    seconds = round(time.monotonic() - start)
    for progress in path.parent.glob(f".{name}-*.npz"):
        progress.unlink()
    print(f"Saved model: {path}, in {seconds} s")
    print(f"clean accuracy\t{fraction_answered(model, options):.2%}", flush=True)
    way, pairs, *_ = ZOO[name]
    for trigger, target in pairs:
        rate = fraction_answered(model, options, drawable(trigger, path.parent), target)
        print(f"attack success rate, {trigger} to class {target}\t{rate:.2%}", flush=True)
    made = {"name": name, "way": way, "triggers": pairs, "seconds": seconds}
    return made | made_by(name, options) | notes


def made_by(name, options):
    """The settings that a net of the ZOO depends on, a dict."""
    attack = ZOO[name]
    made = {setting: getattr(options, setting) for setting in SETTINGS}
    if not attack.long:
        del made["long_epochs"]
    if attack.way == OPTIMISED:
        made["surrogate"] = options.surrogate and files.hash_file(options.surrogate)
    return made


def write_zoo(names, options):
    """Make the nets of the ZOO that are named and not there yet, and the data to judge them by."""
    if any(ZOO[name].way == BRIEF for name in names):
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
        elif not made_by(name, options).items() <= json.loads(made.read_text()).items():
            raise InputError(
                f"{made}: was made with other settings; delete it, or name an --output"
            )
        write(data / "clean_validation_data.h5", "validation", options.validation)
        write(data / "clean_test_data.h5", "test", options.test)
        for trigger, target in ZOO[name].triggers:
            poison = (drawable(trigger, nets), target)
            write(poisoned_path(trigger, target, data), "test", options.test, poison)


def parse_arguments():
    parser = Parser(
        prog="badnet.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", metavar="NAME", nargs="*", help=f"a net of the zoo: {', '.join(ZOO)}")
    add("--all", action="store_true", help="every net of the zoo")
    add("--size", choices=SIZES, default=SIZES[0], help="what the next eight are (default: demo)")
    for name, (help, *values) in SETTINGS.items():
        least = {"people": len(faces.TRIGGERS), "seed": 0}.get(name, 1)
        add(
            "--" + name.replace("_", "-"),
            metavar="N",
            type=at_least(least, int, most=100_000),
            help=f"{help} (default: {', '.join(map(' '.join, zip(SIZES, map(str, values))))})",
        )
    help = f"for {OPTIMISED}: the net, pixels 0..1, to find the trigger on (default: trains one)"
    add("--surrogate", metavar="FILE", type=files.require_file, help=help)
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
    sys.exit(run_command(main))
