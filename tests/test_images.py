"""Images as inputs of the nets: modes, sizes, formats, folders."""

import contextlib
import errno
import io
import os

import numpy as np
import pytest
from conftest import B, G, assert_refused, command, draw_images
from PIL import Image

import utils
from defence.base import files
from defence.base.errors import InputError


def test_images_of_every_mode_become_rgb_and_grey(tmp_path):
    pixels = draw_images(1, 1, (20, 30, 3), seed=0)[0][0]
    rgb = Image.fromarray(pixels)
    shape = (20, 30, 3)
    np.testing.assert_array_equal(load(rgb, tmp_path, shape), pixels)
    grey = np.asarray(rgb.convert("L"), np.float32)
    for mode in ("L", "LA"):
        image = load(rgb.convert(mode), tmp_path, shape)
        np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(load(rgb, tmp_path, (20, 30, 1))[..., 0], grey)
    transparent = rgb.copy()
    transparent.putalpha(7)
    np.testing.assert_array_equal(load(transparent, tmp_path, shape), pixels)
    palette = rgb.quantize(16)
    expected = np.asarray(palette.convert("RGB"), np.float32)
    np.testing.assert_array_equal(load(palette, tmp_path, shape), expected)
    np.testing.assert_array_equal(load(palette, tmp_path, shape, transparency=b"\x05"), expected)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(load(deep, tmp_path, (20, 30, 1))[..., 0], grey)


def load(image, folder, shape, **options):
    image.save(folder / "image.png", **options)
    return utils.make_input(utils.read_image(folder / "image.png"), shape)


def test_jpeg_of_any_size_is_turned_and_resized_bicubically(tmp_path):
    image = Image.fromarray(draw_images(1, 1, (40, 80, 3), seed=0)[0][0])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    stored = Image.open(io.BytesIO((tmp_path / "turned.jpg").read_bytes()))
    expected = stored.transpose(Image.Transpose.ROTATE_270).resize(
        (30, 55), Image.Resampling.BICUBIC
    )
    array = utils.make_input(utils.read_image(tmp_path / "turned.jpg"), (55, 30, 3))
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, np.asarray(expected, np.float32))


def test_a_folder_stands_for_all_its_files_at_any_depth(tmp_path):
    """Whatever the names: whoever uploads an image chooses its name."""
    (tmp_path / "inner" / "deep").mkdir(parents=True)
    names = ["a.JPG", "b.png", "inner/deep/c", "notes.txt", "upload_123"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "outside").symlink_to(tmp_path / "inner")  # listed, but not entered
    os.mkfifo(tmp_path / "pipe")
    paths = [str(path) for path in files.list_files([tmp_path, "x.png"])]
    assert paths == [*(str(tmp_path / name) for name in [*names[:4], "outside", "pipe"]),
                     str(tmp_path / names[4]), "x.png"]  # fmt: skip
    for name in ("outside", "pipe"):
        with pytest.raises(InputError):
            utils.read_image(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no file in the folder"):
        files.list_files([tmp_path / "empty"])


def test_a_folder_that_cannot_be_entered_is_listed(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert files.list_files([tmp_path]) == [tmp_path / "closed"]


@pytest.mark.parametrize("option", [(), ("--csv", "out.csv"), ("--json", "out.json")])
def test_what_the_system_cannot_open_is_one_unread_image(option, repaired_world, tmp_path):
    folder, _ = repaired_world
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.png").symlink_to("elsewhere.png")
    image = folder / "0.png"
    unread = ["loop.png", "gone.png", f"{'x' * 300}.png", "0.png/inside.png"]
    call = (image, *unread, image, "--model", folder / B, "--repaired", folder / G, *option)
    process = command("eval_defence.py", *call, cwd=tmp_path)
    assert process.returncode == 2 and process.stdout.count(str(image)) == 2
    assert process.stderr.count("eval_defence.py: error: ") == len(unread)
    assert "loop.png: cannot be read: " in process.stderr
    assert "2 judged, " in process.stderr and "4 unread" in process.stderr
    assert not option or (tmp_path / option[1]).read_text().count(f"{unread[0]}: cannot") == 1


def test_ray_passes_over_no_file_of_a_folder_and_goes_in_no_circle(tmp_path):
    pytest.importorskip("ray")
    from pyarrow import fs

    from defence.explain import verdicts

    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "inner" / "a\n.png")
    for name, target in (("one", "."), ("two", "."), ("loop", "loop"), ("gone", "elsewhere")):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    (folder / os.fsdecode(b"\xff.png")).touch()
    keys = verdicts.list_images([folder, tmp_path / "images" / "inner"])[1]
    paths = [verdicts.split_key(key)["path"] for key in keys]
    names = [r"\xff.png", "gone", "inner/a\n.png", "loop", "one", "pipe", "two"]
    assert paths == [f"{folder}/{name}" for name in names]
    for path in paths:
        expected = (
            contextlib.nullcontext() if "inner" in path else pytest.raises((InputError, OSError))
        )
        with expected:
            verdicts.read_image(path, (9, 9, 3), fs.LocalFileSystem(), 2**20, ("PNG",))


def test_an_output_of_an_impossible_name_is_refused_first(deepid_world):
    call = ("repair.py", B, "clean.h5", "--json", f"{'x' * 300}.json")
    assert_refused(command(*call, cwd=deepid_world), "cannot be written: file name too long")


@pytest.mark.parametrize("name", ["webp", "bmp", "gif"])
def test_other_formats_are_decoded_only_when_asked_for(tmp_path, name):
    image = Image.fromarray(draw_images(1, 1, (40, 80, 3), seed=0)[0][0])
    path = tmp_path / "upload.png"
    animation = {"save_all": True, "append_images": [image.rotate(180)]}
    options = {"webp": {"lossless": True}, "gif": animation}
    image.save(path, format=name, **options.get(name, {}))
    with pytest.raises(InputError, match="not a PNG or JPEG image"):
        utils.read_image(path)
    decoded = utils.read_image(path, formats=("PNG", name.upper())).convert("RGB")
    assert decoded.size == (80, 40)
    assert np.abs(np.asarray(decoded, float) - np.asarray(image)).mean() < 30


# ------------------------------------------------------------------------------ half-written files
