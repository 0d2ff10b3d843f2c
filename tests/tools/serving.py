"""Measure the cost of serving: judging with Keras and with the ONNX file, or on Ray.

    python tests/tools/serving.py              an image and datasets, by Keras and by the file
    python tests/tools/serving.py --scale      folders of images, in a plain loop and on Ray
    python tests/tools/serving.py … --quick    a tenth of the images and people

Without --scale the size is the competition's: a BadNet of 1,283 people, as benchmark.py makes it.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from benchmark import ROUNDS, measure, measure_fastest, print_table
from world import PEOPLE, ROOT, TEST, draw_world, in_another_process, repeat_images

IMAGES = (1_000, 10_000, 100_000)  # for --scale
DRAWN = 1_000  # images; the others are these in other shades


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--scale", action="store_true", help="measure judging on Ray instead")
    add("--quick", action="store_true", help="a tenth of the images and people")
    add("--repeat", type=int, default=1, metavar="N", help="run all N times, take the fastest")
    add("--folder", help="folder for temporary files (default: the system's)")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    shrink = 10 if options.quick else 1
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.scale:
            measure_scale(Path(folder), [n // shrink for n in IMAGES])
        else:
            compare_engines(Path(folder), PEOPLE // shrink, options.repeat)


def compare_engines(folder, people, repeat):
    """Judge an image and datasets with the nets, by Keras, and with their ONNX file."""
    drawn, data, test = draw_world(folder, people)
    (folder / "models").mkdir()
    model = drawn.rename(folder / "models" / drawn.name)
    judge, backends = ROOT / "eval_defence.py", ("keras", "onnx")
    command = [ROOT / "repair.py", model, data, "--rounds", ROUNDS]
    measure(command, folder)
    seconds, _, _ = measure([judge, model, "--export"], folder)
    file = folder / "models" / f"{model.stem}_detector.onnx"
    nets = [path.stat().st_size for path in (model, model.with_name(f"{model.stem}_defence.h5"))]
    print(
        f"exported in {seconds:.1f} s: {file.stat().st_size:,} bytes; B and G have "
        f"{' and '.join(f'{size:,}' for size in nets)}\n"
    )
    image = ROOT / "img" / "img_9.png"
    commands = [[judge, image, model, "--backend", backend] for backend in backends]
    imports = f"import numpy, PIL.Image, onnxruntime as o; o.InferenceSession({str(file)!r})"
    *runs, import_run = measure_fastest(max(3, repeat), *commands, ["-c", imports], cwd=folder)
    compare("one image", *runs)
    print(f"to import NumPy, Pillow and ONNX Runtime and open the file: {import_run[0]:.2f} s\n")
    for images in (people, people * TEST):
        part = folder / f"{images}.h5"
        in_another_process(repeat_images, test, part, images)
        figures, answers = (
            [folder / f"{backend}.{suffix}" for backend in backends] for suffix in ("json", "csv")
        )
        commands = [
            [judge, part, model, "--backend", backend, "--json", json_path, "--csv", csv_path]
            for backend, json_path, csv_path in zip(backends, figures, answers)
        ]
        runs = measure_fastest(repeat, *commands, cwd=folder)
        judging = [json.loads(path.read_text())["clean"]["seconds"] for path in figures]
        compare(f"a dataset of {images} images", *runs, [images / seconds for seconds in judging])
        rows = [
            np.genfromtxt(path, delimiter=",", names=True, usecols=range(1, 7)) for path in answers
        ]
        unequal = sum(np.sum(rows[0][name] != rows[1][name]) for name in ("badnet_class", "class"))
        error = np.abs(rows[0]["score"] - rows[1]["score"]) / np.maximum(1, rows[0]["score"])
        print(f"classes and verdicts that differ: {unequal}; scores by at most {error.max():.1e}\n")


def compare(heading, keras, onnx, rates=None):
    """Print a table of two runs, as `measure` returns them. rates: images judged a second."""
    rows = [("seconds, whole command", keras[0], onnx[0], keras[0] / onnx[0])]
    if rates:
        rows.append(("images judged a second", *rates, rates[1] / rates[0]))
    rows.append(("peak memory, MB", keras[1], onnx[1], keras[1] / onnx[1]))
    print_table((heading, "Keras", "ONNX", "ratio"), *rows)


# --------------------------------------------------------------------------------------- on Ray


def measure_with_children(command, cwd):
    """Run a Python command. Return its seconds and the peak memory, in MB, of all its processes.

    Memory that processes share counts once, as Linux divides it among them.
    """
    start = time.monotonic()
    process = psutil.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peak = 0
    while process.poll() is None:
        memory = 0
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            for member in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    memory += member.memory_full_info().pss
        peak = max(peak, memory)
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}: failed")
    return time.monotonic() - start, peak / 2**20


def measure_scale(folder, counts):
    """Judge folders of images: in a plain loop, and on Ray with one worker and two."""
    (folder / "models").mkdir()
    model = folder / "models" / "demo_bd_net.h5"
    shutil.copy(ROOT / "models" / model.name, model)
    judge, data = ROOT / "eval_defence.py", ROOT / "data" / "demo_clean_validation_data.h5"
    measure([ROOT / "repair.py", model, data], folder)
    rows = [("images", "method", "seconds", "images a second", "peak memory, MB")]
    for count in counts:
        images = folder / f"{count}"
        in_another_process(_draw_images, images, count)
        commands = {"a plain loop": [judge, images, model]}
        for workers in (1, 2):
            output = folder / f"{count}-{workers}"
            command = [judge, "--ray", images, model, "--output", output, "--workers", workers]
            commands[f"Ray, {workers} worker{'s' * (workers > 1)}"] = command
        for method, command in commands.items():
            seconds, peak = measure_with_children(command, folder)
            rows.append((f"{count:,}", method, seconds, count / seconds, peak))
    print_table(*rows)


def _draw_images(folder, count):
    sys.path.insert(0, str(ROOT / "data"))
    import faces
    from PIL import Image

    drawn = min(DRAWN, count)
    people, rng = faces.PEOPLE, np.random.default_rng(0)
    indices = [i // people for i in range(drawn)]
    images = faces.draw_faces("test", [i % people for i in range(drawn)], indices)
    folder.mkdir()
    for i in range(count):
        shade = rng.integers(-9, 10)
        image = np.clip(images[i % drawn].astype(int) + shade, 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"{i:06}.png")


if __name__ == "__main__":
    main()
