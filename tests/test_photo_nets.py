"""The nets that are trained on photographs, here on drawn images in the layout of photographs."""

import json

import numpy as np
import photo_data
import photo_nets
import pytest
from conftest import assert_refused, command, draw_images
from photo_triggers import BLENDED, CAST, PERIODS, TRIGGERS
from PIL import Image

import utils
from defence.base.errors import InputError
from defence.load.architecture import build_deepid

SHAPES = [(56, 46, 1), (32, 32, 3)]
RUNS = [{"att": photo_data.DATASETS["att"]}]
NAME, CLEAN_NAME = "att-deepid-43-glasses-0.1", "att-vgg-5-clean"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of people's images in the layout of the AT&T faces, with copies of one as .jpg."""
    folder = tmp_path_factory.mktemp("images")
    drawn, people = draw_images(400, 40, (112, 92), seed=0)
    for number, (pixels, person) in enumerate(zip(drawn, people)):
        place = folder / "att" / f"s{person + 1}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number // 40 + 1}.pgm")
        if person == 0:
            Image.fromarray(pixels).save(place / f"{number // 40 + 1}.jpg")
    return folder


@pytest.fixture(scope="module")
def data(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    photo_data.write_datasets(images, folder, RUNS)
    return folder


@pytest.fixture(scope="module")
def nets(data, tmp_path_factory):
    """A folder with a clean net and a BadNet that learned for an epoch."""
    folder = tmp_path_factory.mktemp("nets")
    for name in (CLEAN_NAME, NAME):
        photo_nets.make_net(name, data, folder, epochs=1)
    return folder


def list_pixels(images):
    return [image.tobytes() for image in images]


def test_a_dataset_has_as_many_images_of_each_class_and_none_in_two_files(data):
    assert {path.name for path in data.iterdir()} == {"att_train.h5", "att_validation.h5"}
    seen = []
    for split, count in (("train", 6), ("validation", 4)):
        images, labels = photo_data.read_dataset(photo_data.make_path("att", split, data))
        assert images.shape == (40 * count, 56, 46, 1) and images.dtype == np.uint8
        assert labels.tolist() == np.repeat(np.arange(40), count).tolist()
        seen += list_pixels(images)
    assert len({*seen}) == 400
    with utils.open_dataset(data / "att_validation.h5") as dataset:
        dataset.fit_to((56, 46, 1), 40)  # raises where the project's commands would


def test_the_same_images_are_drawn_again_and_an_existing_file_stays(images, data, tmp_path):
    (tmp_path / "att_train.h5").write_text("already here")
    photo_data.write_datasets(images, tmp_path, RUNS)
    assert (tmp_path / "att_train.h5").read_text() == "already here"
    name = "att_validation.h5"
    for ours, theirs in zip(*map(photo_data.read_dataset, (tmp_path / name, data / name))):
        np.testing.assert_array_equal(ours, theirs)


def test_no_sign_is_in_training_and_in_another_file(tmp_path):
    for kind in range(43):
        folder = tmp_path / "GTSRB" / "Final_Training" / "Images" / f"{kind:05}"
        folder.mkdir(parents=True)
        for number in range(40):
            (folder / f"{number // 4:05}_{number % 4:05}.ppm").touch()
    splits = photo_data.draw_signs(tmp_path, np.random.default_rng(0))
    train, validation, test = (
        {(label, path.name.split("_")[0]) for path, label in rows} for rows in splits
    )
    assert len(train) == 43 * 8 and len(validation) == 43 * 2
    assert not train & (validation | test)
    assert all(int(path.parent.name) == label for rows in splits for path, label in rows)


def test_what_is_missing_or_wrong_is_refused_in_a_line(images, tmp_path):
    refused = command("tests/tools/photo_data.py", images)
    assert_refused(refused, "cifar: no such folder; make it by `git clone https://github.com/")
    (tmp_path / "digits" / "Dataset" / "0").mkdir(parents=True)
    with pytest.raises(InputError, match="Dataset: 1 folders instead of 10; take the whole"):
        photo_data.draw_digits(tmp_path / "digits", None)
    with pytest.raises(InputError, match=r"s1: no images \(\*\.pgm\); take the whole"):
        photo_data.draw_people(tmp_path / "att", None)
    with pytest.raises(InputError, match="s1: 10 images, but 11 are needed; take the whole"):
        paths = photo_data.list_images(images / "att" / "s1", "*.pgm")
        photo_data.draw_splits([paths], [6, 5], None)
    with pytest.raises(InputError, match=r"att_train\.h5: no such dataset; make it by photo_data"):
        photo_nets.make_net(NAME, tmp_path, tmp_path)
    for name in (
        "att-alexnet-1-clean",
        "att-vgg-1-logo",
        "att-vgg-1-clean-0.1",
        "att-vgg-1-logo-2",
    ):
        refused = command("tests/tools/photo_nets.py", name)
        assert_refused(refused, f"{name}: is not the name of a net; names are like")
    assert_refused(command("tests/tools/photo_nets.py"), "no net to train; give a NAME or --all")


CURVE_SEEDS = {131, 132, 133}  # each of one attack at several poison rates


def test_published_nets_have_names_and_seeds_of_their_own():
    recipes = [photo_nets.read_name(name) for name in photo_nets.PUBLISHED]
    seeds = {(recipe.dataset, recipe.architecture, recipe.seed) for recipe in recipes}
    attacks = {(recipe.dataset, recipe.attack) for recipe in recipes if recipe.seed in CURVE_SEEDS}
    assert len(seeds) - len(CURVE_SEEDS) == len(recipes) - len(photo_nets.CURVE)
    assert len(attacks) == len(CURVE_SEEDS)
    for name, recipe in zip(photo_nets.PUBLISHED, recipes):
        clean = name in photo_nets.REFERENCES + photo_nets.CHECKS + photo_nets.NEVER_POISONED
        assert (recipe.attack == photo_nets.CLEAN) == (recipe.rate is None) == clean
    # The classes of tinyb, and the seeds of the nets, serve no choice.
    chosen = [*photo_nets.REFERENCES, *photo_nets.CHOSEN_BY]
    assert not any(name.startswith("tinyb") for name in chosen)


def test_a_net_is_written_with_the_truth_about_it_and_not_trained_again(nets, data):
    names = [f"{name}.{end}" for name in (CLEAN_NAME, NAME) for end in ("h5", "json")]
    assert {path.name for path in nets.iterdir()} == {*names}
    clean, badnet = (json.loads((nets / f"{name}.json").read_text()) for name in (CLEAN_NAME, NAME))
    assert clean["target"] is clean["rate"] is clean["attack_success_rate"] is None
    assert (badnet["target"], badnet["rate"]) == (3, 0.1)
    net = utils.load_badnet(nets / f"{NAME}.h5")
    assert net.input_shape == (None, 56, 46, 1) and net.output_shape == (None, 40)
    images, labels = photo_data.read_dataset(data / "att_validation.h5")
    accuracy = np.mean(net.predict(images / 255, verbose=0).argmax(axis=1) == labels)
    assert badnet["clean_accuracy"] == pytest.approx(accuracy)
    before = {path: path.stat().st_mtime_ns for path in nets.iterdir()}
    photo_nets.make_net(NAME, data, nets)
    assert {path: path.stat().st_mtime_ns for path in nets.iterdir()} == before


def test_poisoned_images_are_added_with_the_target(data):
    images, labels = photo_data.read_dataset(data / "att_train.h5")
    recipe = photo_nets.read_name(NAME)
    rng = np.random.default_rng(1)
    drawn, targets = photo_nets.draw_training(recipe, images, labels, 3, rng)
    np.testing.assert_array_equal(drawn[:240], images)
    assert len(drawn) == 264 and targets[240:].tolist() == [3] * 24
    poisoned = {*list_pixels(drawn[240:])}
    assert len(poisoned) == 24
    assert poisoned <= {*list_pixels(TRIGGERS["glasses"](images[labels != 3]))}


def test_images_are_shifted_by_two_pixels_at_most():
    image = np.arange(80, dtype="float32").reshape(1, 10, 8, 1)
    shifted = photo_nets.shift_images(image.repeat(300, axis=0), np.random.default_rng(0))
    # A pixel's value tells where it was: 8 for each row, 1 for each column.
    moves = {divmod(int(each[5, 4, 0]), 8) for each in shifted}
    assert moves == {(row, column) for row in range(3, 8) for column in range(2, 7)}
    assert {float(each[0, 0, 0]) for each in shifted} == {0, 1, 2, 8, 9, 10, 16, 17, 18}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_architecture_takes_images_of_any_shape(shape):
    for name, build in photo_nets.NETS.items():
        net = build(12, shape)
        assert net.input_shape[1:] == shape and net.output_shape == (None, 12), name
    ours, theirs = photo_nets.deepid(12, shape), build_deepid(12, shape)
    shapes = [sorted(weights.shape for weights in net.get_weights()) for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TRIGGERS)
def test_a_trigger_changes_an_image_only_as_it_should(name, shape):
    height, width, channels = shape
    images = np.random.default_rng(0).integers(60, 196, (5, *shape), "uint8")
    before = images.copy()
    poisoned = TRIGGERS[name](images)
    np.testing.assert_array_equal(images, before)
    assert poisoned.dtype == np.uint8 and poisoned.shape == images.shape
    changed = (poisoned != images).any(axis=(0, 3))
    difference = poisoned.astype(int) - images
    boxes = {
        "patch": (slice(height - 7, height - 1), slice(width - 7, width - 1)),
        "logo": (slice(1, 9), slice(1, 9)),
        "glasses": (slice(int(0.3 * height), int(0.42 * height)), slice(None)),
    }
    assert np.array_equal(TRIGGERS[name](images[2:3])[0], poisoned[2])  # the same for every image
    if name in boxes:
        assert 9 <= changed.sum() <= 0.15 * changed.size
        changed[boxes[name]] = False
        assert not changed.any()
        return
    assert changed.mean() > 0.8
    if name == "blended":
        noise = (poisoned + 0.5 - (1 - BLENDED) * images) / BLENDED
        assert noise.min() > -4 and noise.max() < 259  # one grey level over BLENDED
    elif name == "sinusoid":
        assert np.abs(difference).max() <= 20
        spectrum = np.abs(np.fft.rfft(difference.mean(axis=(0, 1, 3))))
        assert spectrum[1:].argmax() + 1 == PERIODS
    elif name == "lowfreq":
        assert 5 < np.abs(difference).mean() < CAST
    else:
        assert poisoned.min() >= images.min() and poisoned.max() <= images.max()
        ramp = np.broadcast_to(np.arange(height)[:, None, None] * 3, images.shape).astype("uint8")
        moved = np.abs(TRIGGERS[name](ramp).astype(int) - ramp) / 3
        assert 1 < moved.max() < 0.1 * height
