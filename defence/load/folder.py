"""A folder of pictures as a dataset: in it a folder for each class, as Keras's guides lay it out.

The classes are the folders' names in alphabetical order, as Keras's image_dataset_from_directory
takes them, or as a labels.txt in the folder lists them.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from defence.base import files
from defence.base.errors import InputError
from defence.base.limits import check_fits
from defence.load.class_names import FILE, read_class_names
from defence.load.images import make_input, read_image

READERS = 2  # pictures that are decoded at a time


class FolderImages:
    """Pictures in files, as a Dataset's images: decoded and resized when a part is taken.

    paths: [Path, …].  classes: names of the folders, in the order of the labels.
    listed: whether a labels.txt has them, so that some may have no folder.
    shape: (n, height, width, channels), 0 until `fit_to` is called.  dtype: uint8.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, paths, classes, listed, folder, max_bytes):
        self.paths, self.classes, self.listed = paths, classes, listed
        self.folder, self.max_bytes = folder, max_bytes
        self.shape = (len(paths), 0, 0, 0)

    def __len__(self):
        return len(self.paths)

    def fit_to(self, shape, classes):
        """Give inputs of a net from now on. Raises InputError unless the classes are the net's.

        shape: (height, width, channels) of the net's input.  classes: its N.
        """
        if shape[2] not in (1, 3):
            raise InputError(
                f"{self.folder}: pictures have 1 or 3 channels, the net takes {shape[2]}"
            )
        if len(self.classes) != classes:
            hint = "" if self.listed else "; list all classes, one a line, in labels.txt in it"
            raise InputError(
                f"{self.folder}: has {len(self.classes)} classes, and the net {classes}{hint}"
            )
        self.shape = (len(self.paths), *shape)

    def __getitem__(self, part):
        with ThreadPoolExecutor(READERS) as threads:
            return np.stack(list(threads.map(self.read, self.paths[part]))).astype(np.uint8)

    def read(self, path):
        return make_input(read_image(path, self.max_bytes), self.shape[1:])


def find_images(folder, max_bytes):
    """The pictures in a folder, in a folder for each class, at any depth: (Pictures, labels).

    labels: int64 (n,).  Names that begin with a dot are passed over.
    Raises InputError where there are none, or labels.txt does not list a folder.
    """
    inside = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    classes = [path.name for path in inside if path.is_dir()]
    listed = (folder / FILE).is_file()
    loose = [path for path in inside if not path.is_dir() and path.name != FILE]
    if not classes:
        raise InputError(f"{folder}: has no folder of pictures for each class in it")
    if loose:
        raise InputError(f"{loose[0]}: is not in the folder of a class")
    known = read_class_names(folder / FILE, max_bytes) if listed else classes
    paths, labels = [], []
    for name in classes:
        if name not in known:
            raise InputError(f"{folder / name}: is no class that {FILE} lists")
        of_class = [path for path in files.list_files([folder / name]) if path.name[0] != "."]
        paths += of_class
        labels += [known.index(name)] * len(of_class)
    check_fits(folder, "the names of its pictures", 300 * len(paths), max_bytes)
    if not paths:
        raise InputError(f"{folder}: there are no pictures in it")
    return FolderImages(paths, known, listed, folder, max_bytes), np.array(labels)


def hash_dataset(path):
    """The SHA-256 of a dataset: of a file, or of the names and contents of all in a folder."""
    if not path.is_dir():
        return files.hash_file(path)
    digest = hashlib.sha256()
    for each in files.list_files([path]):
        name = each.relative_to(path).as_posix()
        digest.update(f"{name}\0{files.hash_file(each)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
