"""A network in a safetensors file: its parameters as tensors, what rebuilds it as metadata.

Metadata, all texts: `format` ("minikd"), `format_version` ("1"), `sizes` and `class_names` (JSON lists), `activation`,
`dropout`, `input_dropout`, `seed`, `minikd_version`, and whatever the caller adds. The tensors are the parameters under
the names of `Module.state_dict`, and `normalisation.mean` and `normalisation.deviation` where the network has one.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

import numpy as np

import minikd
from minikd.data import Normalisation
from minikd.errors import ArgumentError, MinikdError, ModelFormatError
from minikd.nn import MLP, Module
from minikd.safetensors import read_tensors, write_tensors

FORMAT, FORMAT_VERSION = "minikd", "1"
_MEAN, _DEVIATION = "normalisation.mean", "normalisation.deviation"


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
    """
    if not isinstance(model, MLP):
        fix = "Save the parameters of other modules with export.write_tensors(path, model.state_dict(), {})."
        raise ArgumentError("save", "model", expected="an MLP", got=type(model).__name__, fix=fix)
    about = {
        **metadata,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "minikd_version": minikd.__version__,
        "sizes": json.dumps(list(model.sizes)),
        "activation": model.activation,
        "dropout": repr(model.dropout),
        "input_dropout": repr(model.input_dropout),
        "seed": str(model.seed),
    }
    if model.class_names is not None:
        about["class_names"] = json.dumps(list(model.class_names), ensure_ascii=False)
    tensors = model.state_dict()
    if model.normalisation is not None:
        tensors[_MEAN], tensors[_DEVIATION] = model.normalisation.mean, model.normalisation.deviation
    write_tensors(path, tensors, about)


def load(path: str | os.PathLike[str]) -> MLP:
    """Read a model that `save` wrote, ready to `predict` from raw features; nothing in the file is executed.

    Raises
    ------
    ModelFormatError : the file is missing, damaged or foreign; shapes do not chain; a weight is not finite.
    """
    tensors, about = read_tensors(path)

    def refuse(part: str, expected: str, got: object) -> ModelFormatError:
        return ModelFormatError("load", f"{path}: {part}", expected=expected, got=str(got)[:200])

    if (about.get("format"), about.get("format_version")) != (FORMAT, FORMAT_VERSION):
        got = f"{about.get('format')!r} version {about.get('format_version')!r}"
        raise refuse("format", f"a model of minikd, version {FORMAT_VERSION}", got)
    broken = next((name for name, t in tensors.items() if not np.isfinite(t).all()), None)
    if broken:
        raise refuse(broken, "finite numbers only", "NaN or infinity")
    mean, deviation = tensors.pop(_MEAN, None), tensors.pop(_DEVIATION, None)
    model = _rebuild(about, tensors, refuse)
    if mean is not None or deviation is not None:
        model.normalisation = _normalisation(mean, deviation, model.sizes[0], refuse)
    return model


def _rebuild(about: dict[str, str], tensors: dict[str, np.ndarray], refuse: Any) -> MLP:
    """The network that the metadata describes, with these parameters."""
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= {np.dtype(np.float32), np.dtype(np.float64)}:
        raise refuse("the parameters", "all float32 or all float64", sorted(map(str, dtypes)))
    try:
        sizes = json.loads(about["sizes"])
        if not isinstance(sizes, list) or not all(type(s) is int for s in sizes):
            raise refuse("sizes", "a list of whole numbers", about["sizes"])
        stored = sum(t.size for t in tensors.values())
        if sum(a * b + b for a, b in itertools.pairwise(sizes)) != stored:
            raise refuse("sizes", f"layers with the {stored} parameters that the file holds", sizes)
        model = MLP(
            sizes,
            about["activation"],
            dropout=float(about["dropout"]),
            seed=int(about["seed"]),
            input_dropout=float(about["input_dropout"]),
            dtype=dtypes.pop(),
        )
        model.load_state_dict(tensors)
        names = json.loads(about["class_names"]) if "class_names" in about else None
    except ModelFormatError:
        raise
    except (KeyError, ValueError, TypeError, RecursionError, MinikdError) as error:
        raise refuse("the metadata", "a description of an MLP", f"{type(error).__name__}: {error}") from error
    if names is not None:
        if not isinstance(names, list) or len(names) != sizes[-1] or not all(isinstance(n, str) for n in names):
            raise refuse("class_names", f"{sizes[-1]} names", names)
        model.class_names = tuple(names)
    model.eval()
    return model


def _normalisation(mean: Any, deviation: Any, features: int, refuse: Any) -> Normalisation:
    for name, part in ((_MEAN, mean), (_DEVIATION, deviation)):
        if part is None or part.shape != (features,) or part.dtype != np.float32:
            got = "nothing" if part is None else f"{part.dtype} of shape {part.shape}"
            raise refuse(name, f"{features} float32 numbers", got)
    if not (deviation > 0).all():
        raise refuse(_DEVIATION, "numbers above 0", deviation.min())
    return Normalisation(mean, deviation)
