"""What there is on this machine: versions, backends, extras and data sets, as a table."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

import minikd
from minikd.data import sources
from minikd.errors import MinikdError
from minikd.kernels import backends, blas, kernel_names
from minikd.kernels.arrays import gpu_in_words
from minikd.kernels.threads import threads
from minikd.report.table import Table

# Extra → the packages that `pip install 'minikd[extra]'` brings.
EXTRAS = {
    "cli": ("rich", "matplotlib", "threadpoolctl"),
    "numba": ("numba",),
    "cupy": ("cupy",),
    "teachers": ("sklearn", "onnxruntime"),
}
# Where a package has another name, or comes by one of several.
DISTRIBUTIONS = {"sklearn": ("scikit-learn",), "cupy": ("cupy-cuda12x", "cupy-cuda13x", "cupy-cuda11x", "cupy")}


def environment_table() -> Table:
    """Everything that decides what runs here and how fast."""
    rows: list[tuple[str, ...]] = [
        ("minikd", minikd.__version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("NumPy", f"{np.__version__}, matrix products by {blas.library() or _blas()}"),
        ("threads", str(threads())),
        ("backends",),
        *_backends(),
        ("extras",),
        *_extras(),
        ("data sets",),
        *_data_sets(),
    ]
    return Table(("", ""), "<<", rows)


def _blas() -> str:
    """The name and version of NumPy's BLAS, as NumPy tells it."""
    built: Any = np.show_config(mode="dicts") or {}
    blas = built.get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'an unknown BLAS')} {blas.get('version', '')}".strip()


def _backends() -> Iterator[tuple[str, str]]:
    """Each backend with its state, the CPU level and threads of the C kernels, and what it leaves to NumPy."""
    total = len(kernel_names())
    for name, status in backends().items():
        if not status.available:
            yield name, f"not available: {status.reason}"
            continue
        text = "in use" if status.default else "available"
        if name == "c":
            native = importlib.import_module("minikd.kernels.native")
            threads = native.threads()
            text += f", kernels for {native.cpu_level()} on up to {threads} thread{'s' * (threads != 1)}"
            text += f", matrix products by {native.products()}"
        if name == "cupy":
            text += f", on {gpu_in_words()}"
        if status.fallbacks:
            own, other = total - len(status.fallbacks), "CuPy" if name == "cupy" else "NumPy"
            text += f", {own} of {total} kernels; {other} runs {_in_words(status.fallbacks)}"
        yield name, text


def _in_words(kernels: Sequence[str]) -> str:
    """Kernels as a list, in which an operation and its vjp are one entry."""
    both = [name for name in kernels if f"{name}_vjp" in kernels]
    single = [name for name in kernels if name not in both and name.removesuffix("_vjp") not in both]
    parts = [f"forward and vjp of {', '.join(both)}"] if both else []
    return "; ".join(parts + ([", ".join(single)] if single else []))


def _extras() -> Iterator[tuple[str, str]]:
    """Each extra's packages with their versions, or how to get those that are missing."""
    for extra, packages in EXTRAS.items():
        found = {package: _version(package) for package in packages}
        text = ", ".join(f"{package} {version or 'missing'}" for package, version in found.items())
        yield extra, text if all(found.values()) else f"{text}: pip install 'minikd[{extra}]'"


def _version(package: str) -> str:
    """The installed version of a package, or an empty text if it cannot be imported."""
    if not importlib.util.find_spec(package):
        return ""
    for distribution in DISTRIBUTIONS.get(package, (package,)):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return "of an unknown version"


def _data_sets() -> Iterator[tuple[str, str]]:
    """Each data set that has a name, with its size or the way to get it; it is read, so that damage is found too."""
    for name in sources.NAMED:
        try:
            parts = sources.read(name, "").parts
            yield name, " + ".join(f"{len(part.y):,}" for part in parts.values()) + " rows"
        except MinikdError as error:
            yield name, f"not found: {error.fix}" if error.expected == "installed" else str(error)
