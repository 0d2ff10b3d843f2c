"""Measure how fast the commands are, compared with a plain script and with this machine's limits.

    python tests/tools/benchmark.py            the competition's size: 11,547 and 12,830 images
    python tests/tools/benchmark.py --quick    a tenth of it, in two minutes
    python tests/tools/benchmark.py --model B.h5 --data CLEAN.h5 [--test TEST.h5]    your files

It prints tables of the seconds and peak memory of tests/reference.py, the plain script, and of
repair.py and eval_defence.py, each in its own process and in turn. It says whether both have the
same outcome, and how time and memory grow with the images. The floor is the time that the job's
multiply-adds would take at the rate of this machine's matrix multiplication.

Without --model, data/faces.py draws the faces, and B is the demo's BadNet, its layers behind conv_3
trained on the validation set's people. This needs 5 GB of disk while it runs.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from world import PEOPLE, ROOT, draw_world, in_another_process, repeat_images

GROWTH = (1000, 3000, 11547, 50000)
ROUNDS = 1  # of fine-tuning, as the report's nets took
HARDEN_EPOCHS = 1, 5  # in two runs, whose difference gives an epoch's time


def main():
    options = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True)
    with contextlib.ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        shrink = 10 if options.quick else 1
        if options.model:
            model, data, test = options.model, options.data, options.test or options.data
        else:
            model, data, test = draw_world(folder, PEOPLE // shrink)
        floor = Floor(model, data)
        compare_repairs(model, data, folder, floor, options.repeat)
        measure_hardening(model, data, folder, floor)
        compare_judging(model, test, folder, options.repeat)
        compare_one_image(model, folder, max(options.repeat, 1 if options.quick else 3))
        if not options.model:
            sizes = [n // 10 for n in GROWTH[:3:2]] if options.quick else GROWTH
            measure_growth(model, data, folder, sizes)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a tenth of the images and people")
    add("--repeat", type=int, default=1, metavar="N", help="run all N times, take the fastest")
    add("--folder", help="folder for temporary files (default: the system's)")
    add("--model", type=resolve_path, help="a BadNet to repair, instead of a drawn one")
    add("--data", type=resolve_path, help="its validation set; with --model")
    add("--test", type=resolve_path, help="the dataset to judge (default: the validation set)")
    options = parser.parse_args()
    if bool(options.model) != bool(options.data):
        parser.error("--model and --data go together: give both")
    return options


def resolve_path(path):
    return Path(path).resolve()


# ------------------------------------------------------------------------------------- measuring


def measure(command, cwd=ROOT):
    """Run a Python command. Return its seconds, its peak memory in MB and its stdout."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "ORT_DISABLE_TELEMETRY": "1"}
    environment = os.environ | {"KERAS_BACKEND": "tensorflow"} | quiet
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env=environment,
            stdout=out,
            stderr=errors,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(map(str, command))}: failed\n{errors.read()}")
        out.seek(0)
        return seconds, usage.ru_maxrss / 1024, out.read()


def measure_fastest(repeat, *commands, cwd=ROOT):
    """Run commands in turn, `repeat` times. Return each command's fastest run, as `measure`."""
    rounds = [[measure(command, cwd) for command in commands] for _ in range(repeat)]
    return [min(runs, key=lambda run: run[0]) for runs in zip(*rounds)]


def print_table(*rows):
    """Print rows, the first cell aligned left, the others right; floats with 1 or 2 decimals."""

    def format_cell(cell):
        if isinstance(cell, float):
            return f"{cell:,.2f}" if cell < 10 else f"{cell:,.1f}"
        return "" if cell is None else str(cell)

    rows = [[format_cell(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *numbers = (
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))
        )
        print("  ".join([first, *numbers]))
    print()


class Floor:
    """This machine's rates, and the multiply-adds that a repair needs at least."""

    def __init__(self, model, data):
        with h5py.File(data) as file:
            self.images = len(file["data"])
        counts = in_another_process(_count_multiply_adds, model)
        self.matmul, self.trunk, self.head, self.dense, self.tuned, self.hardened = counts
        self.disk = read_rate(data)
        self.read = data.stat().st_size / self.disk
        cores = len(os.sched_getaffinity(0))
        print(
            f"\nthis machine: {cores} processors, float32 matrix multiplication at "
            f"{self.matmul / 1e9:.0f} billion multiply-adds a second, disk read at "
            f"{self.disk / 1e6:,.0f} MB/s"
        )
        print(
            f"multiply-adds an image, in millions: trunk {self.trunk / 1e6:.2f}, head "
            f"{self.head / 1e6:.2f}\n"
        )

    def seconds(self, record):
        """Return the least seconds of each step of a repair, from its record."""
        settings, accuracy = record["settings"], record["accuracy"]
        rounds = len(accuracy["after_each_round"])
        multiply_adds = {
            "features": self.trunk,
            "prune": self.head * (1 + len(accuracy["after_each_channel"])),
            # Forward, and the gradient of the weights. Once: the layer's input, and the net's
            # answers at the end.
            "retrain": settings["retrain_epochs"] * 2 * self.dense + 2 * self.head,
            "fine_tune": rounds * (settings["epochs"] * self.tuned + self.head),
        }
        least = {step: n * self.images / self.matmul for step, n in multiply_adds.items()}
        least["features"] = max(least["features"], self.read)
        return least


def _count_multiply_adds(model):
    """Return this machine's multiply-adds a second, and a net's for an image.

    The net's are: forward, of trunk, head and last Dense layer; in a step of fine-tuning the head;
    in a step of hardening.
    """
    import utils
    from defence.base.startup import import_keras
    from defence.beyond import harden, patterns
    from defence.net.split import find_last_weighted, split_net

    os.environ["TF_NUM_INTRAOP_THREADS"] = "0"  # one multiplication on all processors
    keras = import_keras()
    import tensorflow as tf

    a = tf.random.normal((2048, 2048))
    rates = []
    for _ in range(20):
        start = time.monotonic()
        tf.matmul(a, a).numpy()
        rates.append(2048**3 / (time.monotonic() - start))

    def forward(layer):
        if isinstance(layer, keras.layers.Conv2D):
            return int(np.prod(layer.output.shape[1:3]) * np.prod(layer.kernel.shape))
        return int(np.prod(layer.kernel.shape)) if isinstance(layer, keras.layers.Dense) else 0

    net = utils.load_badnet(model)
    parts = split_net(net)
    trunk, head = (sum(map(forward, part.layers)) for part in (parts.trunk, parts.head))
    # The gradients of a layer's weights and of its input each cost as much as the layer. The
    # gradient of the features is not needed.
    features = parts.trunk.output[0]

    def reads_features(layer):
        return layer.input is features or not keras.Model(features, layer.input).weights

    weighty = [layer for layer in parts.head.layers if forward(layer)]
    tuned = 3 * head - sum(map(forward, filter(reads_features, weighty)))
    # The gradient of pixels is needed only for the images that patterns are sought on.
    pattern_share = patterns.IMAGES_PER_STEP / harden.Settings().harden_batch_size
    first = forward(next(filter(forward, net.layers)))
    hardened = (3 + 2 * pattern_share) * (trunk + head) - first
    return max(rates), trunk, head, forward(find_last_weighted(parts.head)), tuned, hardened


def read_rate(path):
    """Return the bytes a second of reading a file that the system's cache has dropped."""
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.monotonic()
        while file.read(1 << 22):
            pass
        return path.stat().st_size / (time.monotonic() - start)


# ----------------------------------------------------------------------------------- comparisons


def compare_repairs(model, data, folder, floor, repeat):
    ours_json, ours_g, plain_g = folder / "ours.json", folder / "g.h5", folder / "plain_g.h5"
    plain, ours = measure_fastest(
        repeat,
        ["tests/reference.py", "repair", model, data, plain_g, ROUNDS],
        ["repair.py", model, data, "--output", ours_g, "--rounds", ROUNDS, "--json", ours_json],
    )
    record, outcome = json.loads(ours_json.read_text()), json.loads(plain[2])
    seconds, steps = record["seconds"], floor.seconds(record)
    rows = [("repair: seconds", "plain", "ours", "ratio", "floor", "× floor")]
    for step, least in steps.items():
        spent = outcome["seconds"].get(step)
        ratio = spent / seconds[step] if spent else None
        rows.append((step, spent, seconds[step], ratio, least, seconds[step] / least))
    pairs = (plain, outcome["seconds"]), (ours, seconds)
    remaining = [run[0] - sum(part.get(step, 0) for step in steps) for run, part in pairs]
    rows.append(("start, load, save", *remaining, None, None, None))
    least = sum(steps.values())
    rows.append(("whole command", plain[0], ours[0], plain[0] / ours[0], least, ours[0] / least))
    rows.append(("peak memory, MB", plain[1], ours[1], plain[1] / ours[1], None, None))
    images = floor.images
    rows.append(("images a second", images / plain[0], images / ours[0], None, None, None))
    print(f"{images} images, {data.stat().st_size:,} bytes; {ROUNDS} round of fine-tuning")
    print_table(*rows)

    accuracy = record["accuracy"]
    curve, plain_curve = np.array(accuracy["after_each_channel"]), np.array(outcome["curve"])
    same = record["pruned"] == outcome["pruned"]
    print(f"the same {len(outcome['pruned'])} channels pruned: {'yes' if same else 'NO'}")
    if len(curve) == len(plain_curve):
        apart = np.max(np.abs(curve - plain_curve)) * images
        print(f"accuracy curves apart by at most {apart:.0f} of {images} images")
    ends = 100 * outcome["rounds"][-1], 100 * accuracy["fine_tuned"]
    print("G's validation accuracy: plain {:.2f} %, ours {:.2f} %".format(*ends))
    print(f"B's: {100 * accuracy['before']:.2f} %\n")


def measure_hardening(model, data, folder, floor):
    """Measure an epoch of hardening, and compare it with its floor."""
    spent, record = [], folder / "hardened.json"
    for epochs in HARDEN_EPOCHS:
        options = ["--rounds", ROUNDS, "--harden", "--harden-epochs", epochs, "--json", record]
        measure(["repair.py", model, data, "--output", folder / "hardened.h5", *options])
        spent.append(json.loads(record.read_text())["seconds"]["harden"])
    seconds = (spent[1] - spent[0]) / (HARDEN_EPOCHS[1] - HARDEN_EPOCHS[0])
    least = floor.hardened * floor.images / floor.matmul
    print_table(
        ("hardening: seconds", "ours", "floor", "× floor"),
        ("an epoch", seconds, least, seconds / least),
    )


def compare_judging(model, test, folder, repeat):
    g, ours_json = folder / "g.h5", folder / "judged.json"
    plain, ours = measure_fastest(
        repeat,
        ["tests/reference.py", "judge", model, g, test],
        ["eval_defence.py", test, model, "--repaired", g, "--json", ours_json],
    )
    outcome, figures = json.loads(plain[2]), json.loads(ours_json.read_text())["clean"]
    b, g = np.array(outcome["b"]), np.array(outcome["g"])
    with h5py.File(test) as file:
        labels = file["label"][:]
    shares = (b == labels, g == labels, (b == g) & (b == labels), b != g)
    apart = max(
        abs(np.sum(share) - ours_share["hits"])
        for share, ours_share in zip(shares, figures["figures"].values(), strict=True)
    )
    images, judging = len(labels), (outcome["seconds"]["judge"], figures["seconds"])
    print(f"{images} images judged: two calls of `predict` on images in memory, ours from the file")
    print_table(
        ("judge a dataset", "plain", "ours", "ratio"),
        ("seconds, judging", *judging, judging[0] / judging[1]),
        ("images a second", *(images / s for s in judging), None),
        ("seconds, whole command", plain[0], ours[0], plain[0] / ours[0]),
        ("peak memory, MB", plain[1], ours[1], plain[1] / ours[1]),
    )
    print(f"the four figures of eval_defence.py apart by at most {apart:.0f} of {images} images\n")


def compare_one_image(model, folder, repeat):
    g, image = folder / "g.h5", ROOT / "img" / "img_9.png"
    plain, ours, imports, our_imports = measure_fastest(
        repeat,
        ["tests/reference.py", "judge", model, g, image],
        ["eval_defence.py", image, model, "--repaired", g],
        ["-c", "import tensorflow, keras"],
        ["-c", "from defence.base.startup import import_keras; import_keras()"],
    )
    outcome = json.loads(plain[2])
    agree = outcome["b"] == outcome["g"]
    same = not agree or int(ours[2]) == outcome["b"][0] + 1
    print(f"one image, the whole command; fastest of {repeat}")
    print_table(
        ("judge one image", "plain", "ours", "import tensorflow, keras", "… as we do"),
        ("seconds", plain[0], ours[0], imports[0], our_imports[0]),
        ("relative to the import", plain[0] / imports[0], ours[0] / imports[0], 1.0, None),
        ("peak memory, MB", plain[1], ours[1], imports[1], our_imports[1]),
    )
    print(f"the same class: {'yes' if same else 'NO'}\n")


def measure_growth(model, data, folder, sizes):
    """Repair with more and more images, the validation set's over and over."""
    rows = [("repair: images", "seconds", "ms an image", "peak MB", "KB an added image")]
    before, many = None, folder / "many.h5"
    for size in sizes:
        in_another_process(repeat_images, data, many, size)
        command = ["repair.py", model, many, "--output", folder / "g.h5", "--rounds", ROUNDS]
        seconds, peak, _ = measure(command)
        growth = (peak - before[1]) * 1024 / (size - before[0]) if before else None
        rows.append((str(size), seconds, 1000 * seconds / size, peak, growth))
        before = size, peak
    print_table(*rows)


if __name__ == "__main__":
    main()
