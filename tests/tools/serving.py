"""What serving costs: judging with Keras beside judging with the ONNX file, or on Ray.

    python tests/tools/serving.py              a picture and datasets, by Keras and by the file
    python tests/tools/serving.py --scale      folders of pictures, in a plain loop and on Ray
    python tests/tools/serving.py … --quick    a tenth of the images and people

Without --scale it is the competition's size: a BadNet of 1,283 people, as benchmark.py makes it.
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
from benchmark import ROUNDS, fastest, measure, table
from world import PEOPLE, ROOT, TEST, draw_world, in_another_process, repeat_images

PICTURES = (1_000, 10_000, 100_000)  # for --scale
DRAWN = 1_000  # of them; the others are these in other shades


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--scale", action="store_true", help="measure judging on Ray instead")
    add("--quick", action="store_true", help="a tenth of the images and people")
    add("--repeat", type=int, default=1, metavar="N", help="run all N times, take the fastest")
    add("--folder", help="where the files are put meanwhile (default: the system's)")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    shrink = 10 if options.quick else 1
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.scale:
            measure_scale(Path(folder), [n // shrink for n in PICTURES])
        else:
            compare_engines(Path(folder), PEOPLE // shrink, options.repeat)


def compare_engines(folder, people, repeat):
    """Judge with the nets, by Keras, and with their ONNX file: a picture, and datasets."""
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
    calls = [[judge, ROOT / "img" / "img_9.png", model, "--backend", each] for each in backends]
    alone = f"import numpy, PIL.Image, onnxruntime as o; o.InferenceSession({str(file)!r})"
    *runs, bare = fastest(max(3, repeat), *calls, ["-c", alone], cwd=folder)
    compare("one picture", *runs)
    print(f"to import NumPy, Pillow and ONNX Runtime and open the file: {bare[0]:.2f} s\n")
    for images in (people, people * TEST):
        part = folder / f"{images}.h5"
        in_another_process(repeat_images, test, part, images)
        figures, answers = (
            [folder / f"{each}.{end}" for each in backends] for end in ("json", "csv")
        )
        calls = [
            [judge, part, model, "--backend", backend, "--json", of_all, "--csv", of_each]
            for backend, of_all, of_each in zip(backends, figures, answers)
        ]
        runs = fastest(repeat, *calls, cwd=folder)
        judging = [json.loads(path.read_text())["clean"]["seconds"] for path in figures]
        compare(f"a dataset of {images} images", *runs, [images / each for each in judging])
        rows = [
            np.genfromtxt(path, delimiter=",", names=True, usecols=range(1, 7)) for path in answers
        ]
        apart = sum(np.sum(rows[0][name] != rows[1][name]) for name in ("badnet_class", "class"))
        error = np.abs(rows[0]["score"] - rows[1]["score"]) / np.maximum(1, rows[0]["score"])
        print(f"classes and verdicts that differ: {apart}; scores by at most {error.max():.1e}\n")


def compare(what, keras, onnx, rates=None):
    """Print a table of two runs, as `measure` gives them, and of images judged a second."""
    rows = [("seconds, whole command", keras[0], onnx[0], keras[0] / onnx[0])]
    if rates:
        rows.append(("images judged a second", *rates, rates[1] / rates[0]))
    rows.append(("peak memory, MB", keras[1], onnx[1], keras[1] / onnx[1]))
    table((what, "Keras", "ONNX", "ratio"), *rows)


# --------------------------------------------------------------------------------------- on Ray


def measure_with_children(command, cwd):
    """Run a Python command. Returns (seconds, peak memory in MB of it and all processes below it).

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
        now = 0
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    now += each.memory_full_info().pss
        peak = max(peak, now)
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}: failed")
    return time.monotonic() - start, peak / 2**20


def measure_scale(folder, counts):
    """Judge folders of pictures: in a plain loop, and on Ray with one worker and two."""
    (folder / "models").mkdir()
    model = folder / "models" / "demo_bd_net.h5"
    shutil.copy(ROOT / "models" / model.name, model)
    judge, data = ROOT / "eval_defence.py", ROOT / "data" / "demo_clean_validation_data.h5"
    measure([ROOT / "repair.py", model, data], folder)
    rows = [("pictures", "how", "seconds", "pictures a second", "peak memory, MB")]
    for count in counts:
        pictures = folder / f"{count}"
        in_another_process(_draw_pictures, pictures, count)
        ways = {"a plain loop": [judge, pictures, model]}
        for workers in (1, 2):
            output = folder / f"{count}-{workers}"
            call = [judge, "--ray", pictures, model, "--output", output, "--workers", workers]
            ways[f"Ray, {workers} worker{'s' * (workers > 1)}"] = call
        for way, call in ways.items():
            seconds, peak = measure_with_children(call, folder)
            rows.append((f"{count:,}", way, seconds, count / seconds, peak))
    table(*rows)


def _draw_pictures(folder, count):
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
