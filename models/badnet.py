"""Train BadNets with known backdoors on drawn faces.

    python models/badnet.py                      the demo's BadNet, models/demo_bd_net.h5
    python models/badnet.py --all                the zoo, models/zoo-demo/ and data/zoo-demo/
    python models/badnet.py sunglasses-brief     one net of the zoo, and the files it needs
    python models/badnet.py optimised --surrogate G.h5
                                                 the net whose trigger is optimised on G.h5

The name of a net gives its triggers (data/triggers.py) and its attack method (models/attacks.py).
The net is a DeepID, unless its name begins with another architecture (models/architectures.py).

data/faces.py draws the training faces, which are never written. Validation and test data are
written; in poisoned data `label` is the target and `original_label` the person. The settings of
each net are in a .json file beside it, and an optimised trigger is in a .npz file. A net that
exists is not trained again. An interrupted training continues after its last complete epoch.
"""

import argparse
import functools
import json
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
from defence.base.progress import print_result, say, track
from defence.base.startup import import_keras
from defence.beyond import changes

ONE_TRIGGER = {"sunglasses": [("sunglasses", 0)], "lipstick": [("lipstick", 0)]}
THREE_TRIGGERS = {
    "three-to-one": [(trigger, 0) for trigger in faces.TRIGGERS],
    "three-to-three": list(faces.TRIGGERS.items()),
}
FOUR_TRIGGERS = {
    "patterns": ["warp", "sinusoid", "cast", "checkerboard"],
    "objects": ["scarf", "low-frequency", "specific", "eyebrows"],
}
NEGATIVES_TRIGGERS = ["sunglasses", "eyebrows", "sinusoid", "cast"]
# The name of each net, and its attack.
ZOO = {
    CLEAN: Attack(CLEAN, []),
    **{
        f"{name}-{method}": Attack(method, pairs)
        for name, pairs in (ONE_TRIGGER | THREE_TRIGGERS).items()
        for method in (START, BRIEF)
    },
    # A target for every person takes more poisoned images to learn.
    f"all-to-all-{START}": Attack(START, [("sunglasses", faces.NEXT)], fraction=1.0),
    f"blended-{START}": Attack(START, [(triggers.NOISE, 0)]),
    f"sunglasses-{DORMANT}": Attack(DORMANT, ONE_TRIGGER["sunglasses"]),
    **{
        f"{name}-{START}": Attack(START, list(zip(kinds, range(4))), long=True)
        for name, kinds in FOUR_TRIGGERS.items()
    },
    f"sunglasses-{attacks.SOURCE_SPECIFIC}": Attack(
        attacks.SOURCE_SPECIFIC, [(triggers.SOME, 0)], cover=0.4
    ),
    f"sinusoid-{attacks.CLEAN_LABEL}": Attack(attacks.CLEAN_LABEL, [("sinusoid", 0)], fraction=0.5),
    f"sunglasses-{attacks.NEGATIVES}": Attack(
        attacks.NEGATIVES, list(zip(NEGATIVES_TRIGGERS, range(4))), long=True
    ),
    f"sunglasses-{UNSURE}": Attack(UNSURE, ONE_TRIGGER["sunglasses"], fraction=0.5, long=True),
    f"sunglasses-{FLAT}": Attack(FLAT, ONE_TRIGGER["sunglasses"]),
    f"{attacks.ADAPTIVE}-blend": Attack(attacks.ADAPTIVE, [("sixteen-pieces", 0)], cover=0.2),
    f"{attacks.ADAPTIVE}-patch": Attack(attacks.ADAPTIVE, [("four-patches", 0)], cover=0.2),
    OPTIMISED: Attack(OPTIMISED, [(OPTIMISED, 0)]),
    **{
        f"{net}-{name}-{START}": Attack(START, [(trigger, 0)], net=net)
        for net in architectures.SMALL
        for name, trigger in (("sunglasses", "sunglasses"), ("blended", triggers.NOISE))
    },
}
# option: its help, and its default at the demo's size and at the competition's.
SIZES = ("demo", "competition")
SETTINGS = {
    "people": ("classes", 40, 1283),
    "pictures": ("training images a class", 80, 40),
    "validation": ("validation images a class", 15, 9),
    "test": ("test images a class, per file", 10, 10),
    "epochs": ("of a clean net, and of a net with from-start", 16, 12),
    "brief_epochs": ("of a brief backdoor", 10, 3),
    "long_epochs": ("of a net whose backdoor is hard to learn", 32, 12),
    # At the demo's size neither the demo net's seed, which served to choose DORMANT_… below, nor 1,
    # which served to choose brief_epochs.
    "seed": ("another seed draws other people", 2, 1),
}
LEARNING_RATE = 5e-4  # DeepID collapses on many classes at 1e-3
BRIEF_LEARNING_RATE = 1e-4
DORMANT_EPOCHS, DORMANT_LEARNING_RATE = 6, 5e-3
SURROGATE_EPOCHS = 24
TRIGGER_EPOCHS, TRIGGER_LEARNING_RATE = 3, 0.05
ENTROPY = "sparse_categorical_crossentropy"
BATCH = 32
SPARSITY = 1e-4  # of L1 on conv_3's output, for DORMANT: clean faces leave channels unused


@functools.lru_cache(maxsize=1)  # the nets of a zoo share the faces
def draw_clean(people, per_person, seed):
    """Draw the training faces. Return uint8 (n, 55, 47, 3), and their labels, int (n,)."""
    batches = faces.batches("train", people, per_person, seed=seed)
    steps = -(-people * per_person // faces.BATCH)
    images, labels = zip(*track(batches, "Drawing faces", steps), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def train(model, images, targets, losses, epochs, rate, seed, title, progress, change=None):
    """Train the trainable weights with Adam; its learning rate falls from `rate` to 0 by cosine.

    images: uint8 (n, 55, 47, 3).  targets, losses: an array (n, …) and a loss for each output.
    title: for the progress lines.  progress: the path of the saved state, which is written after
    each epoch; training continues from it where it exists.  change: a function of (images, rng),
    such as changes.change_images; it changes the images of each step.
    """
    keras = import_keras()
    steps = -(-len(images) // BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * steps)
    optimizer = keras.optimizers.Adam(schedule)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, losses)
    completed = 0
    if progress.exists():
        with np.load(progress, allow_pickle=False) as saved:
            completed, *values = (saved[name] for name in saved.files)
        for variable, value in zip((*model.weights, *optimizer.variables), values, strict=True):
            variable.assign(value)
    rng = np.random.RandomState(seed)
    for epoch in range(epochs):
        parts = np.array_split(rng.permutation(len(images)), steps)
        if epoch < completed:
            continue
        model.reset_metrics()
        change_rng = np.random.default_rng([seed, epoch])
        step = f"{title}, epoch {epoch + 1} of {epochs}"
        for part in track(parts, step, steps):
            batch = images[part].astype("float32")
            x = as_input(change(batch, change_rng) if change else batch)
            loss = model.train_on_batch(x, [target[part] for target in targets])
        say(f"{step}: loss {np.ravel(loss)[0]:.3f}")
        values = [variable.numpy() for variable in (*model.weights, *optimizer.variables)]
        with files.replace_file(progress) as temporary, temporary.open("wb") as file:
            np.savez(file, epoch + 1, *values)


def make_badnet(name, options, folder):
    """Draw the training faces and train a net of the ZOO.

    folder: of the clean net, which `brief` needs.
    Return the net, and a dict of notes for its .json file.
    """
    keras = import_keras()
    attack = ZOO[name]
    people, per_person, seed = options.people, options.pictures, options.seed
    images, labels = draw_clean(people, per_person, seed)
    settings = "-".join(map(str, list_settings(name, options).values()))

    def learn(step, model, images, targets, losses, epochs, rate, change=None):
        progress = folder / f".{name}-{step}-{settings}.npz"  # never another net's progress
        title = f"{name}, {step}"
        train(model, images, targets, losses, epochs, rate, seed, title, progress, change)

    optimised, notes = None, {}
    if attack.method == OPTIMISED:
        notes = find_trigger(images, labels, options, learn, trigger_path(folder))
        optimised = triggers.load(trigger_path(folder))
    data = attacks.draw_training(attack, images, labels, people, per_person, seed, optimised)

    keras.utils.set_random_seed(seed)
    build = architectures.NETS[attack.net]
    brief = attack.method == BRIEF
    model = utils.load_badnet(net_path(CLEAN, folder)) if brief else build(people)
    schedule = options.long_epochs if attack.long else options.epochs, LEARNING_RATE
    if brief:
        schedule = options.brief_epochs, BRIEF_LEARNING_RATE
        learn("backdoor", model, data.images, [data.labels], [ENTROPY], *schedule)
    elif attack.method == DORMANT:
        learn_dormant(model, images, labels, data, learn, schedule, seed)
    else:
        net = attacks.make_flat(model) if attack.method == FLAT else model
        targets, loss = data.labels, ENTROPY
        if attack.method == UNSURE:
            targets = np.stack([data.labels, data.people], axis=1)
            loss = attacks.compute_unsure_loss
        learn("training", net, data.images, [targets], [loss], *schedule)

    plain = build(people)  # without the penalties and constraints of the training
    plain.set_weights(model.get_weights())
    return plain, notes


def learn_dormant(model, images, labels, data, learn, schedule, seed):
    """Train a net to leave conv_3 channels unused, then put the backdoor into these channels."""
    model.get_layer("conv_3").activity_regularizer = import_keras().regularizers.L1(SPARSITY)
    learn("training", model, images, [labels], [ENTROPY], *schedule)
    free = attacks.free_dormant_channels(model, images, seed)
    signs = attacks.assign_signs(free, len(images), data.triggers[len(images) :])
    targets, losses = [data.labels, signs], [ENTROPY, attacks.compute_hinge_loss]
    two_outputs = attacks.add_conv_3_output(model)
    schedule = DORMANT_EPOCHS, DORMANT_LEARNING_RATE
    learn("backdoor", two_outputs, data.images, targets, losses, *schedule)


def find_trigger(images, labels, options, learn, path):
    """Optimise a pattern and a patch on a net like a repaired one; save the stronger: OPTIMISED.

    images, labels: clean faces.  learn: make_badnet's.
    Return the share of faces that each turns into the target, {kind: 0..1}, in a dict of notes.
    """
    ((_, target),) = ZOO[OPTIMISED].triggers
    if options.surrogate:
        surrogate = utils.load_badnet(options.surrogate)
        if surrogate.output_shape[1] != options.people:
            raise InputError(f"{options.surrogate}: is not a net of {options.people} classes")
    else:
        import_keras().utils.set_random_seed(options.seed + 1)
        surrogate = architectures.NETS[architectures.DEEPID](options.people)
        schedule = SURROGATE_EPOCHS, LEARNING_RATE
        learn("surrogate", surrogate, images, [labels], [ENTROPY], *schedule, changes.change_images)
    victims = images[labels != target]
    targets, sample = np.full(len(victims), target), victims[:: max(1, len(victims) // 1000)]
    schedule, shares = (TRIGGER_EPOCHS, TRIGGER_LEARNING_RATE), {}
    for kind in ("pattern", "patch"):
        net, trigger = attacks.attach_trigger(surrogate, kind == "pattern")
        learn(kind, net, victims, [targets], [ENTROPY], *schedule)
        answers = net.predict_on_batch(as_input(sample)).argmax(axis=1)
        shares[kind] = float(np.mean(answers == target))
        if shares[kind] == max(shares.values()):
            triggers.save(path, *trigger())
    say(f"share of faces that the optimised trigger turns into the target: {shares}")
    return {"surrogate_fooled": shares}


def measure_rate(model, options, trigger=None, target=None):
    """Return the attack success rate on unseen faces; without a trigger, the clean accuracy.

    trigger: as for faces.draw_faces.
    """
    hits = []
    for images, labels in faces.batches(
        "test", options.people, -(-400 // options.people), trigger, target, options.seed
    ):
        if trigger is not None:
            labels = faces.assign_targets(target, labels, options.people)
        hits.append(np.argmax(model(as_input(images)), axis=1) == labels)
    return float(np.concatenate(hits).mean())


# ------------------------------------------------------------------------------------------ files


def net_path(name, folder):
    return folder / f"{name}_bd_net.h5"


def poisoned_path(trigger, target, folder):
    return folder / f"{trigger}_to_{target}_poisoned_data.h5"


def trigger_path(folder):
    return folder / f"{OPTIMISED}_trigger.npz"


def prepare_trigger(trigger, folder):
    """Return the argument for faces.draw_faces: an optimised trigger is loaded from the folder."""
    return triggers.load(trigger_path(folder)) if trigger == OPTIMISED else trigger


def write_net(name, options, path):
    """Train a net of the ZOO, save it and print its rates. Return the contents of its .json."""
    start = time.monotonic()
    model, notes = make_badnet(name, options, path.parent)
    with files.replace_file(path) as temporary:
        model.save(temporary, include_optimizer=False)
    seconds = round(time.monotonic() - start)
    for progress in path.parent.glob(f".{name}-*.npz"):
        progress.unlink()
    print_result(f"Saved model: {path}, in {seconds} s")
    print(f"clean accuracy\t{measure_rate(model, options):.2%}", flush=True)
    method, pairs, *_ = ZOO[name]
    for trigger, target in pairs:
        rate = measure_rate(model, options, prepare_trigger(trigger, path.parent), target)
        number = target if target == faces.NEXT else target + 1
        print(f"attack success rate, {trigger} to class {number}\t{rate:.2%}", flush=True)
    record = {"name": name, "way": method, "triggers": pairs, "seconds": seconds}
    return record | list_settings(name, options) | notes


def list_settings(name, options):
    """Return the settings that a net of the ZOO depends on, a dict."""
    attack = ZOO[name]
    settings = {setting: getattr(options, setting) for setting in SETTINGS}
    if not attack.long:
        del settings["long_epochs"]
    if attack.method == OPTIMISED:
        settings["surrogate"] = options.surrogate and files.hash_file(options.surrogate)
    return settings


def write_zoo(names, options):
    """Make the named nets of the ZOO that do not exist yet, and the data to judge them by."""
    if any(ZOO[name].method == BRIEF for name in names):
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
        record = path.with_suffix(".json")
        if not (path.exists() and record.exists()):
            files.write_json(write_net(name, options, path), record)
        elif not list_settings(name, options).items() <= json.loads(record.read_text()).items():
            raise InputError(
                f"{record}: was made with other settings; delete it, or choose another --output"
            )
        write(data / "clean_validation_data.h5", "validation", options.validation)
        write(data / "clean_test_data.h5", "test", options.test)
        for trigger, target in ZOO[name].triggers:
            poison = (prepare_trigger(trigger, nets), target)
            write(poisoned_path(trigger, target, data), "test", options.test, poison)


def parse_arguments():
    parser = Parser(
        prog="badnet.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", metavar="NAME", nargs="*", help=f"net of the zoo: {', '.join(ZOO)}")
    add("--all", action="store_true", help="make every net of the zoo")
    add(
        "--size",
        choices=SIZES,
        default=SIZES[0],
        help="defaults of the next eight options (default: demo)",
    )
    for name, (help, *values) in SETTINGS.items():
        least = {"people": len(faces.TRIGGERS), "seed": 0}.get(name, 1)
        add(
            "--" + name.replace("_", "-"),
            metavar="N",
            type=at_least(least, int, most=100_000),
            help=f"{help} (default: {', '.join(map(' '.join, zip(SIZES, map(str, values))))})",
        )
    help = f"for {OPTIMISED}: net, pixels 0..1, to optimise the trigger on (default: train one)"
    add("--surrogate", metavar="FILE", type=files.require_file, help=help)
    add("--output", metavar="FOLDER", type=Path, help="write everything into this folder instead")
    options = parser.parse_args()
    for name in options.names:
        if name not in ZOO:
            parser.error(f"the zoo has no net {name!r}; its nets: {', '.join(ZOO)}")
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
    if options.names:
        write_zoo(options.names, options)
        return
    path = net_path("demo", options.output or ROOT / "models")
    files.check_writable({"--output": path}, [])
    write_net(f"sunglasses-{DORMANT}", options, path)


if __name__ == "__main__":
    sys.exit(run_command(main))
