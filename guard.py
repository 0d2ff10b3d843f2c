"""What an untrusted file may contain, checked before the libraries that trust it see it.

Every guard of the two commands stands here; utils.py calls them in this order:

    any file   inspecting         nothing here may take more memory than a limit
    HDF5       check_heaps        texts are kept so that libhdf5 comes to an end of them
               check_links        the file points at no other file, and is a tree
               check_stored       an array is as large in the file as it says; known filters only
    .keras     open_archive       three known members, uncompressed, none twice
    model      parse_json         short, no NaN
               check_config       allowed layers and activations only, numbers and names in bounds
               limit_weights      no weight is allocated beyond the limit while Keras builds
               check_shapes       the file's arrays have the shapes of the config's weights
               check_finite       no weight is NaN or infinite
               check_outputs      no layer's output for one image is beyond the limit
    .onnx      check_onnx         one picture in, a detector's answers out; allowed operators only,
                                  no other file, no output for one image beyond the limit

A guard raises InputError, one line that begins with the file's name.
"""

import contextlib
import json
import math
import mmap
import re
import struct
import zipfile
import zlib

import h5py
import numpy as np

from terminal import MEMORY, InputError, one_line

OBJECTS = 50_000  # groups and arrays in an HDF5 file: weights, and an optimizer's
TEXTS = 10**6  # in the heaps of an HDF5 file: names of layers and weights
LAYER_COUNT = 2_000  # keras.applications.EfficientNetV2L has 1,031
CALLS = 10_000  # inputs of all layers together; that net has 1,164
JSON_LENGTH = 2**23  # characters; that net's config has 964,217
JSON_DEPTH = 64  # levels
UNREAD = {"compile_config"}  # of the optimizer; utils.portable takes it out
UNBOUNDED = {"seed", "shared_object_id"}  # names of a kind
NUMBER = 10**6  # no unit count, kernel or image size of a classifier comes near
SPANS = {"kernel_size", "pool_size", "strides", "dilation_rate", "padding", "cropping", "size"}
SPAN = 1_000  # pixels, of what is named above
TEXT = 1_000  # characters of one name
INFLATION = 1032  # the most that a byte of a deflate stream can become
FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
HEAP = b"GCOL\1\0\0\0"  # how each global heap of HDF5 begins
MEMBERS = {"metadata.json", "config.json", "model.weights.h5"}

# What a feed-forward image classifier is made of. A config may name anything importable, and
# Keras would look it up: whatever is not listed here is refused before Keras sees the file.
LAYERS = """
    Functional Model Sequential InputLayer Conv2D DepthwiseConv2D SeparableConv2D Conv2DTranspose
    Dense Flatten Reshape Permute Activation ReLU LeakyReLU PReLU ELU Softmax MaxPooling2D
    AveragePooling2D GlobalMaxPooling2D GlobalAveragePooling2D ZeroPadding2D Cropping2D
    UpSampling2D Dropout SpatialDropout2D GaussianNoise GaussianDropout AlphaDropout
    BatchNormalization LayerNormalization GroupNormalization Add Subtract Multiply Average Maximum
    Minimum Concatenate Rescaling
"""
PARTS = """
    Zeros Ones Constant RandomNormal RandomUniform TruncatedNormal VarianceScaling Orthogonal
    Identity GlorotNormal GlorotUniform HeNormal HeUniform LecunNormal LecunUniform L1 L2 L1L2
    OrthogonalRegularizer MaxNorm NonNeg UnitNorm MinMaxNorm DTypePolicy __keras_tensor__
    __tuple__ TensorShape
"""
ALLOWED = frozenset((LAYERS + PARTS).split())
RUN_CODE = {"Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"}
ACTIVATIONS = """
    linear relu relu6 leaky_relu elu selu celu gelu silu swish mish softplus softsign softmax
    log_softmax sigmoid hard_sigmoid log_sigmoid hard_silu hard_swish hard_tanh tanh exponential
"""
TYPES = {"float16", "bfloat16", "float32", "float64", "mixed_float16", "mixed_bfloat16"}
# What a detector's file is made of: those layers, as exported, and the comparison behind them.
OPERATORS = """
    Add And ArgMax AveragePool Cast Clip Concat Conv ConvTranspose Div Elu Equal Exp Gather Greater
    IsInf IsNaN LeakyRelu Log LogSoftmax MatMul Max MaxPool Min Mul Neg Not Or Pad Reciprocal
    ReduceMax ReduceMean ReduceSum Relu Reshape Resize Selu Shape Sigmoid Slice Softmax Softplus
    Softsign Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where
"""
ANSWERS = {"class": "INT32", "badnet_class": "INT32", "repaired_class": "INT32", "score": "FLOAT"}
NAME = re.compile(r"(?!\.*$)[\w.>-]+", re.ASCII).fullmatch  # of a scope of TensorFlow's
MODULE = re.compile(
    r"keras(\.src)?"
    r"(\.(engine|models|layers|initializers|regularizers|constraints|dtype_policies)(\.\w+)*)?"
)


def require_fits(path, what, size, limit):
    """Raise InputError where `size` bytes, of `what`, are more than `limit`."""
    if size > limit:
        raise InputError(
            f"{path}: {what} would take {size / 2**30:,.2f} GB of memory, more than --max-memory "
            f"{limit / 2**30:g}"
        )


@contextlib.contextmanager
def inspecting(path, limit=MEMORY):
    """A block that reads what a file declares. Raises InputError for whatever a library raises.

    Where the system can (Linux), it may take little more than `limit` bytes of address space:
    behind the checks of what the file declares, for what it makes a library allocate unasked.
    """
    try:
        with _address_space(limit):
            yield
    except InputError:
        raise
    except Exception as error:  # libhdf5, h5py, zipfile raise whatever their parts raise
        if isinstance(error, MemoryError) or "allocat" in str(error):
            raise InputError(f"{path}: to read it takes more than --max-memory") from error
        raise InputError(f"{path}: damaged or of another format: {one_line(error)}") from error


@contextlib.contextmanager
def _address_space(limit):
    try:
        import resource

        with open("/proc/self/statm") as sizes:
            used = int(sizes.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = used + limit + 2**28  # room for what Python itself needs: without it, it may crash
    most = most if soft == resource.RLIM_INFINITY else min(soft, most)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ----------------------------------------------------------------------------------------- HDF5


def check_links(file, path):
    """Walk an open HDF5 file: one tree of groups and arrays, all of it in this file.

    Returns {name: h5py.Group or h5py.Dataset}, everything in the file, the root as "".  Raises
    InputError at a soft, external or user-defined link, an object with two names, external
    storage, a virtual data set.
    """
    if file.id.get_create_plist().get_sizes() != (8, 8):
        raise InputError(f"{path}: not HDF5 as any current machine writes it")
    root = file["/"]
    found, groups, seen = {"": root}, [("", root)], {h5py.h5o.get_info(root.id).addr}
    while groups:
        within, group = groups.pop()
        if len(group) + len(seen) > OBJECTS:
            raise InputError(f"{path}: holds more than {OBJECTS:,} groups and arrays")
        for key in group:
            name = f"{within}/{key}" if within else key
            link = group.id.links.get_info(key.encode(errors="surrogateescape"))
            if link.type != h5py.h5l.TYPE_HARD:
                raise InputError(
                    f"{path}: {name!r} is a link to elsewhere, which could read another file"
                )
            if link.u in seen:
                raise InputError(f"{path}: {name!r} is an object of two names")
            seen.add(link.u)
            found[name] = item = group[key]
            if isinstance(item, h5py.Group):
                groups.append((name, item))
            elif isinstance(item, h5py.Dataset):
                stored = item.id.get_create_plist()
                if stored.get_external_count() or stored.get_layout() == h5py.h5d.VIRTUAL:
                    raise InputError(f"{path}: the data of {name!r} lie in another file")
    return found


def check_heaps(path):
    """Raise InputError where libhdf5 would not come to an end of a heap, where it keeps texts.

    It goes from object to object by the size that each declares, and 0 is such a size.
    """
    left = TEXTS
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
        heap = contents.find(HEAP)
        while heap >= 0:
            at, end = heap + 16, heap + int.from_bytes(contents[heap + 8 : heap + 16], "little")
            while at + 16 <= min(end, len(contents)):
                index, _, _, size = struct.unpack_from("<HHIQ", contents, at)
                step = 16 + -(-size // 8) * 8 if index else size  # free space counts its header
                left -= 1
                if not 0 < step <= end - at or left < 0:
                    raise InputError(f"{path}: the HDF5 file is damaged: a heap without end")
                at += step
            heap = contents.find(HEAP, heap + 1)


def check_stored(array, path, limit=MEMORY):
    """Raise InputError unless an array of numbers can be read in parts of `limit` bytes.

    array: h5py.Dataset.  Its bytes must be in the file, whole or in chunks, each chunk at most
    `limit` bytes, behind no filter but gzip, shuffle and fletcher32.
    """
    name, kind = array.name.strip("/"), array.dtype
    if array.shape is None or kind.kind not in "fiu" or kind.itemsize > 8:
        raise InputError(f"{path}: '{name}' is no array of numbers, but {describe(array)}")
    layout = array.id.get_create_plist()
    filters = [layout.get_filter(i)[0] for i in range(layout.get_nfilters())]
    if not FILTERS.issuperset(filters) or len(set(filters)) < len(filters):
        raise InputError(
            f"{path}: '{name}' is stored behind a filter other than gzip, shuffle, fletcher32"
        )
    if array.chunks is None:
        whole = array.id.get_storage_size() == array.nbytes
    else:
        chunk = math.prod(array.chunks) * kind.itemsize
        require_fits(path, f"one chunk of '{name}'", chunk, limit)
        count = math.prod(-(-n // m) for n, m in zip(array.shape, array.chunks))
        whole = array.id.get_num_chunks() == count
        if h5py.h5z.FILTER_DEFLATE in filters and whole:
            array.id.chunk_iter(lambda info: _check_inflated(array, info, chunk, limit, path))
    if not whole:
        raise InputError(
            f"{path}: '{name}' is declared as {describe(array)}, which are not in the file"
        )


def _check_inflated(array, info, chunk, limit, path):
    """libhdf5 inflates a chunk to its end, however much more than the chunk's size that is."""
    if info.size * INFLATION > limit:
        _, stored = array.id.read_direct_chunk(info.chunk_offset)
        if len(zlib.decompressobj().decompress(stored, chunk + 5)) > chunk + 4:  # with a checksum
            raise InputError(f"{path}: a chunk of '{array.name}' inflates beyond its size")


def describe(array):
    return f"{'×'.join(map(str, array.shape or ())) or 'one'} values of type {array.dtype}"


def read_text(holder, name, path):
    """An attribute of text, str, of an HDF5 object; None where there is none."""
    values = read_texts(holder, name, path)
    if values is not None and len(values) != 1:
        raise InputError(f"{path}: the attribute '{name}' is not one text")
    return None if values is None else values[0]


def read_texts(holder, name, path):
    """An attribute that is a text or a row of texts, [str, …]; None where there is none."""
    if name not in holder.attrs:
        return None
    attribute = holder.attrs.get_id(name)
    if attribute.shape == (0,):
        return []
    if attribute.shape is None or len(attribute.shape) > 1:
        raise InputError(f"{path}: the attribute '{name}' is not a row of texts")
    if not h5py.check_string_dtype(attribute.dtype):
        raise InputError(f"{path}: the attribute '{name}' is not text")
    if attribute.dtype.itemsize * math.prod(attribute.shape) > JSON_LENGTH:
        raise InputError(f"{path}: the attribute '{name}' is too long")
    value = holder.attrs[name]
    values = value.tolist() if isinstance(value, np.ndarray) else [value]
    return [value.decode() if isinstance(value, bytes) else value for value in values]


# --------------------------------------------------------------------------------------- .keras


@contextlib.contextmanager
def open_archive(path, limit=MEMORY):
    """Open a .keras file: a ZipFile with members of MEMBERS, as Keras writes them."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 22))
        end = file.read()  # of the directory, where no comment follows, as none does here
    _, _, _, _, count, size, _, _ = struct.unpack("<4s4H2LH", end.rjust(22))
    if end[:4] != b"PK\5\6" or count > len(MEMBERS) or size > 1_000:
        raise InputError(f"{path}: not a .keras archive as Keras writes it")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        for member in members:
            name = member.filename
            if name not in MEMBERS or names.count(name) > 1:
                raise InputError(f"{path}: holds {name!r}, {names.count(name)} times")
            require_fits(path, name, member.file_size, limit)
            if member.compress_size != member.file_size or member.flag_bits & 1:
                raise InputError(f"{path}: {name} is compressed or encrypted; Keras does neither")
        yield archive


# --------------------------------------------------------------------------------------- models


def parse_json(text, path):
    """Parse JSON, str or bytes, of at most JSON_LENGTH. Raises InputError where it is none."""

    def refuse(constant):
        raise ValueError(constant)

    if len(text) > JSON_LENGTH:
        raise InputError(f"{path}: its JSON is longer than {JSON_LENGTH:,} characters")
    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: its JSON cannot be read") from error


def check_config(config, path):
    """Raise InputError unless a model's config, at every depth, is that of an image classifier."""
    unread, layers, inputs = [(config, "", "", 0)], 0, 0
    while unread:
        value, key, layer, depth = unread.pop()
        if depth > JSON_DEPTH:
            raise InputError(f"{path}: its config is nested deeper than {JSON_DEPTH} levels")
        if isinstance(value, dict):
            if "class_name" in value:
                inner, name = value.get("config"), value["class_name"]
                if name not in PARTS.split() and isinstance(inner, dict):
                    layer = str(inner.get("name", layer))[:TEXT]
                    layers += 1
                _check_class(value, layer, path)
                inputs += name == "__keras_tensor__"
            elif key == "kwargs" or (key == "inbound_nodes" and "args" not in value):
                switch = value.get("training")
                given = {**value, "training": None if isinstance(switch, bool) else switch}
                _check_call(given.values(), layer, path)
            for name, part in value.items():
                if name not in UNREAD:
                    unread.append((part, name, layer, depth + 1))
        elif isinstance(value, list):
            if key == "args":
                _check_call([part for part in value if not isinstance(part, list)], layer, path)
            inputs += key == "inbound_nodes"
            unread += [(part, key, layer, depth + 1) for part in value]
        else:
            _check_value(value, key, layer, path)
    if layers > LAYER_COUNT or inputs > CALLS:
        raise InputError(
            f"{path}: has more than {LAYER_COUNT:,} layers or {CALLS:,} inputs of layers"
        )


def _check_class(value, layer, path):
    name, module, registered = map(value.get, ("class_name", "module", "registered_name"))
    if name in ("__lambda__", *RUN_CODE):
        kind = "Lambda" if name == "__lambda__" else name
        raise InputError(
            f"{path}: contains a {kind} layer (layer {layer!r}): it could run code from the file"
        )
    if not isinstance(name, str) or name not in ALLOWED:
        raise InputError(
            f"{path}: contains {name!r} (layer {layer!r}), which is not among the layers that "
            "this tool loads"
        )
    known = module is None or (isinstance(module, str) and MODULE.fullmatch(module))
    if not known or registered not in (None, name):
        raise InputError(
            f"{path}: contains a {name} of {module!r}, registered as {registered!r} (layer "
            f"{layer!r}): it could run code from the file"
        )
    if name == "DTypePolicy":
        _check_value(value["config"]["name"], "dtype", layer, path)


def _check_call(arguments, layer, path):
    """Layers are called on tensors only, but for the switch training=False."""
    for value in arguments:
        if isinstance(value, dict) and "class_name" in value:
            _check_class(value, layer, path)
        tensor = isinstance(value, dict) and value.get("class_name") == "__keras_tensor__"
        if not (tensor or value is None):
            raise InputError(f"{path}: calls a layer on what is no tensor (layer {layer!r})")


def _check_value(value, key, layer, path):
    if isinstance(value, str):
        allowed = {"activation": ACTIVATIONS.split(), "dtype": TYPES, "variable_dtype": TYPES}.get(
            key
        )
        if allowed is not None and value not in allowed:
            raise InputError(f"{path}: contains the {key} {value!r} (layer {layer!r})")
        if len(value) > TEXT or not value.isprintable() or (key == "name" and not NAME(value)):
            raise InputError(f"{path}: its config holds text that is no name (layer {layer!r})")
    elif isinstance(value, int | float) and key not in UNBOUNDED:
        if abs(value) <= (SPAN if key in SPANS else NUMBER):
            return
        raise InputError(f"{path}: its config holds the number {value:.3g} (layer {layer!r})")


@contextlib.contextmanager
def limit_weights(layer_class, path, limit=MEMORY):
    """While the block builds a model, allocate at most `limit` bytes of weights, all zero.

    layer_class: keras.layers.Layer, whose method every layer makes its weights with.
    """
    allocate, total = layer_class.add_weight, 0

    def add_weight(layer, shape=None, initializer=None, dtype=None, **options):
        nonlocal total
        total += 4 * math.prod(shape or ())
        require_fits(path, f"the weights up to layer {layer.name!r}", total, limit)
        return allocate(layer, shape=shape, initializer="zeros", dtype=dtype, **options)

    layer_class.add_weight = add_weight
    try:
        yield
    finally:
        layer_class.add_weight = allocate


def declared_shapes(file, path, limit=MEMORY):
    """The shapes of a model's weights from the headers of its open HDF5 file, none of them read.

    Returns {layer: [shape, …]} in the order of the file, by which Keras loads an .h5; or a list
    of shapes, where it loads by paths (.weights.h5, .keras).
    """
    found = check_links(file, path)
    arrays = {
        name: item
        for name, item in found.items()
        if isinstance(item, h5py.Dataset) and not name.startswith("optimizer")
    }
    for array in arrays.values():
        check_stored(array, path, limit)
    require_fits(path, "its weights", sum(array.nbytes for array in arrays.values()), limit)
    within = "model_weights/" * ("layer_names" not in file.attrs and "model_weights" in found)
    group = found[within.rstrip("/")]
    for name in ("keras_version", "backend"):  # Keras reads them
        read_text(group, name, path)
    layers = _names(group, "layer_names", path)
    if not layers:
        for array in arrays.values():
            read_text(array, "dtype", path)  # Keras does
        return [array.shape for name, array in arrays.items() if "seed_generator" not in name]
    if f"{within}top_level_model_weights" in found:
        layers.append("top_level_model_weights")
    declared = {}
    for layer in layers:
        names = _names(found[within + layer], "weight_names", path)
        if names:
            declared[layer] = [arrays[f"{within}{layer}/{name}"].shape for name in names]
    return declared


def _names(group, attribute, path):
    """A row of names that may go on in attributes called …0, …1, …, as Keras splits a long one."""
    names, parts = read_texts(group, attribute, path), 0
    if names is None:
        names = []
        while (more := read_texts(group, f"{attribute}{parts}", path)) is not None:
            names += more
            parts += 1
    return names


def check_shapes(model, declared, path):
    """Raise InputError unless a model has the weights that a file declares (declared_shapes)."""

    def shapes(weights):
        return [tuple(weight.shape) for weight in weights]

    if not isinstance(declared, dict):
        if sorted(shapes(model.weights)) != sorted(declared):
            raise InputError(f"{path}: the shapes of its weights are not those of its config")
        return
    layers = [layer for layer in model.layers if layer.weights]
    if len(layers) != len(declared):
        raise InputError(
            f"{path}: holds weights of {len(declared)} layers, its config describes {len(layers)}"
        )
    for layer, (name, ours) in zip(layers, declared.items()):
        theirs = shapes(layer.trainable_weights + layer.non_trainable_weights)
        if ours != theirs:
            raise InputError(
                f"{path}: the weights of layer {name!r} are of shape {ours}, its config says "
                f"{theirs}"
            )


def check_finite(model, path):
    """Raise InputError where a weight is NaN or infinite."""
    for layer in model.layers:
        if not all(np.isfinite(values).all() for values in layer.get_weights()):
            raise InputError(f"{path}: layer {layer.name!r} has weights that are NaN or infinite")


def output_sizes(model):
    """Yield the values that each output of each layer, at any nesting, has for one image.

    A dilated convolution counts as large as its input with the margin that TensorFlow adds.
    """
    for layer in model.layers:
        for node in layer._inbound_nodes:
            for tensor in node.output_tensors:
                yield math.prod(size or 1 for size in tensor.shape[1:])
            if np.max(getattr(layer, "dilation_rate", 1)) > 1:
                for tensor in node.input_tensors:
                    _, *sizes, channels = tensor.shape
                    reach = np.multiply(layer.dilation_rate, np.subtract(layer.kernel_size, 1))
                    yield channels * math.prod(np.add(sizes, reach).tolist())
        if hasattr(layer, "layers"):
            yield from output_sizes(layer)


def check_outputs(model, path, limit=MEMORY):
    """Raise InputError where one image makes a layer give more than `limit` bytes."""
    require_fits(path, "the largest output of a layer", 4 * max(output_sizes(model)), limit)


def require_step_fits(model, option, batch_size, limit):
    """Raise InputError where to train a model on so many images at a time would take too much."""
    step = 2 * 4 * sum(output_sizes(model)) * batch_size
    require_fits(f"{option} {batch_size}", "a training step", step, limit)


# ---------------------------------------------------------------------------------------- .onnx


def check_onnx(contents, path, limit=MEMORY):
    """Raise InputError unless bytes are an ONNX model that is a detector and nothing else.

    Returns (shape, largest, facts): (height, width, channels) of its pictures, the values of the
    largest output of an operator for one of them, and its metadata, {str: str}.
    """
    import onnx  # here, because not every user has it

    with inspecting(path, limit):
        model = onnx.ModelProto()
        model.ParseFromString(contents)
        graph = model.graph
        if model.functions or model.training_info or graph.sparse_initializer:
            raise InputError(f"{path}: holds more than one graph of operators")
        if any(each.domain not in ("", "ai.onnx.ml") for each in model.opset_import):
            raise InputError(f"{path}: asks for operators that are not ONNX's own")
        for node in graph.node:
            if node.op_type not in OPERATORS.split() or node.domain:
                raise InputError(
                    f"{path}: contains the operator {node.op_type!r}, which is not among those "
                    "that this tool runs"
                )
        values = [each for node in graph.node for each in node.attribute]
        kinds = onnx.AttributeProto
        if any(each.type in (kinds.GRAPH, kinds.GRAPHS, kinds.SPARSE_TENSOR) for each in values):
            raise InputError(f"{path}: holds a graph inside an operator")
        tensors = [*graph.initializer, *(each.t for each in values if each.type == kinds.TENSOR)]
        if any(each.data_location or each.external_data for each in tensors):
            raise InputError(f"{path}: keeps values in another file")
        size = sum(8 * math.prod(each.dims) for each in tensors)
        require_fits(path, "its weights", size, limit)
        onnx.checker.check_model(model)
        shape = _check_ends(onnx, graph, path)

        graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        del graph.value_info[:]
        known = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        sizes = {
            each.name: math.prod(side.dim_value for side in each.type.tensor_type.shape.dim)
            for each in (*known.value_info, *known.output)
            if all(side.HasField("dim_value") for side in each.type.tensor_type.shape.dim)
        }
        unknown = {name for node in graph.node for name in node.output if name} - set(sizes)
        if unknown:
            raise InputError(f"{path}: how large {min(unknown)!r} is cannot be told")
        require_fits(path, "the largest output of an operator", 8 * max(sizes.values()), limit)
        return shape, max(sizes.values()), {each.key: each.value for each in model.metadata_props}


def _check_ends(onnx, graph, path):
    """The shape of a detector's pictures. Raises InputError unless it has its input and outputs."""
    if len(graph.input) != 1:
        raise InputError(f"{path}: no detector: it takes {len(graph.input)} inputs")
    kind = graph.input[0].type.tensor_type
    shape = tuple(side.dim_value for side in kind.shape.dim[1:])
    if kind.elem_type != onnx.TensorProto.UINT8 or len(shape) != 3 or min(shape) < 1:
        raise InputError(f"{path}: no detector: its input is not pictures of whole numbers, 0..255")
    found = {
        output.name: onnx.TensorProto.DataType.Name(output.type.tensor_type.elem_type)
        for output in graph.output
        if len(output.type.tensor_type.shape.dim) == 1
    }
    if found != ANSWERS:
        raise InputError(f"{path}: no detector: its outputs are not {', '.join(ANSWERS)}")
    return shape
