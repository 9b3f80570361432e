"""A network in a safetensors file: its parameters as tensors, what rebuilds it as metadata.

Metadata, all texts:

    format            "minikd"
    format_version    "2"
    minikd_version    of the minikd that wrote the file
    layers            JSON: a list of {"name", "inputs", "outputs", "activation"}; the last activation is ""
    class_names       JSON: a list of texts, one for each output; left out where the model has none
    dropout, input_dropout, seed    what training goes on with; a prediction needs none of them
    sha256            the file's seal (minikd.safetensors)

and whatever the caller adds. The tensors are `NAME.weight` (outputs, inputs) and `NAME.bias` (outputs,) of each layer,
all float32 or all float64, and where the model has a normalisation `normalisation.mean` and `normalisation.deviation`,
float32 (inputs,). There are no others, and they lie in the order of their names.

Version 1 had the numbers `sizes` and one `activation` in place of `layers`, and no seal. It is read, not written.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import minikd
from minikd.data import Normalisation
from minikd.errors import ArgumentError, MinikdError, ModelFormatError
from minikd.nn import MLP, Module
from minikd.ops.elementwise import ACTIVATIONS
from minikd.safetensors import SEAL, Contents, parse_json, read, write_tensors

FORMAT, FORMAT_VERSION = "minikd", "2"
_MEAN, _DEVIATION = "normalisation.mean", "normalisation.deviation"
_LAST = ""  # the activation of the last layer, whose outputs are the logits

Refuse = Callable[[str, str, object], ModelFormatError]  # from a part of the file, what it must be and what it is


class _Layer(NamedTuple):
    """What the metadata say of one layer."""

    name: str
    inputs: int
    outputs: int
    activation: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.name}.weight": (self.outputs, self.inputs), f"{self.name}.bias": (self.outputs,)}


# --- writing ---


def save(path: str | os.PathLike[str], model: Module, **metadata: str) -> None:
    """Write a model to a safetensors file, whole or not at all; the same model gives the same bytes.

    Parameters
    ----------
    path : the file; one that is there is replaced.
    model : an MLP. Its normalisation and class names go with it.
    metadata : further texts to keep, under names of their own.

    Raises
    ------
    ArgumentError : the model is not an MLP.  OutputError : the file cannot be written.
    ModelFormatError : what the metadata or the class names hold is no text.
    """
    if not isinstance(model, MLP):
        fix = "Save the parameters of other modules with export.write_tensors(path, model.state_dict(), {})."
        raise ArgumentError("save", "model", expected="an MLP", got=type(model).__name__, fix=fix)
    about = {
        **metadata,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "minikd_version": minikd.__version__,
        "layers": json.dumps([layer._asdict() for layer in _layers_of(model)]),
        "dropout": repr(model.dropout),
        "input_dropout": repr(model.input_dropout),
        "seed": str(model.seed),
    }
    if model.class_names is not None:
        about["class_names"] = json.dumps(list(model.class_names), ensure_ascii=False)
    tensors = model.state_dict()
    if model.normalisation is not None:
        tensors[_MEAN], tensors[_DEVIATION] = model.normalisation.mean, model.normalisation.deviation
    write_tensors(path, tensors, about, seal=True)


def _layers_of(model: MLP) -> list[_Layer]:
    names = [name.removesuffix(".weight") for name in model.state_dict() if name.endswith(".weight")]
    activations = [model.activation] * (len(names) - 1) + [_LAST]
    pairs = itertools.pairwise(model.sizes)
    return [_Layer(n, *sizes, kind) for n, sizes, kind in zip(names, pairs, activations, strict=True)]


# --- reading ---


def load(path: str | os.PathLike[str]) -> MLP:
    """Read a model that `save` wrote, ready to `predict` from raw features; nothing in the file is executed.

    Raises
    ------
    ModelFormatError : the file is missing, damaged or foreign, of an unknown version or activation; its tensors are not
        those that its layers need, shapes do not chain, a weight is not finite; its seal does not fit.
    """
    contents = read(path, digest=True)
    about = contents.metadata

    def refuse(part: str, expected: str, got: object) -> ModelFormatError:
        return ModelFormatError("load", f"{path}: {part}", expected=expected, got=str(got)[:200])

    version = about.get("format_version", "none")
    if about.get("format") != FORMAT or version not in _READERS:
        got = f"{about.get('format')!r} version {version!r}"
        raise refuse("format", f"a model of minikd, version {' or '.join(_READERS)}", got)
    layers = _READERS[version](about, refuse)
    _check_chain(layers, refuse)
    _check_tensors(layers, contents, refuse)
    model = _rebuild(layers, contents, refuse)
    if version != "1" and about.get(SEAL) != contents.sha256:
        got = f"{about.get(SEAL, 'nothing')}: the file was changed after it had been written"
        raise refuse(SEAL, contents.sha256, got)
    return model


def _layers_of_version_2(about: dict[str, str], refuse: Refuse) -> list[_Layer]:
    entries = _parsed(about, "layers", refuse)
    if not isinstance(entries, list) or not entries:
        raise refuse("layers", "a list of layers", entries)
    layers = []
    for k, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != set(_Layer._fields):
            raise refuse(f"layers[{k}]", "a table of " + ", ".join(_Layer._fields), entry)
        layer = _Layer(**entry)
        texts = isinstance(layer.name, str) and isinstance(layer.activation, str)
        if not texts or not _is_size(layer.inputs) or not _is_size(layer.outputs):
            raise refuse(f"layers[{k}]", "with texts as name and activation and whole numbers from 1 as sizes", entry)
        layers.append(layer)
    return layers


def _layers_of_version_1(about: dict[str, str], refuse: Refuse) -> list[_Layer]:
    """Layers had the numbers of their places in the MLP as names."""
    sizes, activation = _parsed(about, "sizes", refuse), about.get("activation", "nothing")
    if not isinstance(sizes, list) or len(sizes) < 2 or not all(_is_size(s) for s in sizes):
        raise refuse("sizes", "a list of whole numbers from 1", about["sizes"])
    first, between = _number(about, "input_dropout", refuse) != 0, 2 + (_number(about, "dropout", refuse) != 0)
    pairs = list(itertools.pairwise(sizes))
    kinds = [activation] * (len(pairs) - 1) + [_LAST]
    return [_Layer(str(first + k * between), *p, a) for k, (p, a) in enumerate(zip(pairs, kinds, strict=True))]


_READERS: dict[str, Callable[[dict[str, str], Refuse], list[_Layer]]] = {
    "1": _layers_of_version_1,
    "2": _layers_of_version_2,
}


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _parsed(about: dict[str, str], name: str, refuse: Refuse) -> Any:
    """What an entry's JSON says."""
    try:
        return parse_json(about[name])
    except KeyError as error:
        raise refuse("the metadata", f"a table with {name}", ", ".join(about)) from error
    except (ValueError, RecursionError) as error:
        raise refuse(f"the metadata's {name}", "JSON with different names", error) from error


def _number(about: dict[str, str], name: str, refuse: Refuse, kind: Callable[[str], Any] = float) -> Any:
    try:
        return kind(about.get(name, "nothing"))
    except ValueError as error:
        expected = "a whole number" if kind is int else "a number"
        raise refuse(f"the metadata's {name}", expected, about.get(name, "nothing")) from error


def _check_chain(layers: Sequence[_Layer], refuse: Refuse) -> None:
    """Each layer takes what the one before it puts out; the activations are known, and alike in hidden layers."""
    for k, (layer, following) in enumerate(itertools.pairwise(layers)):
        if layer.outputs != following.inputs:
            raise refuse(
                f"layers[{k + 1}]: inputs", f"{layer.outputs}, as the layer before it puts out", following.inputs
            )
        if layer.activation not in ACTIVATIONS or layer.activation != layers[0].activation:
            expected = f"one of {', '.join(ACTIVATIONS)}, and as in the first layer"
            raise refuse(f"layers[{k}]: activation", expected, repr(layer.activation))
    if layers[-1].activation != _LAST:
        raise refuse("the last layer's activation", "empty", repr(layers[-1].activation))


def _check_tensors(layers: Sequence[_Layer], contents: Contents, refuse: Refuse) -> None:
    """The tensors are those of the layers and of the scale: their names, shapes, dtypes and values."""
    tensors = contents.tensors
    shapes = {name: shape for layer in layers for name, shape in layer.shapes.items()}
    if len(shapes) != 2 * len(layers):
        raise refuse("layers", "of different names", ", ".join(layer.name for layer in layers))
    dtype = tensors[next(iter(shapes))].dtype if next(iter(shapes)) in tensors else None
    if _MEAN in tensors or _DEVIATION in tensors:
        shapes |= {_MEAN: (layers[0].inputs,), _DEVIATION: (layers[0].inputs,)}
    if set(shapes) != set(tensors):
        missing, extra = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
        raise refuse("the tensors", "those of the layers", f"missing {missing or 'none'}, unknown {extra or 'none'}")
    if not contents.in_order:
        raise refuse("the header", "in the order of the data", "the tensors in another order")
    if dtype not in (np.float32, np.float64):
        raise refuse("the parameters", "float32 or float64", dtype)
    for name, shape in shapes.items():
        value, wanted = tensors[name], np.dtype(np.float32) if name in (_MEAN, _DEVIATION) else dtype
        if value.shape != shape or value.dtype != wanted:
            raise refuse(name, f"{wanted} of shape {shape}", f"{value.dtype} of shape {value.shape}")
        if not np.isfinite(value).all():
            raise refuse(name, "finite numbers only", "NaN or infinity")
    if _DEVIATION in tensors and not (tensors[_DEVIATION] > 0).all():
        raise refuse(_DEVIATION, "numbers above 0", tensors[_DEVIATION].min())


def _rebuild(layers: Sequence[_Layer], contents: Contents, refuse: Refuse) -> MLP:
    """The network in evaluation mode; its size was compared with the file's, so it takes no more memory than that."""
    tensors, about = contents.tensors, contents.metadata
    sizes = [layers[0].inputs, *(layer.outputs for layer in layers)]
    values = [tensors[name] for layer in layers for name in layer.shapes]
    numbers = {name: _number(about, name, refuse) for name in ("dropout", "input_dropout")}
    seed = _number(about, "seed", refuse, int)
    try:
        # A version 1 file of a single layer still names an activation.
        kind = layers[0].activation or about.get("activation", "relu")
        model = MLP(sizes, kind, seed=seed, dtype=values[0].dtype, **numbers)
    except (ValueError, MinikdError) as error:
        expected = "what an MLP can have"
        raise refuse("the metadata's activation, dropout, input_dropout and seed", expected, error) from error
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    if "class_names" in about:
        names = _parsed(about, "class_names", refuse)
        if not isinstance(names, list) or len(names) != sizes[-1] or not all(isinstance(n, str) for n in names):
            raise refuse("class_names", f"{sizes[-1]} names", names)
        model.class_names = tuple(names)
    if _MEAN in tensors:
        model.normalisation = Normalisation(tensors[_MEAN], tensors[_DEVIATION])
    model.eval()
    return model
