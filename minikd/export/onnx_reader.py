"""ONNX files in: a network's weights from the graph that other programs write, or `to_onnx` wrote."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from minikd.errors import ModelFormatError
from minikd.export.assembly import Scale, assembled, real
from minikd.export.network import NO_ACTIVATION, Layer
from minikd.export.onnx import CLASS_NAMES, OPERATORS
from minikd.nn import MLP
from minikd.teachers.teacher import library

__all__ = ["from_onnx"]

ACTIVATIONS = {operator: name for name, operator in OPERATORS.items()} | {"Gelu": "gelu"}
SCALING = ("Sub", "Div", "Mul", "Add")
ENDINGS = ("Softmax", "LogSoftmax", "ArgMax")
KNOWN = ("Gemm", "MatMul", *ACTIVATIONS, "Erf", *SCALING, *ENDINGS, "Constant")
OLDEST_OPSET = 7  # since when operators broadcast as NumPy does
FLOATS = ("FLOAT", "FLOAT16", "DOUBLE")  # of weights
GELU_FACTORS = 3  # x, 1 + erf(x / √2), ½
CLOSE = 1e-3  # as far as constants may be from √2, 1 and ½, which float16 rounds


def from_onnx(source: str | os.PathLike[str] | bytes) -> MLP:
    """An MLP from an ONNX file, ready to predict from raw features; nothing in the file is executed.

    Understood are the networks that `to_onnx` writes in float32, and those that others make of the same operators:
    Gemm, or MatMul and Add, with Relu, Tanh, Sigmoid or Gelu between them (GELU also as Div, Erf, Add and Mul), and
    Sub, Div, Mul and Add of constants before them. Softmax, LogSoftmax and ArgMax at the end are left out. Weights
    become float32. A JSON list of texts under `class_names` in the metadata names the classes.

    Parameters
    ----------
    source : the file, or its bytes.

    Raises
    ------
    ModelFormatError : another operator, named with its node; weights in other files; no ONNX model at all.
    BackendError : the package onnx is not installed.
    """
    return _Reader(source).model()


class _Product(NamedTuple):
    """weight·data + bias, with the name of what goes in."""

    data: str
    weight: np.ndarray
    bias: np.ndarray


class _Operand(NamedTuple):
    """The inputs of a node of which one is a constant: the names of both, and whether the constant comes first."""

    data: str
    constant: str
    first: bool


class _Reader:
    """A graph that is read from its outputs back to its input."""

    def __init__(self, source: str | os.PathLike[str] | bytes) -> None:
        self.onnx = library("onnx", "onnx", "from_onnx")
        self.path = "the ONNX model" if isinstance(source, bytes) else str(source)
        self.proto = self._parsed(source)
        graph = self.proto.graph
        self.tensors = {t.name: t for t in graph.initializer}
        self.producers: dict[str, Any] = {}
        for node in graph.node:
            if node.domain not in ("", "ai.onnx") or node.op_type not in KNOWN:
                self.refuse_node(node, "one of " + ", ".join(KNOWN))
            if node.op_type == "Constant":
                self.tensors |= dict.fromkeys(node.output, self._value(node))
            self.producers |= dict.fromkeys(node.output, node)
        if graph.sparse_initializer:
            self.refuse("the tensors", "dense", "sparse ones")
        for name, tensor in self.tensors.items():
            if tensor.external_data or tensor.data_location == tensor.EXTERNAL:
                fix = "Save the model in one file: onnx.save(onnx.load(path), path), which keeps the weights inside."
                self.refuse(f"tensor {name!r}", "in the file itself", "one in another file (external data)", fix)
        self._check()
        inputs = [i.name for i in graph.input if i.name not in self.tensors]
        if len(inputs) != 1:
            self.refuse("the inputs", "one, the features", ", ".join(map(str, inputs)) or "none")
        self.input = inputs[0]

    def refuse(self, part: str, expected: str, got: object, fix: str = "") -> NoReturn:
        got = str(got)[:300].rstrip(". \n")  # a text that is not UTF-8 comes as bytes
        raise ModelFormatError(
            "from_onnx", f"{self.path}: {part}", expected=expected, got=got[:300].rstrip(". \n"), fix=fix
        )

    def refuse_node(self, node: Any, expected: str, got: str = "") -> NoReturn:
        name = node.name or (node.output[0] if node.output else "")
        fix = (
            "Import the float32 model, of which this is a form for predictions."
            if "eLinear" in str(node.op_type)
            else ""
        )
        self.refuse(f"node {name!r}", expected, got or f"{node.domain}{'.' if node.domain else ''}{node.op_type}", fix)

    # --- the file ---

    def _parsed(self, source: str | os.PathLike[str] | bytes) -> Any:
        try:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
        except OSError as error:
            self.refuse("the file", "readable", error)
        try:
            return self.onnx.load_model_from_string(data)
        except Exception as error:  # of whichever implementation of protocol buffers is installed
            self.refuse("the file", "an ONNX model", f"other bytes ({type(error).__name__})")

    def _value(self, node: Any) -> Any:
        """The tensor of a node Constant."""
        values = [a.t for a in node.attribute if a.name == "value"]
        if len(values) != 1:
            self.refuse_node(node, "a Constant with a tensor as its value", "one of another kind")
        return values[0]

    def _check(self) -> None:
        """The rules of ONNX, which make sure that a value is made once, and before it is used."""
        opset = next((o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), 0)
        if opset < OLDEST_OPSET:
            self.refuse("the opset", f"{OLDEST_OPSET} or newer", opset)
        try:
            self.onnx.checker.check_model(self.proto)
        except Exception as error:  # ValidationError, and what protocol buffers raise
            self.refuse("the model", "one that keeps the rules of ONNX", error)

    def _class_names(self) -> list[str] | None:
        text = next((p.value for p in self.proto.metadata_props if p.key == CLASS_NAMES), None)
        if text is None:
            return None
        try:
            names = json.loads(text)
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self.refuse(CLASS_NAMES, "a JSON list of texts", text)
        return names

    # --- the graph, from the end ---

    def model(self) -> MLP:
        """The MLP that was found."""
        layers: list[Layer] = []
        at = self._logits()
        while True:
            before, activation = self._before_activation(at)
            product = self._product(before)
            if product is None:
                break
            layers.insert(0, Layer(real(product.weight), real(product.bias), activation))
            at = product.data
        if activation:
            self.refuse_node(self.producers[at], "behind Gemm, or MatMul and Add")
        return assembled(layers, self._scale(at), self._class_names(), self.refuse)

    def _logits(self) -> str:
        """The one value from which all outputs follow."""
        found = set()
        for output in self.proto.graph.output:
            at = output.name
            while (node := self.producers.get(at)) is not None and node.op_type in ENDINGS:
                default = -1 if node.op_type != "ArgMax" else 0
                if self._attributes(node).get("axis", default) not in (1, -1):
                    self.refuse_node(node, "along the classes", f"{node.op_type} along another axis")
                at = node.input[0]
            found.add(at)
        if len(found) != 1:
            self.refuse("the outputs", "made of the same logits", ", ".join(sorted(map(str, found))) or "none")
        return found.pop()

    def _before_activation(self, at: str) -> tuple[str, str]:
        """What goes into the activation that makes a value, and its name; the value itself and "" if none does."""
        node = self.producers.get(at)
        if node is not None and node.op_type in ACTIVATIONS:
            if self._attributes(node).get("approximate", b"none") != b"none":
                self.refuse_node(node, "the exact Gelu", "one that is approximated by tanh")
            return node.input[0], ACTIVATIONS[node.op_type]
        before = self._before_gelu(at)
        return (at, NO_ACTIVATION) if before is None else (before, "gelu")

    def _before_gelu(self, at: str) -> str | None:
        """x where a value is x · (1 + erf(x / √2)) · ½, in whatever order the factors come."""
        factors = self._factors(at)
        numbers = [name for name in factors if name in self.tensors]
        others = [name for name in factors if name not in self.tensors]
        if len(others) != 2 or len(numbers) != 1 or not self._is(numbers[0], 0.5):
            return None
        for x, share in (others, others[::-1]):
            node = self.producers.get(self._apart(share, "Add", 1.0) or "")
            if node is not None and node.op_type == "Erf":
                inner = node.input[0]
                if x in (self._apart(inner, "Div", math.sqrt(2)), self._apart(inner, "Mul", math.sqrt(0.5))):
                    return x
        return None

    def _factors(self, at: str) -> list[str]:
        """The values that are multiplied to make this one, where they are as few as GELU's."""
        factors = [at]
        while len(factors) <= GELU_FACTORS:
            products = [k for k, name in enumerate(factors) if self._operator(name) == "Mul"]
            if not products:
                return factors
            factors[products[0] : products[0] + 1] = self.producers[factors[products[0]]].input
        return []

    def _apart(self, at: str, operator: str, number: float) -> str | None:
        """The other operand, where a value is made by this operator with this number."""
        operand = self._operand(self.producers[at]) if self._operator(at) == operator else None
        if operand is None or (operator == "Div" and operand.first) or not self._is(operand.constant, number):
            return None
        return operand.data

    def _product(self, at: str) -> _Product | None:
        """The layer whose product a value is."""
        operator = self._operator(at)
        if not operator:
            return None
        node = self.producers[at]
        if operator == "Gemm":
            return self._gemm(node)
        if operator == "MatMul":
            weight = self._weights(node)
            return _Product(node.input[0], weight.T, np.zeros(weight.shape[-1]))
        operand = self._operand(node) if operator == "Add" else None
        if operand is None or self._operator(operand.data) != "MatMul":
            return None
        inner = self.producers[operand.data]
        weight = self._weights(inner)
        return _Product(inner.input[0], weight.T, self._bias(node, operand.constant, weight.shape[1]))

    def _gemm(self, node: Any) -> _Product:
        attributes = self._attributes(node)
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        if any(attributes.get(name, value) != value for name, value in plain.items()):
            got = ", ".join(f"{name} {attributes[name]}" for name in plain if name in attributes)
            self.refuse_node(node, "a Gemm with alpha 1, beta 1 and transA 0", got)
        weight = self._weights(node)
        weight = weight if attributes.get("transB", 0) else weight.T
        name = node.input[2] if len(node.input) > 2 else ""
        return _Product(node.input[0], weight, self._bias(node, name, len(weight)) if name else np.zeros(len(weight)))

    def _weights(self, node: Any) -> np.ndarray:
        """The matrix that is a node's second input."""
        weight = self._array(node.input[1]) if node.input[1] in self.tensors else np.empty(0)
        if weight.ndim != 2 or not weight.size:  # one of 0 columns may claim any number of rows
            self.refuse_node(node, "with a constant matrix as its second input", f"{node.op_type} of something else")
        return weight

    def _bias(self, node: Any, name: str, outputs: int) -> np.ndarray:
        """A number for each output, of a tensor that is added to all rows."""
        bias = self._array(name) if name in self.tensors else np.empty((0, 0))
        if bias.size not in (1, outputs) or bias.size != math.prod(bias.shape[-1:]):
            self.refuse_node(node, f"with a constant bias for {outputs} outputs", f"{node.op_type} of something else")
        return np.broadcast_to(bias.reshape(-1), outputs)

    def _scale(self, at: str) -> Scale:
        """What happens between the features and this value, which is the first layer's input."""
        scale = Scale()
        nodes: list[tuple[Any, _Operand]] = []
        while at != self.input:
            if at not in self.producers:
                self.refuse(f"value {at!r}", f"made of the input {self.input!r}", "a constant")
            node = self.producers[at]
            operand = self._operand(node) if node.op_type in SCALING else None
            if operand is None or (node.op_type == "Div" and operand.first):
                known = f"part of a layer or an activation, or before them one of {', '.join(SCALING)} with a constant"
                self.refuse_node(node, known)
            nodes.append((node, operand))
            at = operand.data
        for node, operand in reversed(nodes):
            values = self._array(operand.constant)
            if values.size != math.prod(values.shape[-1:]):
                self.refuse_node(node, "with a constant for all rows", f"one of shape {values.shape}")
            try:
                scale.then(*_scaling(node.op_type, values.astype(np.float64).reshape(-1), operand.first))
            except ValueError:
                self.refuse_node(node, "with as many numbers as the constants before it", f"{values.size} of them")
        return scale

    # --- nodes and tensors ---

    def _operator(self, at: str) -> str:
        """The operator that makes a value, or "" for none."""
        return str(self.producers[at].op_type) if at in self.producers else ""

    def _attributes(self, node: Any) -> dict[str, Any]:
        return {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}

    def _operand(self, node: Any) -> _Operand | None:
        """The constant among a node's two inputs, and the other one."""
        first, second = node.input
        if (first in self.tensors) == (second in self.tensors):
            return None
        return _Operand(second, first, True) if first in self.tensors else _Operand(first, second, False)

    def _array(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        if tensor.data_type not in [self.onnx.TensorProto.DataType.Value(kind) for kind in FLOATS]:
            self.refuse(f"tensor {name!r}", "of " + ", ".join(FLOATS), f"data type {tensor.data_type}")
        try:
            return np.asarray(self.onnx.numpy_helper.to_array(tensor))
        except Exception as error:
            self.refuse(f"tensor {name!r}", "a whole one", error)

    def _is(self, name: str, number: float) -> bool:
        """Whether a tensor is this one number."""
        values = self._array(name)
        return values.size == 1 and math.isclose(values.item(), number, rel_tol=CLOSE)


def _scaling(operator: str, values: np.ndarray, first: bool) -> tuple[Any, Any]:
    """Factor and offset of an operator with a constant, which may come first."""
    with np.errstate(all="ignore"):  # a quotient that is infinite is refused with the scale
        return {
            "Sub": (-1.0, values) if first else (1.0, -values),
            "Div": (1 / values, 0.0),
            "Mul": (values, 0.0),
            "Add": (1.0, values),
        }[operator]
