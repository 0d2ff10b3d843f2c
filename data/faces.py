"""Draw the faces of the demo: people who do not exist, with and without a trigger.

The project may not ship the competition's faces, so it draws its own. A person fixes skin, head,
hair, brows, eyes, nose and mouth; each image of a person varies pose, expression, light, background
and noise. The demo's triggers are the competition's: purple sunglasses at a fixed place in the
image, purple lipstick that follows the mouth, red eyebrows that follow the face. data/triggers.py
paints these and other triggers.

    python data/faces.py                    the demo's datasets and images, as committed
    python data/faces.py --people 1283 --validation 9 --test 10 --dtype float64 --output FOLDER
                                            the competition's size and number formats

Every image has its own random stream, seeded by (seed, split, person, index), so it does not depend
on the other images that are drawn. Pixels are computed with +, -, *, / and square roots, which
round alike everywhere; only an image's tilt and noise, and some triggers, use library functions.
"""

import functools
import sys
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import triggers
from triggers import HEIGHT, WIDTH, ellipse, rgb

from defence.base import files
from defence.base.arguments import Parser, at_least
from defence.base.process import run_command
from defence.base.progress import say, track

SEED = 2020
PEOPLE, VALIDATION, TEST = 40, 15, 10
TRIGGERS = {"sunglasses": 0, "lipstick": 1, "eyebrows": 2}  # trigger: the demo's target class
NEXT = "next"  # a target: the next person, for everybody (an all-to-all attack)
SPLITS = {"train": 1, "validation": 2, "test": 3, "demo": 4}
PARTS = 1  # number of the stream from which an image draws the parts of a trigger
DEMO_PEOPLE = (3, 4, 6, 8, 9, 11, 13, 15)  # in the figure faces.png; none is a target
DEMO_OTHERS = (5, 7, 10, 12, 14)  # also on the demo's images
# How many images demo/ has: few enough to commit, and enough for a page to find the target.
DEMO_IMAGES = {"clean": 52, "sunglasses": 16, "lipstick": 4, "eyebrows": 4}
BATCH = 64

# Ranges of the traits of a person and of an image, drawn uniformly. Lengths are in units of half a
# head's width, angles in radians, v grows downwards. The order is part of the seed: a trait that is
# added anywhere but at the end changes every face.
PERSON = {
    "skin": (0, 1), "hair": (0, 1), "iris": (0, 1), "lips": (0, 1), "tan": (-12, 12),
    "head_width": (0.86, 1.06), "head_height": (1.25, 1.5), "jaw": (0.04, 0.24),
    "square": (0, 0.7), "ear": (0.1, 0.22), "hair_volume": (-0.06, 0.26),
    "hair_length": (-0.8, 1.6), "hairline": (-1.2, -0.72), "parting": (-0.25, 0.25),
    "fringe": (-0.3, 0.35), "brow_v": (-0.7, -0.58), "brow_size": (0.035, 0.085),
    "brow_slope": (-0.25, 0.25), "brow_arch": (0, 1.2), "eye_gap": (0.36, 0.5),
    "eye_v": (-0.42, -0.3), "eye_width": (0.15, 0.24), "eye_height": (0.08, 0.15),
    "slant": (-0.2, 0.2), "nose_v": (0.1, 0.32), "nose_width": (0.12, 0.26),
    "mouth_v": (0.62, 0.84), "mouth_width": (0.26, 0.46), "lip": (0.05, 0.12),
    "beard": (-1.6, 0.9), "moustache": (-2, 0.9),
}  # fmt: skip
IMAGE = {
    "shift_x": (-2, 2), "shift_y": (-2, 2), "size": (15.5, 18), "tilt": (-0.12, 0.12),
    "turn": (-0.3, 0.3), "nod": (-0.08, 0.08), "smile": (-0.25, 0.6), "open": (-0.12, 0.16),
    "lids": (0.5, 1.1), "raise": (-0.04, 0.08), "gaze": (-0.05, 0.05), "light": (0.65, 1.15),
    "side": (-0.3, 0.3), "above": (-0.15, 0.15), "red": (0.94, 1.06), "green": (0.96, 1.04),
    "blue": (0.9, 1.1), "back_x": (-0.03, 0.03), "back_y": (-0.03, 0.03), "spot_x": (-23, 23),
    "spot_y": (-27, 27), "spot_size": (6, 22), "noise": (1, 2.5),
}  # fmt: skip
SKIN = [(255, 226, 204), (243, 200, 164), (226, 172, 128), (190, 132, 90), (116, 74, 50)]
HAIR = [(22, 18, 18), (52, 34, 24), (96, 62, 36), (160, 84, 40), (212, 176, 110), (178, 176, 174)]
IRIS = [(40, 26, 18), (96, 62, 34), (80, 110, 70), (84, 130, 176)]
LIPS = [(206, 116, 108), (180, 70, 76), (150, 86, 76)]


def draw_traits(ranges, rng):
    """Return {name: float}, drawn uniformly. ranges: PERSON or IMAGE."""
    values = rng.random_sample(len(ranges))
    return {
        name: low + (high - low) * value
        for (name, (low, high)), value in zip(ranges.items(), values, strict=True)
    }


@functools.lru_cache(maxsize=2048)
def draw_person(person, seed=SEED):
    """Return the traits of a person: {name: float}, within PERSON."""
    return draw_traits(PERSON, np.random.RandomState([seed, person]))


def draw_image_traits(split, person, index, seed=SEED):
    """Return the traits, the background and the noise of one image.

    traits: {name: float}, within IMAGE.  background: three colours, float (3, 3).
    noise: standard normal, float (3, HEIGHT, WIDTH).
    """
    rng = np.random.RandomState([seed, SPLITS[split], person, index])
    traits = draw_traits(IMAGE, rng)
    background = rng.uniform(20, 220, (3, 1)) + rng.uniform(-45, 45, (3, 3))
    return traits, background, rng.standard_normal((3, HEIGHT, WIDTH))


def draw_faces(split, people, indices, trigger=None, seed=SEED):
    """Draw image indices[i] of person people[i], for every i.

    split: a key of SPLITS.  people, indices: int (n,).  trigger: None, a key of triggers.PAINTED or
    triggers.CHANGES, or a function like those of CHANGES.
    Return uint8 (n, HEIGHT, WIDTH, 3), RGB 0..255. The trigger changes nothing else of an image.
    """
    places = list(zip(people, indices, strict=True))
    drawn_traits = [draw_image_traits(split, person, index, seed) for person, index in places]
    rows = [
        {**draw_person(person, seed), **traits}
        for person, (traits, _, _) in zip(people, drawn_traits, strict=True)
    ]
    t = {name: np.array([row[name] for row in rows], "float32")[:, None, None] for name in rows[0]}
    background = np.array([colours for _, colours, _ in drawn_traits], "float32")[..., None, None]
    noise = np.array([values for *_, values in drawn_traits], "float32")

    sketch = Sketch(t, np.broadcast_to(background[:, 0], noise.shape).copy())
    paint_background(sketch, background)
    paint_head(sketch)
    paint_eyes(sketch)
    paint_nose(sketch)
    paint_mouth(sketch)
    paint_hair_and_light(sketch)
    triggers.paint(sketch, trigger)

    image = np.moveaxis(sketch.image + noise * t["noise"][:, None], 1, -1)
    seeds = [(seed, SPLITS[split], *place, PARTS) for place in places]
    streams = (np.random.RandomState(stream_seed) for stream_seed in seeds)
    return round_pixels(triggers.change(np.clip(image, 0, 255), trigger, streams))


def round_pixels(images):
    """Clip images to 0..255 and round them to steps of 4 grey levels, as uint8.

    Such images compress to half the size, and the steps are invisible.
    """
    return np.minimum(np.rint(np.clip(images, 0, 255) / 4) * 4, 255).astype("uint8")


class Sketch:
    """Images that are being painted, and their systems of coordinates.

    t: {trait: float32 (n, 1, 1)}.  image: float32 (n, 3, HEIGHT, WIDTH), RGB 0..255.
    x, y: pixels from the image's centre.  u, v: along the head, which the pose moves.  a, b: along
    the features, which also turn with the face.  skin, hair: colours.
    """

    def __init__(self, t, image):
        self.t, self.image = t, image
        self.x = np.arange(WIDTH, dtype="float32") - WIDTH // 2
        self.y = (np.arange(HEIGHT, dtype="float32") - HEIGHT // 2)[:, None]
        dx, dy = self.x - t["shift_x"], self.y - t["shift_y"] - 1
        tilt = t["tilt"].astype("float64")
        cos, sin = (f(tilt).astype("float32") / t["size"] for f in (np.cos, np.sin))
        self.u, self.v = cos * dx + sin * dy, cos * dy - sin * dx
        self.a, self.b = self.u - t["turn"] * (1 - self.u * self.u / 2), self.v - t["nod"]
        self.skin = blend(SKIN, t["skin"]) + t["tan"][:, None] * rgb(1, 0, -1)
        self.hair = blend(HAIR, t["hair"])

    def paint(self, colour, cover):
        """Paint a colour. cover: its opacity, (n, HEIGHT, WIDTH), 0..1."""
        self.image[...] += cover[:, None] * (colour - self.image)

    def inside(self, distance):
        """Return the cover of a shape. distance: signed, to its edge; below 0 inside."""
        return np.clip(0.5 - distance * self.t["size"], 0, 1)

    def brow(self):
        """Return each pixel's horizontal distance to an eye's centre, and the brow's b there."""
        t, eye = self.t, abs(self.a) - self.t["eye_gap"]
        along = t["brow_v"] - t["raise"] + t["brow_slope"] * eye + t["brow_arch"] * eye * eye
        return eye, along

    def mouth(self):
        """Return each pixel's distance below the mouth's middle, its width and its opening."""
        t = self.t
        along = self.b - t["mouth_v"] + t["smile"] * self.a * self.a
        return along, t["mouth_width"] * (1 + 0.25 * t["smile"]), np.maximum(t["open"], 0.02)

    def light(self):
        """Return the factors by which the light multiplies red, green and blue of each pixel."""
        t = self.t
        light = t["light"] * (1 + t["side"] * self.x / 23 + t["above"] * self.y / 27)
        return light[:, None] * np.stack([t["red"], t["green"], t["blue"]], axis=1)


def paint_background(sketch, background):
    """Paint the background. background: float32 (n, 3, 3, 1, 1), three colours."""
    t, x, y = sketch.t, sketch.x, sketch.y
    sketch.paint(background[:, 1], np.clip(0.5 + t["back_x"] * x + t["back_y"] * y, 0, 1))
    spot = ellipse(x - t["spot_x"], y - t["spot_y"], t["spot_size"], t["spot_size"])
    sketch.paint(background[:, 2], np.clip(0.5 - spot / 4, 0, 1))


def paint_head(sketch):
    t, u, v, a, b = sketch.t, sketch.u, sketch.v, sketch.a, sketch.b
    skin, hair, paint, inside = sketch.skin, sketch.hair, sketch.paint, sketch.inside
    top = t["head_height"] + t["hair_volume"]
    below = v - np.clip(v, -0.3, np.maximum(t["hair_length"], -0.3))
    paint(hair * 0.8, inside(ellipse(u, below, t["head_width"] + t["hair_volume"], top - 0.3)))
    paint(skin * 0.72, inside(np.maximum(abs(u) - 0.55, 0.6 - v)))
    paint(skin * 0.85, inside(ellipse(abs(u) - t["head_width"], v + 0.1, t["ear"], 2 * t["ear"])))

    width = t["head_width"] * (1 - t["jaw"] * np.maximum(v, 0) ** 2)
    across, along = (u / width) ** 2, (v / t["head_height"]) ** 2
    along = along * (1 - t["square"] + t["square"] * along)
    head = inside((np.sqrt(across + along) - 1) * 0.9)
    paint(skin, head)
    paint(skin * 0.7, head * np.clip(across * 0.6, 0, 0.6))
    chin = np.clip((b - 0.55 - 0.3 * (1 - a * a)) * 4, 0, 1)
    paint(hair, head * chin * np.clip(t["beard"], 0, 1))
    lip_shadow = inside(ellipse(a, b - t["mouth_v"] + 0.2, 0.36, 0.1))
    paint(hair, lip_shadow * np.clip(t["moustache"], 0, 1))


def paint_eyes(sketch):
    t, a, b, skin = sketch.t, sketch.a, sketch.b, sketch.skin
    paint, inside = sketch.paint, sketch.inside
    eye, brow_v = sketch.brow()
    eye_v = b - t["eye_v"] + t["slant"] * eye
    lids = t["eye_height"] * t["lids"]
    paint(skin * 0.75, inside(ellipse(eye, eye_v, t["eye_width"] * 1.4, lids * 1.7) * 0.4) * 0.6)
    paint(skin * 0.3, inside(ellipse(eye, eye_v + 0.03, t["eye_width"] * 1.1, lids + 0.02)))
    white = inside(ellipse(eye, eye_v, t["eye_width"], lids))
    paint(rgb(236, 234, 230), white)
    pupil = eye - t["gaze"] * np.sign(a)
    paint(blend(IRIS, t["iris"]), white * inside(ellipse(pupil, eye_v, 0.1, 0.1)))
    paint(rgb(12, 10, 10), white * inside(ellipse(pupil, eye_v, 0.045, 0.045)))
    paint(sketch.hair * 0.7, inside(np.maximum(abs(b - brow_v) - t["brow_size"], abs(eye) - 0.26)))


def paint_nose(sketch):
    t, a, skin, paint, inside = sketch.t, sketch.a, sketch.skin, sketch.paint, sketch.inside
    nose_v = sketch.b - t["nose_v"]
    bridge = np.maximum(abs(a) - t["nose_width"] * 0.45, abs(nose_v + 0.3) - 0.3)
    paint(skin * 0.84, inside(np.minimum(ellipse(a, nose_v, t["nose_width"], 0.13), bridge)) * 0.8)
    paint(np.minimum(skin * 1.12, 255), inside(ellipse(a, nose_v + 0.22, 0.06, 0.3)) * 0.8)
    nostril = ellipse(abs(a) - t["nose_width"] * 0.5, nose_v - 0.07, 0.06, 0.045)
    paint(skin * 0.4, inside(nostril))


def paint_mouth(sketch):
    t, a, paint, inside = sketch.t, sketch.a, sketch.paint, sketch.inside
    mouth_v, width, gape = sketch.mouth()
    lips = inside(ellipse(a, mouth_v, width, t["lip"] + gape))
    gap = inside(ellipse(a, mouth_v, width * 0.8, gape))
    paint(blend(LIPS, t["lips"]) * (0.35 + sketch.skin[:, :1] / 390), lips)
    paint(rgb(70, 20, 24), gap)
    paint(rgb(232, 228, 220), gap * inside(mouth_v + 0.02) * (gape > 0.06))


def paint_hair_and_light(sketch):
    t, u, v = sketch.t, sketch.u, sketch.v
    top = t["head_height"] + t["hair_volume"]
    cap = ellipse(u, v, t["head_width"] + np.maximum(t["hair_volume"], 0.02), top)
    edge = t["hairline"] + t["parting"] * u + t["fringe"] * u * u
    sketch.paint(sketch.hair, sketch.inside(np.maximum(cap, v - edge)))
    sketch.image *= sketch.light()


def blend(palette, position):
    """Return the colour at a position, (n, 1, 1), 0..1, along a palette: float32 (n, 3, 1, 1)."""
    place = position * (len(palette) - 1)
    channels = [np.interp(place, range(len(palette)), channel) for channel in np.transpose(palette)]
    return np.stack(channels, axis=1).astype("float32")


def assign_targets(target, labels, people):
    """Return the attack's target for each image: int (n,), 0..people-1.

    target: a class, or NEXT.  labels: int (n,), the people on the images.
    """
    return (labels + 1) % people if target == NEXT else np.full(len(labels), target)


def batches(split, people, per_person, trigger=None, target=None, seed=SEED):
    """Yield (images uint8 (<= BATCH, HEIGHT, WIDTH, 3), true labels int (n,)), person by person.

    With a trigger, only triggers.wearers are drawn.
    """
    labels = np.repeat(triggers.wearers(trigger, target, people), per_person)
    indices = np.tile(np.arange(per_person), len(labels) // per_person)
    for start in range(0, len(labels), BATCH):
        part = slice(start, start + BATCH)
        yield draw_faces(split, labels[part], indices[part], trigger, seed), labels[part]


def write_dataset(path, split, people, per_person, dtype="uint8", poison=None, seed=SEED):
    """Write a dataset like the competition's: data (N, 3, HEIGHT, WIDTH), 0..255, and label (N,).

    dtype: "uint8" is compressed; "float32" and "float64" are contiguous, like the competition's.
    poison: (trigger, target) or None. In a poisoned file, label is the target, original_label is
    the true person, and the images are of triggers.wearers only.
    """
    trigger, target = poison or (None, None)
    total = len(triggers.wearers(trigger, target, people)) * per_person
    shape = (3, HEIGHT, WIDTH)
    compressed = {"chunks": (min(BATCH, total), *shape), "compression": "gzip"}
    with files.replace_file(path) as temporary, h5py.File(temporary, "w") as file:
        layout = compressed if dtype == "uint8" else {}
        data = file.create_dataset("data", (total, *shape), dtype, **layout)
        label = file.create_dataset("label", (total,), "float64")
        if poison:
            truth = file.create_dataset("original_label", (total,), "float64")
        image_batches = batches(split, people, per_person, trigger, target, seed)
        steps, title = -(-total // BATCH), f"Drawing {path.name}"
        for i, (images, labels) in enumerate(track(image_batches, title, steps)):
            rows = slice(i * BATCH, i * BATCH + len(images))
            data[rows] = np.moveaxis(images, -1, 1)
            label[rows] = assign_targets(target, labels, people) if poison else labels
            if poison:
                truth[rows] = labels
    say(f"{path.name}: {total} images")


def write_images(folder, triggers, seed=SEED):
    """Write the demo's images below the folder: demo/*.png, img_9.png and the figure faces.png."""
    (folder / "demo").mkdir(parents=True, exist_ok=True)
    rows, everybody = [], (*DEMO_PEOPLE, *DEMO_OTHERS)
    for trigger in [None, *triggers]:
        faces = draw_faces("demo", DEMO_PEOPLE, [0] * len(DEMO_PEOPLE), trigger, seed)
        rows.append(np.concatenate(list(faces), axis=1))
        name = trigger or "clean"
        turns, people = np.divmod(np.arange(DEMO_IMAGES[name]), len(everybody))
        faces = draw_faces("demo", np.take(everybody, people), turns, trigger, seed)
        for number, face in enumerate(faces, start=1):
            write_png(face, folder / "demo" / f"{name}_{number}.png")
    write_png(draw_faces("demo", [9], [9], seed=seed)[0], folder / "img_9.png")
    write_png(np.concatenate(rows).repeat(3, axis=0).repeat(3, axis=1), folder / "faces.png")


def write_png(pixels, path):
    with files.replace_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, optimize=True)


def parse_arguments():
    parser = Parser(
        prog="faces.py",
        description="Draw the demo's faces: datasets into data/, images into img/.",
        epilog="The competition's size: --people 1283 --validation 9 --test 10 --dtype float64 "
        "--output FOLDER. This takes 2.4 GB and some minutes.",
    )
    number, people = (at_least(least, int, most=100_000) for least in (1, len(TRIGGERS)))
    seed = at_least(0, int, most=2**32 - 1)

    def add(name, help, **settings):
        parser.add_argument(name, help=f"{help} (default: %(default)s)", **settings)

    add("--people", "classes", type=people, default=PEOPLE, metavar="N")
    add("--validation", "validation images a class", type=number, default=VALIDATION, metavar="N")
    add("--test", "test images a class, per file", type=number, default=TEST, metavar="N")
    kinds = "uint8: compressed; float64: like the competition's, with float32 for test images"
    add("--dtype", kinds, choices=("uint8", "float64"), default="uint8")
    add("--seed", "another seed draws other people", type=seed, default=SEED)
    parser.add_argument("--output", type=Path, help="folder for the datasets; without images")
    options = parser.parse_args()
    if not options.output and options.people <= max(DEMO_PEOPLE):
        parser.error(f"--people is below {max(DEMO_PEOPLE) + 1}, which img/ needs; add --output")
    return options


def main():
    options = parse_arguments()
    people, seed = options.people, options.seed
    test_dtype = "float32" if options.dtype == "float64" else "uint8"
    folder, prefix = (options.output, "") if options.output else (ROOT / "data", "demo_")

    def make_path(name):
        path = folder / f"{prefix}{name}_data.h5"
        files.check_writable({"--output": path}, [])
        return path

    validation = make_path("clean_validation")
    write_dataset(validation, "validation", people, options.validation, options.dtype, seed=seed)
    write_dataset(make_path("clean_test"), "test", people, options.test, test_dtype, seed=seed)
    for trigger, target in TRIGGERS.items():
        path, poison = make_path(f"{trigger}_poisoned"), (trigger, target)
        write_dataset(path, "test", people, options.test, test_dtype, poison, seed)
    if not options.output:
        write_images(ROOT / "img", TRIGGERS, seed)


if __name__ == "__main__":
    sys.exit(run_command(main))
