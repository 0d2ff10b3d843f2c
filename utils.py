"""Models, datasets and images, in and out: what a notebook needs.

    import utils

    badnet = utils.load_badnet("models/demo_bd_net.h5")        a Keras model
    with utils.open_dataset("data/demo_clean_validation_data.h5") as data:
        data.fit_to(badnet.input_shape[1:], badnet.output_shape[1])
        for images, labels in data.batches("0..1"):            float32 (b, 55, 47, 3), int64 (b,)
            ...
    image = utils.make_input(utils.read_image("img/img_9.png"), badnet.input_shape[1:])

The files are other people's. Whatever is wrong with one is raised as InputError, a message of one
line that names the file. The code is in defence/load/.
"""

from defence.base.errors import InputError
from defence.load.datasets import Dataset, hold_out, open_dataset
from defence.load.images import IMAGE_FORMATS, MORE_FORMATS, decode_image, make_input, read_image
from defence.load.models import ModelFile, load_badnet, read_model, save_model

__all__ = [
    "IMAGE_FORMATS",
    "MORE_FORMATS",
    "Dataset",
    "InputError",
    "ModelFile",
    "decode_image",
    "hold_out",
    "load_badnet",
    "make_input",
    "open_dataset",
    "read_image",
    "read_model",
    "save_model",
]
