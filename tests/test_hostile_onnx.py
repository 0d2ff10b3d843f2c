"""Hostile detectors: an ONNX file with anything but a detector of two nets is refused."""

import re

import numpy as np
import onnx
import pytest
from test_export import draw_random, export, make_net

from defence.base.errors import InputError
from defence.judge import onnx_file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a valid detector, an onnx.ModelProto."""
    folder = tmp_path_factory.mktemp("softmax")
    export(make_net("softmax"), folder)
    return onnx.load(folder / "d.onnx")


def external(model):
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"


def of_another_domain(model):
    model.graph.node[0].domain = "com.microsoft"


def imported_domain(model):
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))


def random_operator(model):
    model.graph.node.append(
        onnx.helper.make_node("RandomNormal", [], ["noise"], shape=[10**6, 10**6])
    )


def loop(model):
    body = onnx.helper.make_graph([], "body", [], [])
    model.graph.node.append(onnx.helper.make_node("Loop", ["", ""], ["x"], body=body))


def graph_inside(model):
    body = onnx.helper.make_graph([], "body", [], [])
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("body", body))


def function(model):
    model.functions.append(onnx.helper.make_function("com.example", "f", [], [], [], []))


def tensor_without_its_values(model):
    model.graph.initializer[0].dims[:] = [10**9, 10**9]


def tile_bomb(model):
    repeats = onnx.numpy_helper.from_array(np.array([1, 10**4, 10**4, 10]), "repeats")
    model.graph.initializer.append(repeats)
    name = model.graph.input[0].name
    model.graph.node.append(onnx.helper.make_node("Tile", [name, "repeats"], ["tiled"]))


def padded_tile_bomb(model):
    """The tensor that holds the size has too many bytes to be read."""
    tile_bomb(model)
    model.graph.initializer[-1].raw_data += bytes(2000)


def shape_of_many_sides(model):
    """The tensor that holds the size has 200 sides, too many to be read."""
    sides = onnx.numpy_helper.from_array(np.array([1, 10**4, 10**4, 10] + 196 * [1]), "sides")
    model.graph.initializer.append(sides)
    model.graph.node.append(onnx.helper.make_node("Tile", ["wide", "sides"], ["tiled"]))
    wide = onnx.helper.make_tensor("wide", onnx.TensorProto.FLOAT, 200 * [1], [0.0])
    model.graph.initializer.append(wide)


def unknown_size(model):
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "row"))
    for operator, inputs, output, attributes in (
        ("Reshape", [model.graph.input[0].name, "row"], "flat", {}),
        ("Cast", ["flat"], "sizes", {"to": onnx.TensorProto.INT64}),
        ("Reshape", ["flat", "sizes"], "shaped", {}),
    ):
        model.graph.node.append(onnx.helper.make_node(operator, inputs, [output], **attributes))


def add_nodes(model, *nodes):
    """Append nodes, each (operator, inputs, output)."""
    for operator, inputs, output, *attributes in nodes:
        options = attributes[0] if attributes else {}
        model.graph.node.append(onnx.helper.make_node(operator, inputs, [output], **options))


def add_numbers(model, **rows):
    """Append initializers that hold whole numbers."""
    for name, row in rows.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(row), name))


def rename_score(model):
    """Give the file's score another name, so that a new node can make "score" from it."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["true_score" if name == "score" else name for name in names]


def score_by_pixels(model):
    """Declare one score an image, and repeat it as often as the pixels say."""
    rename_score(model)
    add_numbers(model, row=[-1], first=[0], last=[1])
    add_nodes(
        model,
        ("Reshape", [model.graph.input[0].name, "row"], "flat"),
        ("Slice", ["flat", "first", "last"], "pixel"),
        ("Cast", ["pixel"], "repeats", {"to": onnx.TensorProto.INT64}),
        ("Tile", ["true_score", "repeats"], "score"),
    )
    score = next(output for output in model.graph.output if output.name == "score")
    score.type.tensor_type.shape.dim[0].dim_value = 1


def two_scores(model):
    rename_score(model)
    add_numbers(model, repeats=[2])
    add_nodes(model, ("Tile", ["true_score", "repeats"], "score"))


def resize_rows(model, *arithmetic):
    """Resize the images to "rows" rows of images, which `arithmetic` makes of "count"."""
    name = model.graph.input[0].name
    add_numbers(model, first=[0], last=[1], sides=[9, 8, 2])
    add_nodes(model, ("Shape", [name], "shape"), ("Slice", ["shape", "first", "last"], "count"))
    add_nodes(model, *arithmetic)
    add_nodes(
        model,
        ("Concat", ["rows", "sides"], "sizes", {"axis": 0}),
        ("Cast", [name], "images", {"to": onnx.TensorProto.FLOAT}),
        ("Resize", ["images", "", "", "sizes"], "resized"),
    )


def rows_by_rows(model):
    resize_rows(model, ("Mul", ["count", "count"], "rows"))


def rows_from_three_images_on(model):
    """Make 1 + 10,000 (n - 1) (n - 2) rows: 1 for one image and for two."""
    add_numbers(model, one=[1], two=[2], many=[10_000])
    resize_rows(
        model,
        ("Sub", ["count", "one"], "factor_1"),
        ("Sub", ["count", "two"], "factor_2"),
        ("Mul", ["factor_1", "factor_2"], "product"),
        ("Mul", ["product", "many"], "more"),
        ("Add", ["more", "one"], "rows"),
    )


def two_inputs(model):
    model.graph.input.append(model.graph.input[0])
    model.graph.input[1].name = "more"


def floats_in(model):
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def open_size(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "height"


def no_score(model):
    model.graph.output.pop()


def cycle(model):
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def no_metadata(model):
    del model.metadata_props[:]


def set_metadata(name, value):
    def change(model):
        {entry.key: entry for entry in model.metadata_props}[name].value = value

    return change


def texts(model):
    """Make texts of numbers, each of which takes more memory than it counts."""
    add_nodes(model, ("Cast", [model.graph.input[0].name], "texts"))
    model.graph.node[-1].attribute.append(onnx.helper.make_attribute("to", onnx.TensorProto.STRING))


def text(model):
    """Copy a long text many times, each of which counts as eight bytes."""
    constant = onnx.helper.make_tensor("text", onnx.TensorProto.STRING, [1], [b"1" * 10**6])
    model.graph.initializer.append(constant)


HOSTILE = {
    "texts": (texts, "turns numbers into text"),
    "text": (text, "contains text among its numbers"),
    "external data": (external, "another file"),
    "another domain": (of_another_domain, "operator"),
    "imported domain": (imported_domain, "not ONNX's own"),
    "random operator": (random_operator, "'RandomNormal'"),
    "loop": (loop, "'Loop'"),
    "graph inside": (graph_inside, "graph inside an operator"),
    "function": (function, "more than one graph"),
    "huge tensor": (tensor_without_its_values, "GB of memory"),
    "tile bomb": (tile_bomb, "largest output of an operator would take"),
    "padded tile bomb": (padded_tile_bomb, "damaged or of another format"),
    "shape of many sides": (shape_of_many_sides, "damaged or of another format"),
    "unknown size": (unknown_size, "cannot be determined"),
    "score by pixels": (score_by_pixels, "cannot be determined"),
    "two scores": (two_scores, "its answers are not one for each image"),
    "rows by rows": (rows_by_rows, "grows faster than the number of images"),
    "two inputs": (two_inputs, "takes 2 inputs"),
    "floats in": (floats_in, "its input is not images"),
    "open size": (open_size, "its input is not images"),
    "no score": (no_score, "its outputs are not"),
    "cycle": (cycle, "damaged or of another format"),
    "no metadata": (no_metadata, "metadata are damaged"),
    "no class": (set_metadata("classes", "1"), "metadata are damaged"),
    "many classes": (set_metadata("classes", "9" * 5000), "metadata are damaged"),
    "threshold": (set_metadata("threshold", "nan"), "metadata are damaged"),
    "record": (set_metadata("repair_record", "[1"), "JSON cannot be read"),
    "list for a record": (set_metadata("repair_record", "[1]"), "repair record is damaged"),
    "empty record": (set_metadata("repair_record", "{}"), "repair record is damaged"),
    "scale": (set_metadata("input_scale", "0..2"), "metadata are damaged"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused(model, tmp_path, kind):
    change, words = HOSTILE[kind]
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    change(changed)
    path = tmp_path / "d.onnx"
    path.write_bytes(changed.SerializeToString())
    with pytest.raises(InputError, match=re.escape(words)) as error:
        onnx_file.read_detector(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_sizes_that_depend_on_the_batch_are_refused_before_it_runs(model, tmp_path):
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    rows_from_three_images_on(changed)
    path, images = tmp_path / "d.onnx", draw_random((9, 8, 2))
    path.write_bytes(changed.SerializeToString())
    run = onnx_file.read_detector(path).run
    assert len(run(images[:2])["score"]) == 2
    with pytest.raises(InputError, match="grows faster than the number of images"):
        run(images[:3])


def test_changed_bytes_give_answers_or_a_one_line_error(model, tmp_path):
    contents = bytearray(model.SerializeToString())
    rng, path, images = np.random.default_rng(0), tmp_path / "d.onnx", draw_random((9, 8, 2))
    refused = 0
    for _ in range(200):
        changed = contents.copy()
        for index in rng.integers(0, len(contents), rng.integers(1, 9)):
            changed[index] = rng.integers(256)
        path.write_bytes(changed)
        try:
            onnx_file.read_detector(path).run(images[:2])
        except InputError:
            refused += 1
    assert 20 < refused < 200


def test_an_operator_that_fails_on_an_image_is_one_line(model, tmp_path):
    """A reshape whose numbers only fit together for one image."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    add_numbers(changed, one=[1, 144])
    add_nodes(changed, ("Reshape", [changed.graph.input[0].name, "one"], "flat"))
    path = tmp_path / "d.onnx"
    path.write_bytes(changed.SerializeToString())
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: ") as error:
        onnx_file.read_detector(path).run(draw_random((9, 8, 2))[:2])
    assert "\n" not in str(error.value)


def test_classes_that_the_nets_do_not_have_are_refused(model, tmp_path):
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        node.output[:] = [f"true_{x}" if x == "repaired_class" else x for x in node.output]
        node.input[:] = [f"true_{x}" if x == "repaired_class" else x for x in node.input]
    changed.graph.initializer.append(
        onnx.helper.make_tensor("much", onnx.TensorProto.INT32, [], [500])
    )
    add_nodes(changed, ("Add", ["true_repaired_class", "much"], "repaired_class"))
    path = tmp_path / "d.onnx"
    path.write_bytes(changed.SerializeToString())
    judge = onnx_file.read_detector(path).detector(None).judge
    with pytest.raises(InputError, match=r"d\.onnx: answers with a class outside 1\.\.\d+$"):
        judge(draw_random((9, 8, 2))[:2])
