"""Networks in ONNX files: raw features in, logits, probabilities and a label out.

An int8 network is written in the form called QDQ: whatever it holds as int8 goes through QuantizeLinear and
DequantizeLinear, with operators of float32 in between, which a runtime may then compute in integers.

Source: the operators and the format of the ONNX project, opsets 13 and 17.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

import minikd
from minikd.errors import ArgumentError
from minikd.export.network import Layer, Network
from minikd.export.quantise import Affine, Quantised, QuantisedLayer
from minikd.nn import Module
from minikd.safetensors import write_whole
from minikd.teachers.teacher import library

__all__ = ["CLASS_NAMES", "OUTPUTS", "to_onnx"]

# Opset → version of the format: the oldest that knows it, so that old programs read the file too.
OPSETS = {13: 7, 17: 8}
INPUT, OUTPUTS = "features", ("logits", "probabilities", "label")
CLASS_NAMES = "class_names"  # the metadata's key for a JSON list of texts
OPERATORS = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}
# Weights that take in the scale are rounded as if features were |mean| / deviation times larger: three bits at most.
FURTHEST_MEAN = 8.0
LARGEST = 2**31 - 2**16  # bytes of weights: a protocol buffer ends at 2 GiB


def to_onnx(source: Module | Network | Quantised, path: str | os.PathLike[str], *, opset: int = 13) -> None:
    """Write a model as one ONNX file; the same model gives the same bytes.

    Input `features` (n, k) float32, raw, for any n. Outputs `logits` (n, c) and `probabilities` (n, c) float32 and
    `label` (n,) int64, the first of the most probable classes. The scale of the features is folded into the first
    layer, or stands before it as Sub and Div where a mean is more than 8 deviations from 0, which float32 weights
    would not hold well. The names of the classes are in the metadata, as a JSON list under `class_names`.

    An int8 file gives what the integers of `Quantised` give, within a step but for a logit in a thousand. On x86
    processors without VNNI that asks for onnxruntime's session option `session.x64quantprecision` to be "1", or sums of
    its own integers may saturate.

    Parameters
    ----------
    source : a model (an MLP, or a Sequential of Linear layers and activations), a Network, or one in int8, whose
        scale always stands before the first layer.
    opset : 13, in version 7 of the format, or 17, in version 8.

    Raises
    ------
    ArgumentError : another opset; a model of other parts; weights of 2 GiB or more.
    BackendError : the package onnx is not installed.  OutputError : the file cannot be written.
    """
    if opset not in OPSETS:
        expected = " or ".join(str(k) for k in OPSETS)
        raise ArgumentError("to_onnx", "opset", expected=expected, got=repr(opset))
    network = Network.of(source) if isinstance(source, Module) else source
    size = sum(layer.weight.nbytes for layer in network.layers)
    if size > LARGEST:
        raise ArgumentError("to_onnx", "source", expected="a model below 2 GiB", got=f"{size / 2**30:.1f} GiB")
    graph = _Graph()
    if isinstance(network, Quantised):
        _quantised_logits(graph, network)
    else:
        _logits(graph, network)
    write_whole(Path(path), graph.model(network, opset).SerializeToString(deterministic=True))


class _Graph:
    """A graph that grows node by node; every value is named by the node's output."""

    def __init__(self) -> None:
        self.onnx = library("onnx", "onnx", "to_onnx")
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, operator: str, inputs: tuple[str, ...], output: str, **attributes: Any) -> str:
        """One node; returns its output's name."""
        self.nodes.append(
            self.onnx.helper.make_node(operator, inputs, [output], name=f"{output}:{operator}", **attributes)
        )
        return output

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        """A tensor that is part of the model; returns its name."""
        array = np.ascontiguousarray(values, dtype).reshape(np.shape(values))
        self.constants.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def model(self, network: Network | Quantised, opset: int) -> Any:
        """The ModelProto: these nodes, which put out "logits", and what follows from the logits."""
        logits, probabilities, label = OUTPUTS
        self.add("Softmax", (logits,), probabilities, axis=1)
        self.add("ArgMax", (logits,), label, axis=1, keepdims=0)
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        rows, features, classes = "n", network.sizes[0], network.sizes[-1]
        value = helper.make_tensor_value_info
        inputs = [value(INPUT, kinds.FLOAT, [rows, features])]
        outputs = [value(name, kinds.FLOAT, [rows, classes]) for name in (logits, probabilities)]
        outputs.append(value(label, kinds.INT64, [rows]))
        graph = helper.make_graph(self.nodes, "minikd", inputs, outputs, initializer=self.constants)
        model = helper.make_model(
            graph,
            ir_version=OPSETS[opset],
            opset_imports=[helper.make_opsetid("", opset)],
            producer_name="minikd",
            producer_version=minikd.__version__,
        )
        helper.set_model_props(model, {CLASS_NAMES: json.dumps(network.class_names)})
        return model


def _logits(graph: _Graph, network: Network) -> None:
    """The nodes from "features" to "logits" in float32."""
    x = INPUT
    if _folds_well(network):
        network = network.folded()
    else:
        x = _normalised(graph, x, network)
    for k, layer in enumerate(network.layers):
        last = k == len(network.layers) - 1
        x = _product(graph, x, layer, f"layer{k}", OUTPUTS[0] if last else f"layer{k}")
        if layer.activation:
            x = _activated(graph, x, layer.activation)


def _folds_well(network: Network) -> bool:
    """Whether float32 weights can take in the scale: no mean is far from 0, and no quotient overflows."""
    near = (abs(network.mean) <= FURTHEST_MEAN * network.deviation).all()
    largest = np.abs(network.layers[0].weight).max() / network.deviation.astype(np.float64).min()
    return bool(near and largest < np.finfo(np.float32).max)


def _normalised(graph: _Graph, x: str, network: Network | Quantised) -> str:
    """(x - mean) / deviation, as predictions compute it."""
    centred = graph.add("Sub", (x, graph.constant("mean", network.mean)), "centred")
    return graph.add("Div", (centred, graph.constant("deviation", network.deviation)), "normalised")


def _product(graph: _Graph, x: str, layer: Layer, name: str, output: str) -> str:
    weight, bias = graph.constant(f"{name}.weight", layer.weight), graph.constant(f"{name}.bias", layer.bias)
    return graph.add("Gemm", (x, weight, bias), output, transB=1)


def _activated(graph: _Graph, x: str, activation: str) -> str:
    """An activation after the value x."""
    output = f"{x}.{activation}"
    if activation in OPERATORS:
        return graph.add(OPERATORS[activation], (x,), output)
    # x·Φ(x) = x · (1 + erf(x / √2)) · ½: the operator Gelu came with opset 20.
    root, one, half = (f"{output}.{part}" for part in ("root", "one", "half"))
    scaled = graph.add("Div", (x, graph.constant(root, math.sqrt(2))), f"{output}.scaled")
    error = graph.add("Erf", (scaled,), f"{output}.erf")
    twice = graph.add("Add", (error, graph.constant(one, 1)), f"{output}.twice")
    product = graph.add("Mul", (x, twice), f"{output}.product")
    return graph.add("Mul", (product, graph.constant(half, 0.5)), output)


# --- int8 ---


def _quantised_logits(graph: _Graph, network: Quantised) -> None:
    """The nodes from "features" to "logits" in int8."""
    x = INPUT
    if network.mean.any() or (network.deviation != 1).any():
        x = _normalised(graph, x, network)
    x = _in_int8(graph, x, network.input, "layer0.input")
    for k, layer in enumerate(network.layers):
        last = k == len(network.layers) - 1
        x = _quantised_layer(graph, x, layer, f"layer{k}", OUTPUTS[0] if last else f"layer{k}.output")


def _quantised_layer(graph: _Graph, x: str, layer: QuantisedLayer, name: str, output: str) -> str:
    """A product of int8 tensors and its activation: ReLU as part of the product, others from int8 to int8."""
    steps = np.float32(layer.input.scale) * layer.weight_scale
    weight = _of_integers(graph, f"{name}.weight", layer.weight, layer.weight_scale)
    bias = _of_integers(graph, f"{name}.bias", layer.bias, steps)
    x = graph.add("Gemm", (x, weight, bias), f"{name}.sum", transB=1)
    if layer.activation == "relu":
        x = _activated(graph, x, layer.activation)
    if layer.table is None:
        return _in_int8(graph, x, layer.output, output)
    x = _in_int8(graph, x, layer.product, f"{name}.product")
    return _in_int8(graph, _activated(graph, x, layer.activation), layer.output, output)


def _of_integers(graph: _Graph, name: str, values: np.ndarray, scale: np.ndarray) -> str:
    """A tensor held in integers, with a scale for each of its first axis.

    The zero points are all 0, which is what missing ones mean; but onnxruntime 1.17 to 1.22 fails without them.
    """
    integers, scales = graph.constant(f"{name}.integers", values, values.dtype), graph.constant(f"{name}.scale", scale)
    zeros = graph.constant(f"{name}.zero", np.zeros(len(values)), values.dtype)
    return graph.add("DequantizeLinear", (integers, scales, zeros), name, axis=0)


def _in_int8(graph: _Graph, x: str, form: Affine, output: str) -> str:
    """What of a value x survives in int8."""
    scale = graph.constant(f"{output}.scale", form.scale)
    zero = graph.constant(f"{output}.zero", form.zero, np.int8)
    integers = graph.add("QuantizeLinear", (x, scale, zero), f"{output}.integers")
    return graph.add("DequantizeLinear", (integers, scale, zero), output)
