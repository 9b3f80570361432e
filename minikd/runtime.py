"""Predictions from a model file with NumPy alone: this one file runs wherever it is copied to.

    model = minikd.runtime.load("student.safetensors")
    model.predict(features)  # raw features, one row each

It reads version 2 of the format that docs/model_file.md describes, and only files whose every byte is as minikd writes
it: the header is made anew from what it says, and compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from typing import Any

import numpy as np

DTYPES: dict[str, Any] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
SCALE = ("normalisation.mean", "normalisation.deviation")
ERFC = np.frompyfunc(math.erfc, 1, 1)
ACTIVATIONS: dict[str, Any] = {
    "relu": lambda u: np.maximum(u, 0),
    "gelu": lambda u: np.maximum(u, -40) * (ERFC(-math.sqrt(0.5) * u.astype(float)) / 2).astype(u.dtype),
    "tanh": np.tanh,
    "sigmoid": lambda u: np.exp(np.minimum(u, 0)) / (1 + np.exp(-np.abs(u))),
    "": lambda u: u,  # of the last layer
}


class ModelFormatError(ValueError):
    """A file is damaged, foreign, or of another version."""


class Model:
    """layers : (weight (m, k), bias (m,), activation) each.  scale : mean and deviation of the features, or nothing."""

    def __init__(self, layers: list[Any], scale: list[np.ndarray], class_names: tuple[str, ...] | None) -> None:
        self.layers, self.scale, self.class_names = layers, scale, class_names

    def logits(self, x: Any) -> np.ndarray:
        """Raw scores (n, c) of raw features (n, k), or (c,) of one row (k,)."""
        weight = self.layers[0][0]
        x = np.asarray(x, weight.dtype)
        rows = x[None] if x.ndim < 2 else x.reshape(len(x), math.prod(x.shape[1:]))
        if rows.shape[1:] != weight.shape[1:]:
            raise ValueError(f"x must be rows of {weight.shape[1]} features, got shape {x.shape}")
        rows = (rows - self.scale[0]) / self.scale[1] if self.scale else rows
        for weight, bias, activation in self.layers:
            rows = ACTIVATIONS[activation](rows @ weight.T + bias)
        return rows[0] if x.ndim < 2 else rows

    def predict_proba(self, x: Any, temperature: float = 1.0) -> np.ndarray:
        """Class probabilities, softmax(logits / temperature)."""
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")
        z = self.logits(x)
        e = np.exp((z - z.max(-1, keepdims=True)) / temperature)
        return e / e.sum(-1, keepdims=True)

    def predict(self, x: Any) -> np.ndarray:
        """The number of the most probable class of each row."""
        return self.logits(x).argmax(-1)


def load(path: Any) -> Model:
    """The model in a file that minikd saved.  ModelFormatError : it is damaged.  OSError : it cannot be read."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        start = 8 + struct.unpack_from("<Q", data)[0]
        return _model(data, start, json.loads(data[8:start].decode()))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error) as error:
        raise ModelFormatError(f"{path} is no whole model of minikd: {type(error).__name__}: {error}") from error


def _check(holds: Any, part: str) -> None:
    if not holds:
        raise ValueError(f"{part} cannot be right")


def _model(data: bytes, start: int, header: Any) -> Model:
    about = header["__metadata__"]
    _check((about["format"], about["format_version"]) == ("minikd", "2"), "the format or its version")
    layers = _layers(header, about["layers"])
    shapes = {name: [layers[0]["inputs"]] for name in SCALE if SCALE[0] in header}
    for y in layers:
        shapes |= {f"{y['name']}.weight": [y["outputs"], y["inputs"]], f"{y['name']}.bias": [y["outputs"]]}
    expected: dict[str, Any] = {"__metadata__": {name: str(about[name]) for name in sorted(about)}}
    tensors, place = {}, start
    for name, shape in sorted(shapes.items()):
        dtype = "F32" if name in SCALE else header[f"{layers[0]['name']}.weight"]["dtype"]
        stop = place + math.prod(shape) * DTYPES[dtype].itemsize
        expected[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place - start, stop - start]}
        tensors[name], place = np.frombuffer(data[place:stop], DTYPES[dtype]).reshape(shape), stop
        _check(np.isfinite(tensors[name]).all() and (name != SCALE[1] or tensors[name].min() > 0), name)
    text = json.dumps(expected, separators=(",", ":"), ensure_ascii=False).encode()
    _check(text + b" " * (-len(text) % 8) == data[8:start] and place == len(data), "the header or the file's length")
    count = layers[-1]["outputs"] if "class_names" in about else 0
    names = json.loads(about.get("class_names", "[]"))
    _check([type(names), *map(type, names)] == [list] + [str] * count, "class_names")
    _check(json.dumps(names, ensure_ascii=False) == about.get("class_names", "[]"), "class_names")
    seal = about["sha256"].encode().ljust(64)
    digest = hashlib.sha256(data[:start].replace(seal, b"0" * 64) + data[start:]).hexdigest()
    _check(digest == about["sha256"], "sha256, or what it is of,")
    parts = [(tensors[f"{y['name']}.weight"], tensors[f"{y['name']}.bias"], y["activation"]) for y in layers]
    return Model(parts, [tensors[name] for name in SCALE if name in tensors], tuple(names) or None)


def _layers(header: Any, text: str) -> list[dict[str, Any]]:
    told = json.loads(text)
    names, kinds = [str(y["name"]) for y in told], [told[0]["activation"]] * (len(told) - 1) + [""]
    sizes = [int(header[f"{names[0]}.weight"]["shape"][1]), *(int(header[f"{n}.bias"]["shape"][0]) for n in names)]
    columns = {"name": names, "inputs": sizes[:-1], "outputs": sizes[1:], "activation": kinds}
    layers = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    _check(json.dumps(layers) == text and len(set(names)) == len(names) and min(sizes) > 0, "layers")
    _check(all(kinds[:-1]) and kinds[0] in ACTIVATIONS, f"activation {kinds[0]}")
    return layers
