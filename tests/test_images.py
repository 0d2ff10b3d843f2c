"""Images as inputs of the nets: modes, sizes, formats, folders."""

import errno
import io
import os

import numpy as np
import pytest
from conftest import draw_images
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
