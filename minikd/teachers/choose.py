"""`as_teacher`: which kind of teacher a thing is."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from minikd.errors import ArgumentError, DataError
from minikd.model_file import FORMAT, load
from minikd.nn import Module
from minikd.safetensors import read_tensors
from minikd.teachers.ensemble import Ensemble
from minikd.teachers.estimators import METHODS, TRAINERS, EstimatorTeacher
from minikd.teachers.functions import FunctionTeacher, ModelTeacher
from minikd.teachers.onnx import OnnxTeacher
from minikd.teachers.pytorch import TorchTeacher
from minikd.teachers.tables import StoreTeacher, read_table
from minikd.teachers.teacher import LOGITS, Teacher, file_digest, library

TABLES = (".npy", ".npz", ".safetensors", ".csv")
PICKLES = (".joblib", ".pkl", ".pickle")


def as_teacher(
    x: Any,
    *,
    gives: str | None = None,
    classes: int | None = None,
    class_names: Sequence[str] | None = None,
    allow_pickle: bool = False,
    average: str | None = None,
    weights: Sequence[float] | None = None,
    shape: tuple[int, ...] | None = None,
    output: str | None = None,
    threads: int | None = None,
    identity: str | None = None,
) -> Teacher:
    """The teacher that a model, a function, a file or a list of them is.

    Parameters
    ----------
    x : a Teacher; a network of minikd or PyTorch; an estimator of scikit-learn, XGBoost or LightGBM; a function from
        raw features (n, k) to scores (n, c); a file (.onnx, a model or a table in .safetensors, a table in .npy, .npz
        or .csv, with allow_pickle also .joblib and .pkl); the folder of a store; a list of all these.
    gives : "logits" or "probabilities" (a table: "log_probabilities", too), where the thing does not say itself.
    classes, class_names : those of the data; answers must have as many columns, and labels are found by their name.
    allow_pickle : whether pickles may be read, which runs whatever code they hold.
    average, weights : of a list (see `Ensemble`).
    shape : of one row, for PyTorch and ONNX.  output, threads : for ONNX (see `OnnxTeacher`).
    identity : what the teacher is called in stores and reports, where it cannot be told from its content.

    Raises
    ------
    ArgumentError : nothing that can teach, or an option that this kind of teacher does not have.
    DataError, ModelFormatError : the file is missing or damaged.  BackendError : a library is missing.
    """
    if class_names is not None:
        if classes not in (None, len(class_names)):
            raise ArgumentError(
                "as_teacher", "classes", expected=f"{len(class_names)}, as class_names", got=str(classes)
            )
        classes = len(class_names)
    options = {
        "gives": gives,
        "classes": classes,
        "class_names": class_names,
        "allow_pickle": allow_pickle,
        "average": average,
        "weights": weights,
        "shape": shape,
        "output": output,
        "threads": threads,
        "identity": identity,
    }
    kind = _kind(x)
    told = {name: value for name, value in options.items() if value is not None}
    unused = [name for name in told if name not in kind.takes + ALWAYS]
    if unused:
        expected = f"left out for {kind.name}"
        fix = f"It takes {', '.join(kind.takes) or 'no options'}."
        raise ArgumentError("as_teacher", ", ".join(unused), expected=expected, got=repr(told[unused[0]]), fix=fix)
    takes = (*kind.takes, "classes")
    return kind.build(x, **{name: value for name, value in told.items() if name in takes})


class Kind(NamedTuple):
    """A row of the table: what a thing is called, how it is known, what makes its teacher, and from which options."""

    name: str
    test: Callable[[Any], bool]
    build: Callable[..., Teacher]
    takes: tuple[str, ...] = ()


ALWAYS = ("classes", "class_names", "allow_pickle")  # said of the data and the user, not of one kind of teacher


def _kind(x: Any) -> Kind:
    for kind in KINDS:
        if kind.test(x):
            return kind
    if isinstance(x, str | os.PathLike):
        raise _no_file(x)
    fix = "Wrap it in a function from features (n, k) to scores (n, c)."
    got = f"{type(x).__module__}.{type(x).__qualname__}"
    raise ArgumentError("as_teacher", "x", expected="; ".join(k.name for k in KINDS), got=got, fix=fix)


def _no_file(x: Any) -> ArgumentError:
    if x in TRAINERS:
        fix = f"It is trained first: kd.teachers.trained({x!r}, x, y, classes)."
        return ArgumentError("as_teacher", "x", expected="a teacher that exists", got=repr(x), fix=fix)
    endings = ", ".join((".onnx", *TABLES, *PICKLES))
    got = f"{str(x)!r}" + ("" if Path(x).exists() else ", which does not exist")
    return ArgumentError("as_teacher", "x", expected=f"a file that ends in {endings}, or a store's folder", got=got)


def _file(*suffixes: str) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, str | os.PathLike) and Path(x).suffix.lower() in suffixes and Path(x).is_file()


def _is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")  # what is a network of PyTorch has imported it
    return torch is not None and isinstance(x, torch.nn.Module)


def _is_store(x: Any) -> bool:
    return isinstance(x, str | os.PathLike) and (Path(x) / "manifest.json").is_file()


def _itself(x: Teacher, classes: int | None = None) -> Teacher:
    if classes is not None and x.classes is None:
        x.classes = classes
    if classes not in (None, x.classes):
        fix = "Take a teacher of the data's classes."
        raise ArgumentError("as_teacher", "x", expected=f"a teacher of {classes} classes", got=str(x.classes), fix=fix)
    return x


def _tensors(path: Any, *, class_names: Any = None, gives: str | None = None, **options: Any) -> Teacher:
    """A .safetensors file: a model if minikd saved one, else a table."""
    if read_tensors(path)[1].get("format") != FORMAT:
        return read_table(Path(path), gives=gives, class_names=class_names, **options)
    if gives not in (None, LOGITS):
        raise ArgumentError("as_teacher", "gives", expected="left out for a model of minikd", got=repr(gives))
    return ModelTeacher(load(path), class_names=class_names, **options)


def _pickled(path: Any, *, allow_pickle: bool = False, identity: str = "", **options: Any) -> Teacher:
    if not allow_pickle:
        fix = "allow_pickle=True (--allow-pickle) does so for files that you trust; an ONNX file runs no code."
        got = "no leave to unpickle, which runs whatever code the file holds"
        raise ArgumentError("as_teacher", str(path), expected="a file that is safe to read", got=got, fix=fix)
    path = Path(path)
    try:
        if path.suffix.lower() == ".joblib":
            model = library("joblib").load(path)
        else:
            with path.open("rb") as file:
                model = pickle.load(file)
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError, KeyError) as error:
        fix = "Load it with the library, and the version of it, that saved it."
        raise DataError("as_teacher", str(path), expected="a pickled model", got=str(error), fix=fix) from error
    told = "".join(f" {k} {v}" for k, v in options.items() if k in ("gives", "class_names"))
    return as_teacher(model, identity=identity or f"file:{file_digest(path)}{told}", **options)


def _store(path: Any, *, class_names: Any = None, **options: Any) -> Teacher:
    found = import_module("minikd.store").open(path)
    if class_names is not None:
        found.check(class_names=class_names)
    return StoreTeacher(found, **options)


def _ensemble(
    x: Sequence[Any], *, average: Any = None, weights: Any = None, identity: str = "", **options: Any
) -> Teacher:
    return Ensemble([as_teacher(t, **options) for t in x], weights, average, identity=identity)


# In this order: the first test that holds decides, so that a network with a `predict_proba` of its own stays a network.
KINDS = (
    Kind("a Teacher", lambda x: isinstance(x, Teacher), _itself),
    Kind("a network of minikd", lambda x: isinstance(x, Module), ModelTeacher, ("class_names", "identity")),
    Kind("a network of PyTorch", _is_torch, TorchTeacher, ("gives", "shape", "identity")),
    Kind(
        "an estimator",
        lambda x: not isinstance(x, type) and any(callable(getattr(x, m, None)) for m in METHODS),
        EstimatorTeacher,
        ("gives", "class_names", "identity"),
    ),
    Kind(
        "a list of teachers",
        lambda x: isinstance(x, list | tuple),
        _ensemble,
        ("average", "weights", "identity", *ALWAYS),
    ),
    Kind("an ONNX file", _file(".onnx"), OnnxTeacher, ("gives", "output", "shape", "threads", "identity")),
    Kind("a safetensors file", _file(".safetensors"), _tensors, ("gives", "class_names", "identity")),
    Kind(
        "a table",
        _file(".npy", ".npz", ".csv"),
        lambda x, **o: read_table(Path(x), **o),
        ("gives", "class_names", "identity"),
    ),
    Kind("a pickle", _file(*PICKLES), _pickled, ("gives", "class_names", "identity", "allow_pickle")),
    Kind("a store's folder", _is_store, _store, ("class_names", "identity")),
    Kind("a function", callable, FunctionTeacher, ("gives", "identity")),
)
