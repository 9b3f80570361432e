"""A network in int8 in a safetensors file: its integers as tensors, how they are to be read as metadata.

Metadata, all texts:

    format            "minikd int8"
    format_version    "1"
    minikd_version    of the minikd that wrote the file
    layers            JSON: a list of {"activation", "input", "product", "output"}, the last three each [scale, zero]
    class_names       JSON: a list of texts, one for each logit
    calibration       where the ranges are from
    divergence        KL(float network ‖ this) in nats, as it was measured

The tensors are, of layer K from 0: `K.weight` int8 (m, k), `K.bias`, `K.multiplier` and `K.shift` int32 (m,),
`K.weight_scale` float32 (m,), and `K.table` int8 (256,) where the activation is tanh, sigmoid or gelu; and
`normalisation.mean` and `normalisation.deviation` float32 (k,). `minikd.export.quantise` says what they mean.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

import numpy as np

import minikd
from minikd.errors import MinikdError, ModelFormatError
from minikd.export.quantise import (
    BENDS,
    GREATEST_SHIFT,
    HIGHEST,
    LARGEST_WEIGHT,
    LEAST_SHIFT,
    LOWEST,
    Affine,
    Quantised,
    QuantisedLayer,
)
from minikd.ops.elementwise import ACTIVATIONS
from minikd.safetensors import read_tensors, write_tensors

__all__ = ["load_int8", "save_int8"]

FORMAT, FORMAT_VERSION = "minikd int8", "1"
_MEAN, _DEVIATION = "normalisation.mean", "normalisation.deviation"
_LARGEST = float(np.finfo(np.float32).max)
_WRITTEN = ("input", "product", "output")
_TENSORS = {"weight": np.int8, "weight_scale": np.float32, "bias": np.int32, "multiplier": np.int32, "shift": np.int32}
_ENDS = {
    "weight": (-LARGEST_WEIGHT, LARGEST_WEIGHT),
    "weight_scale": (float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)),
    "multiplier": (0, 2**31 - 1),
    "shift": (LEAST_SHIFT, GREATEST_SHIFT),
}


def save_int8(path: str | os.PathLike[str], network: Quantised) -> None:
    """Write a network in int8 to a safetensors file, whole or not at all; the same network gives the same bytes.

    Raises
    ------
    OutputError : the file cannot be written.
    """
    tensors: dict[str, np.ndarray] = {_MEAN: network.mean, _DEVIATION: network.deviation}
    for number, layer in enumerate(network.layers):
        tensors |= {f"{number}.{name}": getattr(layer, name) for name in _TENSORS}
        if layer.table is not None:
            tensors[f"{number}.table"] = layer.table
    layers = [
        {"activation": layer.activation, **{name: list(getattr(layer, name)) for name in _WRITTEN}}
        for layer in network.layers
    ]
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "minikd_version": minikd.__version__,
        "layers": json.dumps(layers),
        "class_names": json.dumps(list(network.class_names), ensure_ascii=False),
        "calibration": network.calibration,
        "divergence": repr(network.divergence),
    }
    write_tensors(path, tensors, about)


def load_int8(path: str | os.PathLike[str]) -> Quantised:
    """Read a network in int8 that `save_int8` wrote; that no sum in it overflows is proven anew.

    Raises
    ------
    ModelFormatError : the file is missing, damaged or foreign; tensors are missing, of another shape or out of range.
    """
    tensors, about = read_tensors(path)

    def refuse(part: str, expected: str, got: object) -> ModelFormatError:
        return ModelFormatError("load_int8", f"{path}: {part}", expected=expected, got=str(got)[:200])

    if (about.get("format"), about.get("format_version")) != (FORMAT, FORMAT_VERSION):
        got = f"{about.get('format')!r} version {about.get('format_version')!r}"
        raise refuse("format", f"a network of minikd in int8, version {FORMAT_VERSION}", got)
    entries, names, divergence = _parsed(about, refuse)
    layers = tuple(_layer(k, entry, k == len(entries) - 1, tensors, refuse) for k, entry in enumerate(entries))
    for number, (layer, following) in enumerate(itertools.pairwise(layers), start=1):
        if layer.output != following.input:
            raise refuse(f"layers[{number}]: input", f"{list(layer.output)}, the output before it", following.input)
    mean, deviation = (_tensor(name, np.float32, 1, tensors, refuse) for name in (_MEAN, _DEVIATION))
    if deviation.shape != mean.shape or not (deviation > 0).all():
        raise refuse(_DEVIATION, f"{len(mean)} numbers above 0", deviation)
    if tensors:
        raise refuse("the tensors", "those of the layers", "also " + ", ".join(sorted(tensors)))
    if len(names) != len(layers[-1].bias):
        raise refuse("class_names", f"{len(layers[-1].bias)} names", names)
    try:
        return Quantised(layers, mean, deviation, tuple(names), about.get("calibration", ""), divergence)
    except MinikdError as error:
        raise refuse(error.argument, error.expected, error.got) from error


def _parsed(about: dict[str, str], refuse: Any) -> tuple[list[Any], list[str], float]:
    """What the metadata say of the layers, the classes and the divergence."""
    try:
        entries, names = json.loads(about["layers"]), json.loads(about["class_names"])
        divergence = float(about["divergence"])
    except (KeyError, ValueError, RecursionError) as error:
        expected = "a table with layers, class_names and divergence"
        raise refuse("the metadata", expected, f"{type(error).__name__}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise refuse("layers", "a list of layers", entries)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise refuse("class_names", "a list of texts", names)
    return entries, names, divergence


def _layer(number: int, entry: Any, last: bool, tensors: dict[str, np.ndarray], refuse: Any) -> QuantisedLayer:
    """A layer of what the metadata and the tensors say; its tensors are taken out of those."""
    where = f"layers[{number}]"
    if not isinstance(entry, dict) or set(entry) != {"activation", *_WRITTEN}:
        raise refuse(where, "a table of activation, " + ", ".join(_WRITTEN), entry)
    activation = entry["activation"]
    if activation not in (("",) if last else tuple(ACTIVATIONS)):
        expected = "empty in the last layer" if last else "one of " + ", ".join(ACTIVATIONS)
        raise refuse(f"{where}: activation", expected, repr(activation))
    source, product, output = (_affine(f"{where}: {name}", entry[name], refuse) for name in _WRITTEN)
    found = {
        name: _tensor(f"{number}.{name}", dtype, 2 if name == "weight" else 1, tensors, refuse)
        for name, dtype in _TENSORS.items()
    }
    for name, values in found.items():
        if len(values) != len(found["weight"]):
            raise refuse(f"{number}.{name}", f"{len(found['weight'])} numbers, as the weight has rows", len(values))
        low, high = _ENDS.get(name, (-(2**31), 2**31 - 1))
        if not ((values >= low) & (values <= high)).all():
            raise refuse(f"{number}.{name}", f"from {low} to {high}", f"from {values.min()} to {values.max()}")
    table = None
    if activation in BENDS:
        table = _tensor(f"{number}.table", np.int8, 1, tensors, refuse)
        if len(table) != HIGHEST - LOWEST + 1:
            raise refuse(f"{number}.table", f"{HIGHEST - LOWEST + 1} numbers", len(table))
    elif product != output:
        raise refuse(f"{where}: output", "the product, where there is no table", entry["output"])
    return QuantisedLayer(**found, activation=activation, input=source, product=product, table=table, output=output)


def _affine(where: str, entry: Any, refuse: Any) -> Affine:
    """[scale, zero] as JSON gave it."""
    if isinstance(entry, list) and [type(v) for v in entry] == [float, int]:
        scale, zero = entry
        if 0 < scale <= _LARGEST and float(np.float32(scale)) == scale and LOWEST <= zero <= HIGHEST:
            return Affine(scale, zero)
    raise refuse(where, f"[a float32 number above 0, a whole number from {LOWEST} to {HIGHEST}]", entry)


def _tensor(name: str, dtype: Any, axes: int, tensors: dict[str, np.ndarray], refuse: Any) -> np.ndarray:
    """A tensor of this dtype and number of axes, taken out of those that are there; it is not empty, and finite."""
    value = tensors.pop(name, None)
    if value is None or value.dtype != dtype or value.ndim != axes or not value.size:
        got = "nothing" if value is None else f"{value.dtype} of shape {value.shape}"
        raise refuse(name, f"{np.dtype(dtype)} with {axes} axes that are not empty", got)
    if not np.isfinite(value).all():
        raise refuse(name, "finite numbers only", "NaN or infinity")
    return value
