"""What the kernels run on: processor, BLAS, versions, and how fast its memory is.

Bandwidth is taken with NumPy alone, in three patterns. What is counted is what has to pass between core and memory:

    read    max(a)          4 bytes for each value
    copy    b = a           8: a read and a write. The write-allocate is not counted, since a copy may avoid it
    add     c = a + b      16: two reads, a write and its write-allocate
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import minikd
from minikd.kernels import BACKENDS, current_backend
from minikd.kernels.native import usable_cpus

# Bytes for each value of one array, by pattern; the smallest and the largest array.
PATTERNS = {"read": 4, "copy": 8, "add": 16}
SMALLEST, LARGEST, LARGEST_QUICK = 2**16, 2**28, 2**26
SHARED_FROM = 2**22  # bytes of an array from which it is worth dividing it among threads
PACKAGES = ("numpy", "numba", "scipy", "torch", "jax", "jaxlib")


# --- names ---


def describe(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Processor, levels, BLAS, versions of these packages and load, as texts and numbers for the report."""
    extensions: Any = (np.show_config(mode="dicts") or {}).get("SIMD Extensions", {})
    return {
        "cpu": cpu_model(),
        "cores": len(usable_cpus()),
        "cpu_level": cpu_level(),
        "simd_of_numpy": [*extensions.get("baseline", ()), *extensions.get("found", ())],
        "backend": current_backend(),
        "blas": blas(),
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".rstrip(", "),
        "python": platform.python_version(),
        "versions": {"minikd": minikd.__version__, **dict(_versions(packages))},
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def cpu_model() -> str:
    """The processor's name, and its family and model where Linux tells them: names of virtual ones say little."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    family = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    return f"{name} ({family})" if family else name


def cpu_level() -> str:
    """The instruction set that the C kernels were chosen for, or nothing where there are none."""
    if BACKENDS["c"].missing():
        return ""
    return str(importlib.import_module(BACKENDS["c"].module).cpu_level())


def blas() -> str:
    """NumPy's BLAS with its version and, where OpenBLAS tells it, the kernels that it chose for this processor."""
    with contextlib.suppress(OSError):
        for path in {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "blas" in line}:
            library = ctypes.CDLL(path)
            for symbol in ("scipy_openblas_get_config64_", "openblas_get_config64_", "openblas_get_config"):
                with contextlib.suppress(AttributeError):
                    config = getattr(library, symbol)
                    config.restype = ctypes.c_char_p
                    return " ".join(config().decode().split())
    built: Any = (np.show_config(mode="dicts") or {}).get("Build Dependencies", {}).get("blas", {})
    return f"{built.get('name', 'unknown')} {built.get('version', '')}".strip()


def _versions(packages: Sequence[str]) -> Iterator[tuple[str, str]]:
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)


# --- bandwidth ---


def patterns(footprint: int, threads: int, largest: int = LARGEST) -> dict[str, tuple[Callable[[], Any], int]]:
    """For each pattern a call that moves memory, and the bytes that it moves.

    Parameters
    ----------
    footprint : bytes of the three arrays together, so that they lie where a kernel's buffers lie.
    threads : among how many the arrays are divided, if they are large.
    """
    size = min(max(footprint // 3, SMALLEST), largest) // 4
    a, b, c = np.ones(size, np.float32), np.ones(size, np.float32), np.empty(size, np.float32)
    parts = threads if 4 * size >= SHARED_FROM else 1
    pieces = list(zip(*(np.array_split(array, parts) for array in (a, b, c)), strict=True))
    work: dict[str, list[Callable[[], Any]]] = {
        "read": [x.max for x, _, _ in pieces],
        "copy": [partial(np.copyto, z, x) for x, _, z in pieces],
        "add": [partial(np.add, x, y, out=z) for x, y, z in pieces],
    }
    pool = ThreadPoolExecutor(parts) if parts > 1 else None
    return {
        name: (calls[0] if pool is None else partial(_together, pool, calls), PATTERNS[name] * size)
        for name, calls in work.items()
    }


def _together(pool: ThreadPoolExecutor, calls: list[Callable[[], Any]]) -> None:
    for future in [pool.submit(call) for call in calls]:
        future.result()
