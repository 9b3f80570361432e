"""ONNX files: the tools of ONNX accept them, every runtime computes what the model does, and networks come back."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minikd as kd
from minikd.data import Normalisation
from minikd.errors import ArgumentError, BackendError, ModelFormatError, OutputError
from minikd.export import check_onnx, from_onnx, to_onnx
from minikd.export.network import Layer, Network
from minikd.export.quantise import Quantised, quantise
from minikd.teachers import as_teacher

onnx: Any = pytest.importorskip("onnx", reason="needs onnx: pip install 'minikd[test-teachers]'")

ACTIVATIONS = ("relu", "gelu", "tanh", "sigmoid")
NAMES = ("cat", 'do"g', "naïve ✓", "back\\slash", "new\nline")
OUTPUTS = ["logits", "probabilities", "label"]


def library(name: str) -> Any:
    """An optional library, or a skip that says what is needed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"needs {name}: pip install 'minikd[test-teachers]'")


def mlp(activation: str = "relu", sizes: tuple[int, ...] = (6, 9, 8, 5), mean: float = 2.0, seed: int = 0) -> kd.nn.MLP:
    """A network with biases, a scale and names."""
    rng = np.random.default_rng(seed)
    model = kd.nn.MLP(sizes, activation, seed=seed)
    for parameter in model.parameters()[1::2]:
        parameter.array[...] = rng.normal(size=parameter.shape)
    scale = rng.uniform(0.5, 3, sizes[0]).astype(np.float32)
    model.normalisation = Normalisation((mean * scale * rng.uniform(-1, 1, sizes[0])).astype(np.float32), scale)
    model.class_names = NAMES if sizes[-1] == 5 else None
    model.eval()
    return model


def features(n: int, k: int = 6, seed: int = 1) -> np.ndarray:
    return (3 * np.random.default_rng(seed).normal(size=(n, k))).astype(np.float32)


def exact_logits(model: kd.nn.MLP, x: np.ndarray) -> np.ndarray:
    """The formula in float64."""
    erf = np.vectorize(math.erf, otypes=[float])
    curves: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "relu": lambda z: np.maximum(z, 0),
        "gelu": lambda z: z * (1 + erf(z / math.sqrt(2))) / 2,
        "tanh": np.tanh,
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    }
    scale = model.normalisation
    assert scale is not None
    z = (x.astype(np.float64) - scale.mean) / scale.deviation
    values = [p.array.astype(np.float64) for p in model.parameters()]
    for weight, bias in zip(values[::2], values[1::2], strict=True):
        product = z @ weight.T + bias
        z = curves[model.activation](product)
    return product


def by_runtime(path: Path, x: np.ndarray) -> list[np.ndarray]:
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = runtime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return session.run(OUTPUTS, {"features": x})


def by_reference(path: Path, x: np.ndarray) -> list[np.ndarray]:
    evaluator = library("onnx.reference").ReferenceEvaluator(onnx.load(path))
    return evaluator.run(OUTPUTS, {"features": x})


def accept(path: Path) -> Any:
    """ONNX's own checks, and the model."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return found.shape == wanted.shape and bool((abs(found - wanted) <= 1e-5 * abs(wanted).max(initial=1)).all())


# --- out ---


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("evaluate", [by_runtime, by_reference])
def test_every_runtime_computes_what_the_model_does(evaluate, activation: str, opset: int, tmp_path: Path) -> None:
    model = mlp(activation)
    to_onnx(model, tmp_path / "m.onnx", opset=opset)
    accept(tmp_path / "m.onnx")
    for n in (0, 1, 257):
        x = features(n)
        logits, probabilities, label = evaluate(tmp_path / "m.onnx", x)
        assert (logits.dtype, probabilities.dtype, label.dtype) == (np.float32, np.float32, np.int64)
        assert close(logits, model.logits(x))
        assert close(logits, exact_logits(model, x))
        assert close(probabilities, model.predict_proba(x))
        assert np.array_equal(label, logits.argmax(axis=1))


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=5),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from([0.0, 1.0, 7.0, 1000.0]),
    st.integers(0, 99),
)
def test_networks_of_all_sizes_and_scales_go_out_and_come_back(
    tmp_path_factory, sizes: list[int], activation: str, mean: float, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.onnx"
    model = mlp(activation, tuple(sizes), mean, seed)
    x = (model.normalisation.mean + features(20, sizes[0], seed)).astype(np.float32)
    to_onnx(model, path)
    assert max(check_onnx(path, model, x).values()) <= 1e-5
    back = from_onnx(path)
    assert close(back.logits(x), model.logits(x))
    again = path.with_name("again.onnx")
    to_onnx(back, again)
    assert close(from_onnx(again).logits(x), model.logits(x))


def test_input_and_outputs_are_plain_tensors_for_any_number_of_rows(tmp_path: Path) -> None:
    to_onnx(mlp(), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"features": ["n", 6], "logits": ["n", 5], "probabilities": ["n", 5], "label": ["n"]}


@pytest.mark.parametrize(("opset", "version"), [(13, 7), (17, 8)])
def test_an_opset_comes_in_the_oldest_format_that_has_it(opset: int, version: int, tmp_path: Path) -> None:
    to_onnx(mlp("gelu"), tmp_path / "m.onnx", opset=opset)
    model = onnx.load(tmp_path / "m.onnx")
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert model.ir_version == version


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_a_usual_scale_is_folded_into_the_first_layer(tmp_path: Path) -> None:
    to_onnx(mlp(), tmp_path / "m.onnx")
    assert operators(tmp_path / "m.onnx") == ["Gemm", "Relu", "Gemm", "Relu", "Gemm", "Softmax", "ArgMax"]


def test_features_far_from_zero_lose_no_digits(tmp_path: Path) -> None:
    model = mlp()
    model.normalisation = Normalisation(np.full(6, 2000, np.float32), np.ones(6, np.float32))
    to_onnx(model, tmp_path / "m.onnx")
    assert operators(tmp_path / "m.onnx")[:2] == ["Sub", "Div"]
    x = 2000 + features(100)
    assert close(by_runtime(tmp_path / "m.onnx", x)[0], exact_logits(model, x))


def test_a_deviation_too_small_to_divide_weights_by_stays_outside(tmp_path: Path) -> None:
    model = mlp()
    model.normalisation = Normalisation(np.zeros(6, np.float32), np.full(6, 1e-38, np.float32))
    to_onnx(model, tmp_path / "m.onnx")
    x = np.float32(1e-38) * features(10)
    assert close(by_runtime(tmp_path / "m.onnx", x)[0], exact_logits(model, x))


@pytest.mark.parametrize("name", [*NAMES, "", "\ud800", "a,b", "[]"])
def test_names_of_classes_survive_whatever_they_are(name: str, tmp_path: Path) -> None:
    model = mlp()
    model.class_names = ("a", "b", name, "c", "d")
    to_onnx(model, tmp_path / "m.onnx")
    (entry,) = onnx.load(tmp_path / "m.onnx").metadata_props
    assert (entry.key, json.loads(entry.value)) == ("class_names", list(model.class_names))
    assert from_onnx(tmp_path / "m.onnx").class_names == model.class_names


def test_the_same_model_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    to_onnx(mlp("gelu"), tmp_path / "m.onnx")
    code = f"from test_onnx import *; to_onnx(mlp('gelu'), Path({str(tmp_path / 'other.onnx')!r}))"
    paths = os.pathsep.join([str(Path(kd.__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert len(digests) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_network_with_different_activations_goes_out_too(tmp_path: Path) -> None:
    nn = kd.nn
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 4, bias=False), nn.GELU())
    model = nn.Sequential(model, nn.Linear(4, 5)).eval()
    to_onnx(model, tmp_path / "m.onnx")
    assert close(by_runtime(tmp_path / "m.onnx", features(9))[0], model.logits(features(9)))
    with pytest.raises(ModelFormatError, match="got tanh, gelu, none"):
        from_onnx(tmp_path / "m.onnx")


def test_an_exported_model_can_teach(tmp_path: Path) -> None:
    library("onnxruntime")
    to_onnx(mlp(), tmp_path / "m.onnx")
    teacher = as_teacher(tmp_path / "m.onnx")
    assert (teacher.gives, teacher.output) == ("logits", "logits")
    assert close(teacher.logits(features(9)), mlp().logits(features(9)))


def test_what_cannot_be_written_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(ArgumentError, match="opset must be 13 or 17, got 12"):
        to_onnx(mlp(), path, opset=12)
    with pytest.raises(ArgumentError, match="Linear layers"):
        to_onnx(kd.nn.Sequential(kd.nn.ReLU()), path)
    huge = Layer(np.broadcast_to(np.float32(0), (2**15, 2**15)), np.zeros(2**15, np.float32), "")
    ones = np.ones(2**15, np.float32)
    with pytest.raises(ArgumentError, match=r"below 2 GiB, got 4\.0 GiB"):
        to_onnx(Network((huge,), ones, ones, ()), path)
    with pytest.raises(OutputError, match="that can be written"):
        to_onnx(mlp(), tmp_path / "none" / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendError, match=r"to_onnx: onnx must be installed.*minikd\[onnx\]"):
        to_onnx(mlp(), path)
    with pytest.raises(BackendError, match="from_onnx: onnx"):
        from_onnx(path)
    assert not list(tmp_path.iterdir())


# --- int8 ---


def in_int8(activation: str, sizes: tuple[int, ...] = (6, 9, 8, 5)) -> Quantised:
    return quantise(Network.of(mlp(activation, sizes)), features(300, sizes[0]))


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_int8_file_is_within_a_step_of_our_integers(activation: str, opset: int, tmp_path: Path) -> None:
    network = in_int8(activation)
    to_onnx(network, tmp_path / "m.onnx", opset=opset)
    accept(tmp_path / "m.onnx")
    steps = check_onnx(tmp_path / "m.onnx", network, features(400, seed=5))
    assert max(steps.values()) <= 1.01
    for n in (0, 1, 257):
        logits, _, label = by_runtime(tmp_path / "m.onnx", features(n))
        integers = np.rint(logits / network.output.scale) + network.output.zero
        assert abs(integers - network.integers(network.quantise_input(features(n)))).max(initial=0) <= 1
        assert np.array_equal(label, logits.argmax(axis=1))


def test_an_int8_file_holds_integers_and_float32_only_where_there_are_scales(tmp_path: Path) -> None:
    network = in_int8("relu")
    to_onnx(network, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    for k, layer in enumerate(network.layers):
        assert np.array_equal(tensors[f"layer{k}.weight.integers"], layer.weight)
        assert tensors[f"layer{k}.weight.integers"].dtype == np.int8
        assert np.array_equal(tensors[f"layer{k}.weight.scale"], layer.weight_scale)
        assert tensors[f"layer{k}.bias.integers"].dtype == np.int32
        assert not tensors[f"layer{k}.weight.zero"].any()
    floats = {name for name, t in tensors.items() if t.dtype == np.float32 and not name.endswith(".scale")}
    assert floats == {"mean", "deviation"}
    assert json.loads(onnx.load(tmp_path / "m.onnx").metadata_props[0].value) == list(NAMES)


def test_ties_of_int8_logits_go_to_the_first_class(tmp_path: Path) -> None:
    layer = Layer(np.ones((3, 2), np.float32), np.zeros(3, np.float32), "")
    plain = np.zeros(2, np.float32), np.ones(2, np.float32)
    network = quantise(Network((layer,), *plain, ("a", "b", "c")), features(50, 2))
    to_onnx(network, tmp_path / "m.onnx")
    assert "Sub" not in operators(tmp_path / "m.onnx")
    assert not by_runtime(tmp_path / "m.onnx", features(20, 2))[2].any()
    assert not network.predict(features(20, 2)).any()


# --- checking a file ---


def test_a_file_of_another_model_does_not_pass(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    to_onnx(mlp(seed=1), path)
    with pytest.raises(
        ModelFormatError, match=r"within 1e-05 of the largest of the model's logits, got .*, by onnx.reference"
    ):
        check_onnx(path, mlp(seed=2), features(9))
    with pytest.raises(ModelFormatError, match="within a step of the model's logits"):
        check_onnx(path, in_int8("relu"), features(9))
    with pytest.raises(ModelFormatError, match=r"logits of shape \(9, 4\), got shape \(9, 5\)"):
        check_onnx(path, mlp(sizes=(6, 4)), features(9))
    path.with_name("x.onnx").write_bytes(graph_of(FIRST, ("Relu",), LAST).SerializeToString())
    with pytest.raises(ModelFormatError, match=r"one that onnx.reference can run"):
        check_onnx(path.with_name("x.onnx"), mlp(), features(9))
    assert check_onnx(path, Network.of(mlp(seed=1)), features(9))["onnx.reference"] <= 1e-5
    with pytest.raises(ArgumentError, match="rows of features"):
        check_onnx(path, mlp(), features(0))


def test_probabilities_and_labels_must_follow_from_the_logits(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    to_onnx(mlp(), path)
    model = onnx.load(path)
    model.graph.node[-2].op_type = "LogSoftmax"
    onnx.save(model, path)
    with pytest.raises(ModelFormatError, match="follow from the logits, got others"):
        check_onnx(path, mlp(), features(9))


def test_what_onnx_does_not_accept_does_not_pass(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for content in (b"", b"no model", None):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ModelFormatError, match="passes ONNX's checks"):
            check_onnx(path if content is not None else tmp_path / "none", mlp(), features(9))


# --- in ---


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mean", [1.0, 1000.0])
def test_a_network_comes_back_and_goes_out_as_the_same_bytes(activation: str, mean: float, tmp_path: Path) -> None:
    model = mlp(activation, mean=mean)
    model.normalisation = Normalisation(model.normalisation.mean, np.ones(6, np.float32))
    to_onnx(model, tmp_path / "a.onnx")
    back = from_onnx(tmp_path / "a.onnx")
    assert (back.sizes, back.activation, back.class_names) == (model.sizes, activation, NAMES)
    assert not back.training
    assert close(back.logits(features(50)), model.logits(features(50)))
    to_onnx(back, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert np.array_equal(from_onnx((tmp_path / "a.onnx").read_bytes()).logits(features(9)), back.logits(features(9)))


RNG = np.random.default_rng(3)
W1, B1 = RNG.normal(size=(6, 4)).astype(np.float32), RNG.normal(size=4).astype(np.float32)
W2, B2 = RNG.normal(size=(4, 3)).astype(np.float32), RNG.normal(size=3).astype(np.float32)
Step = tuple[Any, ...]  # operator, constants and {attributes}; None stands for what came before
FIRST: Step = ("Gemm", None, W1, B1)
LAST: Step = ("Gemm", None, W2, B2)


def graph_of(*steps: Step, opset: int = 20, metadata: dict[str, str] | None = None) -> Any:
    """A ModelProto of steps one after the other, with "x" before them and what the last one gives as output."""
    helper = onnx.helper
    nodes, tensors, at = [], [], "x"
    for k, (operator, *operands) in enumerate(steps):
        attributes = operands.pop() if operands and isinstance(operands[-1], dict) else {}
        inputs = []
        for operand in operands or [None]:
            if isinstance(operand, str) or operand is None:
                inputs.append(at if operand is None else operand)
            else:
                tensors.append(onnx.numpy_helper.from_array(np.asarray(operand), f"t{len(tensors)}"))
                inputs.append(tensors[-1].name)
        nodes.append(helper.make_node(operator, inputs, [at := f"v{k}"], name=f"n{k}", **attributes))
    value = helper.make_tensor_value_info
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "g", [value("x", kind, ["n", 6])], [value(at, kind, ["n", "c"])], initializer=tensors
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    return model


F32 = np.float32
GELU_AS_PYTORCH: tuple[Step, ...] = (
    FIRST,
    ("Div", None, F32(math.sqrt(2))),
    ("Erf",),
    ("Add", None, F32(1)),
    ("Mul", "v0", None),
    ("Mul", None, F32(0.5)),
    LAST,
)
GELU_OTHERWISE: tuple[Step, ...] = (
    FIRST,
    ("Mul", F32(math.sqrt(0.5)), None),
    ("Erf",),
    ("Add", F32([1]), None),
    ("Mul", None, F32(0.5)),
    ("Mul", None, "v0"),
    LAST,
)


@pytest.mark.parametrize(
    "steps",
    [
        (FIRST, ("Relu",), LAST, ("Softmax", None, {"axis": 1})),
        (("MatMul", None, W1), ("Add", None, B1), ("Tanh",), ("MatMul", None, W2), ("Add", B2, None)),
        (("MatMul", None, W1), ("Sigmoid",), ("MatMul", None, W2), ("LogSoftmax",)),
        (("Gemm", None, W1, B1[None]), ("Relu",), ("Gemm", None, W2.T.copy(), F32(3), {"transB": 1})),
        (("Sub", None, B1[0]), ("Div", None, abs(RNG.normal(size=6)).astype(F32)), FIRST, ("Relu",), LAST),
        (("Add", None, RNG.normal(size=(1, 6)).astype(F32)), ("Mul", F32(0.25), None), ("Gemm", None, W1)),
        (FIRST, ("Gelu",), LAST),
        GELU_AS_PYTORCH,
        GELU_OTHERWISE,
    ],
    ids=lambda steps: "-".join(step[0] for step in steps),
)
def test_what_other_programs_write_with_these_operators_is_understood(steps: tuple[Step, ...]) -> None:
    model = graph_of(*steps)
    found = from_onnx(model.SerializeToString())
    inner = graph_of(*(step for step in steps if "oftmax" not in step[0]))
    (wanted,) = library("onnx.reference").ReferenceEvaluator(inner).run(None, {"x": features(20)})
    assert close(found.logits(features(20)), wanted)


def test_constants_may_be_nodes_and_numbers_of_other_precisions() -> None:
    model = graph_of(("MatMul", None, W1.astype(np.float64)), ("Relu",), ("MatMul", None, W2.astype(np.float16)))
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    for tensor in reversed(tensors):
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
    wanted = np.maximum(features(9) @ W1, 0) @ W2.astype(np.float16).astype(F32)
    assert close(from_onnx(model.SerializeToString()).logits(features(9)), wanted)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((FIRST, ("LeakyRelu",), LAST), "node 'n1' must be one of Gemm.*got LeakyRelu"),
        ((FIRST, ("Gelu", None, {"approximate": "tanh"}), LAST), "'n1' must be the exact Gelu"),
        ((("Gemm", None, W1, B1, {"alpha": 0.5}),), "'n0' must be a Gemm with alpha 1.*got alpha 0.5"),
        ((("MatMul", W1.T.copy(), W1),), "made of the input 'x', got a constant"),
        ((("MatMul", None, None),), "'n0' must be with a constant matrix"),
        ((("Gemm", None, W1, None),), "'n0' must be with a constant bias for 4"),
        ((FIRST, ("Gemm", None, W1)), r"layer 1 must be of weights \(m, 4\)"),
        ((FIRST, LAST), "the activations must be one after each layer but the last.*got none, none"),
        ((FIRST, ("Relu",), LAST, ("Relu",)), "the activations .*got relu, relu"),
        ((FIRST, ("Relu",), ("Gemm", None, W1[:4].copy(), B1), ("Tanh",), LAST), "got relu, tanh"),
        ((FIRST, ("Relu",), ("Tanh",), LAST), "'n2' must be behind Gemm"),
        ((("Relu",), FIRST), "'n0' must be behind Gemm"),
        ((FIRST, ("Add", None, B1), LAST), "'n0' must be part of a layer.*got Gemm"),
        ((("Div", F32(1), None), FIRST), "'n0' must be part of a layer.*got Div"),
        ((("Mul", None, F32(0)), FIRST), "the scale of the features must be finite"),
        ((("Mul", None, F32(-1)), FIRST), "factors above 0"),
        ((("Sub", F32(1), None), FIRST), "factors above 0"),
        ((("Sub", None, np.zeros(5, F32)), FIRST), "numbers for 6 features, got 5"),
        ((("Sub", None, np.zeros(6, F32)), ("Div", None, np.ones(5, F32)), FIRST), "'n1' must be with as many numbers"),
        ((("Sub", None, np.zeros((6, 1), F32)), FIRST), "'n0' must be with a constant for all rows"),
        ((FIRST, ("Softmax", None, {"axis": 0})), "'n1' must be along the classes"),
        ((FIRST, ("ArgMax", None, {})), "'n1' must be along the classes"),
        ((("Gemm", None, np.full((6, 4), np.nan, F32), B1),), "layer 0 must be of finite float32 numbers"),
        ((("Gemm", None, np.full((6, 4), 1e300), B1),), "layer 0 must be of finite float32 numbers"),
        ((("MatMul", None, np.ones((6, 4), np.int32)),), "must be of FLOAT, FLOAT16, DOUBLE"),
        ((("Relu",),), "'n0' must be behind Gemm"),
        ((("Softmax",),), "the network must be one with layers"),
        ((FIRST, ("Erf",), LAST), "'n1' must be part of a layer.*got Erf"),
    ],
)
def test_what_is_no_mlp_is_refused_by_the_name_of_its_node(steps: tuple[Step, ...], words: str) -> None:
    with pytest.raises(ModelFormatError, match=words):
        from_onnx(graph_of(*steps).SerializeToString())


def test_a_product_of_nothing_but_products_is_refused_at_once() -> None:
    squares: list[Step] = [("Mul", None, None)] * 200
    with pytest.raises(ModelFormatError, match="'n200' must be part of a layer"):
        from_onnx(graph_of(FIRST, *squares).SerializeToString())


def changed(change: Callable[[Any], Any], *steps: Step) -> bytes:
    model = graph_of(*(steps or (FIRST, ("Relu",), LAST)))
    change(model)
    return model.SerializeToString()


def outside(model: Any) -> None:
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "/etc/hostname")
    model.graph.initializer[0].ClearField("raw_data")


def second_input(model: Any) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1]))


def second_output(model: Any) -> None:
    model.graph.output.append(onnx.helper.make_tensor_value_info("v0", onnx.TensorProto.FLOAT, ["n", 4]))


def cycle(model: Any) -> None:
    model.graph.node[0].input[0] = "v1"


def constant_of_texts(model: Any) -> None:
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], value_string="x"))


def other_domain(model: Any) -> None:
    model.graph.node[1].domain = "com.example"


def class_names(text: str) -> Callable[[Any], Any]:
    return lambda model: onnx.helper.set_model_props(model, {"class_names": text})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (outside, r"tensor 't0' must be in the file itself.*external data.*onnx\.save"),
        (second_input, "the inputs must be one, the features, got x, y"),
        (second_output, "the outputs must be made of the same logits, got v0, v2"),
        (cycle, "keeps the rules of ONNX"),
        (constant_of_texts, "'c' must be a Constant with a tensor"),
        (other_domain, "got com.example.Relu"),
        (class_names('["a"]'), "the names of the classes must be 3 names, got 1"),
        (class_names("["), "class_names must be a JSON list of texts"),
        (class_names("[1, 2, 3]"), "class_names must be a JSON list of texts"),
        (lambda m: m.graph.initializer[0].ClearField("raw_data"), "keeps the rules|a whole one"),
        (lambda m: m.graph.sparse_initializer.add(), "dense"),
        (lambda m: setattr(m.opset_import[0], "version", 6), "7 or newer, got 6"),
        (lambda m: setattr(m, "ir_version", 1000), "keeps the rules of ONNX"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused(change: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(ModelFormatError, match=words):
        from_onnx(changed(change))


def test_an_int8_file_is_refused_with_the_advice_to_take_the_other(tmp_path: Path) -> None:
    to_onnx(in_int8("relu"), tmp_path / "m.onnx")
    with pytest.raises(ModelFormatError, match=r"got QuantizeLinear\. Import the float32 model"):
        from_onnx(tmp_path / "m.onnx")


def test_bytes_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="the file must be readable"):
        from_onnx(tmp_path / "none.onnx")
    whole = graph_of(FIRST).SerializeToString()
    for cut in itertools.chain(range(0, len(whole), 7), [len(whole) - 1]):
        with pytest.raises(ModelFormatError):
            from_onnx(whole[:cut])


@given(st.data())
def test_a_damaged_file_comes_in_or_is_refused_but_nothing_else(data: st.DataObject) -> None:
    raw = bytearray(graph_of(*GELU_AS_PYTORCH).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ModelFormatError):  # any other exception is a failure
        from_onnx(bytes(raw))
