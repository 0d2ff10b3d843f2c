"""What a detector's .onnx file may contain.

guard.py has the list of all guards, in the order in which they run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

from defence.base.errors import InputError
from defence.base.limits import DEFAULT_MAX_BYTES, Name, check_fits
from defence.base.text import first_line
from defence.load.guard import inspect_file

# The operators of a detector: the layers that guard_config.py allows, as exported, and the
# comparison of the two nets.
OPERATORS = """
    Add And ArgMax AveragePool Cast Clip Concat Conv ConvTranspose Div Elu Equal Exp Gather Greater
    IsInf IsNaN LeakyRelu Log LogSoftmax MatMul Max MaxPool Min Mul Neg Not Or Pad Reciprocal
    ReduceMax ReduceMean ReduceSum Relu Reshape Resize Selu Shape Sigmoid Slice Softmax Softplus
    Softsign Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where
"""
BLOCK = 16  # channels in a block of ONNX Runtime's layout in blocks
SHAPE_BYTES = 1024  # of a constant that stores a shape, at most: 128 sides
OUTPUTS = {"class": "INT32", "badnet_class": "INT32", "repaired_class": "INT32", "score": "FLOAT"}


@dataclasses.dataclass
class CheckedGraph:
    """What check_onnx returns: an ONNX model that is a detector.

    shape: (height, width, channels) of an image.  metadata: the model's.
    largest: the number of values in an operator's largest output for one image.
    in_blocks: whether most multiply-adds are in blocks (`_mostly_in_blocks`).
    check_batch: called with n, raises InputError unless every output for n images is at most n
    times as large as for one. Call it before the model first runs on n images: an operator can
    compute sizes from n.
    """

    shape: tuple[int, ...]
    metadata: dict[str, str]
    largest: int
    in_blocks: bool
    check_batch: Callable[[int], None]


def check_onnx(contents: bytes, path: Name, max_bytes: int = DEFAULT_MAX_BYTES) -> CheckedGraph:
    """Raise InputError unless bytes are an ONNX model that is a detector and nothing else."""
    import onnx  # here, because it may not be installed

    with inspect_file(path, max_bytes):
        model = onnx.ModelProto()
        model.ParseFromString(contents)
        _check_operators(onnx, model, path)
        _check_tensors(onnx, model.graph, path, max_bytes)
        onnx.checker.check_model(contents)  # not model, which it would turn into bytes again
        shape = _check_ends(onnx, model.graph, path)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        _forget_shapes(model.graph)
        sizes = _find_output_sizes(onnx, model, 1, path)
        largest = max(sizes.values())
        check_fits(path, "the largest output of an operator", 8 * largest, max_bytes)

        check_batch = _make_batch_check(onnx, model, sizes, path)
        check_batch(2)
        in_blocks = _mostly_in_blocks(model.graph, sizes)
        return CheckedGraph(shape, metadata, largest, in_blocks, check_batch)


def _make_batch_check(
    onnx: Any, model: Any, sizes: dict[str, int], path: Name
) -> Callable[[int], None]:
    """Return CheckedGraph.check_batch. sizes: _find_output_sizes for one image."""
    lock = threading.Lock()  # several threads run batches, and each check changes the model

    @functools.cache
    def check_batch(count: int) -> None:
        with lock:
            try:
                batch_sizes = _find_output_sizes(onnx, model, count, path)
            except onnx.shape_inference.InferenceError as error:
                raise InputError(f"{path}: damaged: {first_line(error)}") from error
        for name, size in batch_sizes.items():
            if size > count * sizes[name]:
                problem = "grows faster than the number of images"
                raise InputError(f"{path}: the size of {name!r} {problem}")

    return check_batch


def _check_operators(onnx: Any, model: Any, path: Name) -> None:
    graph = model.graph
    if model.functions or model.training_info or graph.sparse_initializer:
        raise InputError(f"{path}: contains more than one graph of operators")
    if any(opset.domain not in ("", "ai.onnx.ml") for opset in model.opset_import):
        raise InputError(f"{path}: needs operators that are not ONNX's own")
    for node in graph.node:
        if node.op_type not in OPERATORS.split() or node.domain:
            raise InputError(
                f"{path}: contains the operator {node.op_type!r}, which is not among those that "
                "this tool runs"
            )
        to = [value.i for value in node.attribute if value.name == "to"]
        if node.op_type == "Cast" and onnx.TensorProto.STRING in to:
            raise InputError(f"{path}: turns numbers into text")
    kinds = onnx.AttributeProto
    inside = (kinds.GRAPH, kinds.GRAPHS, kinds.SPARSE_TENSOR)
    if any(value.type in inside for node in graph.node for value in node.attribute):
        raise InputError(f"{path}: contains a graph inside an operator")


def _check_tensors(onnx: Any, graph: Any, path: Name, max_bytes: int) -> None:
    values = [value for node in graph.node for value in node.attribute]
    constants = [value.t for value in values if value.type == onnx.AttributeProto.TENSOR]
    tensors = [*graph.initializer, *constants]
    if any(tensor.data_type == onnx.TensorProto.STRING for tensor in tensors):
        raise InputError(f"{path}: contains text among its numbers")
    if any(tensor.data_location or tensor.external_data for tensor in tensors):
        raise InputError(f"{path}: stores values in another file")
    size = sum(8 * math.prod(tensor.dims) for tensor in tensors)
    check_fits(path, "its weights", size, max_bytes)


def _check_ends(onnx: Any, graph: Any, path: Name) -> tuple[int, ...]:
    """Return the shape of an image. Raise InputError without a detector's input and outputs."""
    if len(graph.input) != 1:
        raise InputError(f"{path}: not a detector: it takes {len(graph.input)} inputs")
    kind = graph.input[0].type.tensor_type
    shape = tuple(side.dim_value for side in kind.shape.dim[1:])
    if kind.elem_type != onnx.TensorProto.UINT8 or len(shape) != 3 or min(shape) < 1:
        raise InputError(f"{path}: not a detector: its input is not images with pixels 0..255")
    outputs = {
        output.name: onnx.TensorProto.DataType.Name(output.type.tensor_type.elem_type)
        for output in graph.output
    }
    if outputs != OUTPUTS:
        raise InputError(f"{path}: not a detector: its outputs are not {', '.join(OUTPUTS)}")
    return shape


def _forget_shapes(graph: Any) -> None:
    """Remove the shapes that a graph declares, which would be believed, and its weights.

    No shape depends on weights, which only take time when shapes are computed.
    """
    del graph.value_info[:]
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    for tensor in graph.initializer:
        if len(tensor.raw_data) > SHAPE_BYTES:
            tensor.ClearField("raw_data")


def _find_output_sizes(onnx: Any, model: Any, count: int, path: Name) -> dict[str, int]:
    """Return the number of values in each output of an operator, for `count` images, by its name.

    model: without declared shapes; its batch size is changed.
    Raise InputError where a size depends on pixels, or an answer is not one for each image.
    """
    graph = model.graph
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = count
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.output)
        if value.type.tensor_type.HasField("shape")
        and all(side.HasField("dim_value") for side in value.type.tensor_type.shape.dim)
    }
    unknown = {name for node in graph.node for name in node.output if name} - set(shapes)
    if unknown:
        raise InputError(f"{path}: the size of {min(unknown)!r} cannot be determined")
    if any(shapes.get(name) != [count] for name in OUTPUTS):
        raise InputError(f"{path}: not a detector: its answers are not one for each image")
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _mostly_in_blocks(graph: Any, sizes: dict[str, int]) -> bool:
    """Return whether most multiply-adds are in convolutions to a multiple of BLOCK channels."""
    kernels = {tensor.name: tensor.dims for tensor in graph.initializer}
    counts = {True: 0, False: 0}
    for node in graph.node:
        if node.op_type == "Conv" and (dims := kernels.get(node.input[1])):
            counts[dims[0] % BLOCK == 0] += sizes[node.output[0]] * math.prod(dims[1:])
    return counts[True] >= counts[False]
