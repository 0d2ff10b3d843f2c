"""Change valid files at random: the mutants of fuzz.py. Each function returns new contents.

contents: the bytes of a valid file.  rng: random.Random.
"""

import contextlib
import copy
import io
import json
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np

ODD = [None, True, -1, 0, 1, 2**31, 2**63, -0.5, 1e300, "", "x", "Lambda", "relu", [], {}, [[]]]

# Layers that make much of little, and the keys under which an object may stand, or must not.
GROWING = [
    ("UpSampling2D", {"size": [150, 150]}),
    ("ZeroPadding2D", {"padding": [900, 900]}),
    ("Dense", {"units": 900_000}),
    ("SeparableConv2D", {"filters": 2, "kernel_size": [1, 1], "depth_multiplier": 90_000}),
    ("Resizing", {"height": 900_000, "width": 1, "interpolation": "lanczos3"}),
    ("Concatenate", {"axis": 0}),
    ("UnitNormalization", {"axis": [0]}),
]
KEYS = ["activation", "kernel_regularizer", "activity_regularizer", "bias_constraint", "dtype"]
KEYS += ["kernel_initializer", "layers", "config", "axis", "inbound_nodes"]
HEAPS = [b"GCOL", b"TREE", b"SNOD", b"HEAP", b"FRHP", b"FHDB", b"BTHD", b"BTLF", b"OHDR", b"OCHK"]


def change_bytes(contents, rng):
    """Overwrite, insert, remove, repeat or cut off bytes at a few places."""
    contents = bytearray(contents)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at, size = rng.randrange(len(contents)), rng.choice([1, 1, 2, 4, 8, 100])
        new = rng.choice([rng.randbytes(size), bytes(size), b"\xff" * size, b"\x7f" + bytes(size)])
        action = rng.random()
        if action < 0.6:
            contents[at : at + len(new)] = new
        elif action < 0.7:
            contents[at:at] = new
        elif action < 0.8:
            del contents[at : at + size]
        elif action < 0.95:
            start = rng.randrange(len(contents))
            contents[at : at + size] = contents[start : start + size]
        else:
            del contents[at:]
        contents = contents or bytearray(b"\0")
    return bytes(contents)


def change_json(text, rng):
    """Replace, remove, add or move parts of a JSON document."""
    document = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        places = []

        def walk(value, places=places):
            keys = value if isinstance(value, dict) else range(len(value))
            for key in keys:
                places.append((value, key))
                if isinstance(value[key], dict | list):
                    walk(value[key])

        walk(document)
        if not places:
            break
        holder, key = rng.choice(places)
        source, source_key = rng.choice(places)
        if rng.random() < 0.25:
            _put_object(places, rng)
            continue
        action = rng.random()
        if action < 0.5:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif action < 0.7:
            holder[key] = copy.deepcopy(source[source_key])
        elif action < 0.85:
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(source[source_key]))
        else:
            holder[str(source_key)] = copy.deepcopy(source[source_key])
    return json.dumps(document)


def _put_object(places, rng):
    """Put an object under a key of another, or a layer that grows its input in a layer's place.

    places: [(dictionary or list, key or index), …] of a document.
    """
    objects = [
        holder[key]
        for holder, key in places
        if isinstance(holder[key], dict) and "class_name" in holder[key]
    ]
    if not objects:
        return
    kind, config = rng.choice(GROWING)
    grown = {"module": "keras.layers", "class_name": kind, "registered_name": None}
    grown["config"] = {"name": "grown", **config}
    target = rng.choice(objects)
    if rng.random() < 0.4:
        target.update(grown)
    elif isinstance(target.get("config"), dict):
        keys = [*target["config"], *KEYS]
        target["config"][rng.choice(keys)] = copy.deepcopy(rng.choice([grown, *objects]))


def change_structure(contents, rng):
    """Remove, move, link or reshape objects of an HDF5 file, or change attributes."""
    path = Path(tempfile.gettempdir()) / f"fuzz-{rng.getrandbits(64):x}.h5"
    path.write_bytes(contents)
    try:
        with h5py.File(path, "r+") as file:
            for _ in range(rng.choice([1, 1, 2, 4])):
                names = []
                file.visit(names.append)
                if names:
                    with contextlib.suppress(Exception):  # not every change is possible
                        _change_object(file, rng.choice(names), rng.choice(names), rng)
        return path.read_bytes()
    finally:
        path.unlink()


def _change_object(file, name, other_name, rng):
    action, item = rng.randrange(9), file[name]
    if action == 0:
        del file[name]
    elif action == 1:
        file.move(name, rng.choice([f"{other_name}/moved", f"moved_{rng.random()}"]))
    elif action in (2, 3):
        del file[name]
        soft, external = h5py.SoftLink("/" + other_name), h5py.ExternalLink("x.h5", "/x")
        links = [soft, external, file.get(other_name)]
        file[name] = rng.choice(links)
    elif action in (4, 5, 6) and isinstance(item, h5py.Dataset):
        shape = list(item.shape) or [1]
        shape[rng.randrange(len(shape))] = rng.choice([0, 1, 7, 2**20])
        kind = rng.choice(["f2", "f4", "f8", "i1", "u8", "S3", "?", "c8", item.dtype.str])
        options = rng.choice([{}, {"chunks": True}, {"compression": "gzip"}, {"fletcher32": True}])
        del file[name]
        array = file.create_dataset(name, shape, kind, **options)
        if array.nbytes < 2**22:
            array[...] = np.full(shape, rng.choice([0, 1, 3]), kind)
    else:
        value = rng.choice([1, -1.5, "x", b"\xff", ["a", "b"], [[1]], [b"a"] * 50, [], "{}", "[]"])
        item.attrs[rng.choice([*item.attrs, "new"])] = value


def change_config(contents, rng):
    """Change the JSON that describes a net in an HDF5 file."""
    path = Path(tempfile.gettempdir()) / f"fuzz-{rng.getrandbits(64):x}.h5"
    path.write_bytes(contents)
    try:
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = change_json(file.attrs["model_config"], rng)
        return path.read_bytes()
    finally:
        path.unlink()


def change_archive(contents, rng):
    """Change one member of a .keras archive, or its name."""
    archive = zipfile.ZipFile(io.BytesIO(contents))
    members = [(name, archive.read(name)) for name in archive.namelist()]
    at = rng.randrange(len(members))
    name, inside = members[at]
    if name == "config.json" or rng.random() < 0.4:
        at = next(i for i, (name, _) in enumerate(members) if name == "config.json")
        members[at] = ("config.json", change_json(members[at][1], rng))
    elif name == "model.weights.h5":
        members[at] = (name, rng.choice([change_bytes, change_structure])(inside, rng))
    else:
        members[at] = (rng.choice(["../x", "config.json", "x"]), inside)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice([0, 0, 0, zipfile.ZIP_DEFLATED])) as archive:
        for name, inside in members:
            archive.writestr(name, inside)
    return out.getvalue()


def change_chunks(contents, rng):
    """Change bytes of a PNG and correct its checksums, so that the change is read."""
    out, at, contents = contents[:8], 8, bytearray(contents)
    while at + 12 <= len(contents):
        size = struct.unpack(">I", contents[at : at + 4])[0]
        body = bytes(contents[at + 4 : at + 8 + size])
        if rng.random() < 0.4:
            body = body[:4] + change_bytes(body[4:] or b"\0", rng)
        out += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + size
    return out


def change_heaps(contents, rng):
    """Overwrite numbers in the inner structures of an HDF5 file: sizes, counts, addresses."""
    contents = bytearray(contents)
    starts = [at for at in range(len(contents)) if bytes(contents[at : at + 4]) in HEAPS]
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, size = rng.choice(starts) + rng.choice([4, 8, 16, 24, 32, 40]), rng.choice([1, 2, 4, 8])
        at += rng.choice([0, 0, 2, 4, 6])
        number = rng.choice([0, 1, 16, at, rng.choice(starts), 2 ** (8 * size) - 1])
        number %= 2 ** (8 * size)
        contents[at : at + size] = number.to_bytes(size, "little")
    return bytes(contents)


def change_graph(contents, rng):
    """Change operators, numbers and declared shapes of an ONNX file, or add operators."""
    import onnx

    model = onnx.ModelProto()
    model.ParseFromString(contents)
    graph = model.graph
    for _ in range(rng.choice([1, 1, 2, 4])):
        action = rng.randrange(6)
        if action == 0:
            value = rng.choice([*graph.output, *graph.value_info])
            sides = [rng.choice([0, 1, 2, 10**6]) for _ in range(rng.choice([0, 1, 2]))]
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, sides))
        elif action == 1:
            _change_numbers(rng.choice(graph.initializer), rng)
        elif action == 2:
            node = rng.choice(graph.node)
            node.op_type = rng.choice(["Tile", "Resize", "Reshape", "Concat", "MatMul", "Shape"])
        elif action == 3:
            first, second = rng.choice(graph.node), rng.choice(graph.node)
            if first.input:
                first.input[rng.randrange(len(first.input))] = rng.choice(second.output)
        else:
            _multiply_rows(graph, rng)
    return model.SerializeToString()


def _change_numbers(tensor, rng):
    import onnx

    values = onnx.numpy_helper.to_array(tensor).copy()
    if values.size:
        odd = rng.choice([-1, 0, 1, 2, 1_000, 10**6])
        values.flat[rng.randrange(values.size)] = odd
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _multiply_rows(graph, rng):
    """Make an answer's size depend on the number of images, or on the pixels."""
    import onnx

    name, new = rng.choice(["class", "score"]), f"new_{rng.getrandbits(32):x}"
    pixels = graph.input[0].name
    for node in graph.node:
        node.output[:] = [new if output == name else output for output in node.output]
        node.input[:] = [new if source == name else source for source in node.input]
    first = onnx.numpy_helper.from_array(np.array([0]), f"{new}_first")
    last = onnx.numpy_helper.from_array(np.array([rng.choice([1, 2])]), f"{new}_last")
    row = onnx.numpy_helper.from_array(np.array([-1]), f"{new}_row")
    graph.initializer.extend([first, last, row])
    flat = rng.choice(["Shape", "Reshape"])
    nodes = [
        (flat, [pixels, row.name] if flat == "Reshape" else [pixels], "flat", {}),
        ("Slice", [f"{new}_flat", first.name, last.name], "part", {}),
        ("Cast", [f"{new}_part"], "times", {"to": onnx.TensorProto.INT64}),
    ]
    for kind, inputs, output, options in nodes:
        graph.node.append(onnx.helper.make_node(kind, inputs, [f"{new}_{output}"], **options))
    kind = rng.choice(["Tile", "Reshape", "Concat"])
    sources = [new, new] if kind == "Concat" else [new, f"{new}_times"]
    options = {"axis": 0} if kind == "Concat" else {}
    graph.node.append(onnx.helper.make_node(kind, sources, [name], **options))
