"""The pytest plugin: `--minikd-backend`, a fixture for each backend, and a line in the header.

pytest finds it by itself where minikd is installed; `-p no:minikd` leaves it out. It imports nothing of minikd until a
header is written or a fixture is used.

Fixtures
--------
minikd_backend : the test runs once on each backend that `--minikd-backend` names (all of them by default).
minikd_c, minikd_numba, minikd_numpy : the test runs on this backend.

Each chooses its backend before the test and the one before it again afterwards; a test whose backend cannot run here is
skipped with the reason. With MINIKD_REQUIRE_C=1 in the environment a C backend that cannot run is a failure.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

BACKENDS = ("c", "numba", "numpy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("minikd").addoption(
        "--minikd-backend",
        action="append",
        choices=(*BACKENDS, "all"),
        default=None,
        help="a backend that tests with the fixture minikd_backend run on; may be given several times (default: all)",
    )


def pytest_report_header() -> str:
    """Versions, backends, the level of the C kernels' instructions, and the BLAS."""
    try:
        return _header()
    except Exception as error:  # a broken installation is for the tests to report, not for the header
        return f"minikd: {type(error).__name__}: {error}"


def _header() -> str:
    kernels, blas, numpy, minikd = map(
        importlib.import_module, ("minikd.kernels", "minikd.kernels.blas", "numpy", "minikd")
    )
    states = []
    for name, status in kernels.backends().items():
        text = "in use" if status.default else "available" if status.available else status.reason
        if name == "c" and status.available:
            text += f", {importlib.import_module(kernels.BACKENDS['c'].module).cpu_level()} instructions"
        states.append(f"{name} ({text})")
    library = blas.library() or "not known"
    return f"minikd {minikd.__version__}: backends {', '.join(states)}; NumPy {numpy.__version__}; BLAS: {library}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with the fixture minikd_backend once on each backend that was asked for."""
    if "minikd_backend" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--minikd-backend") or ["all"]
        names = [name for name in BACKENDS if name in wanted or "all" in wanted]
        metafunc.parametrize("minikd_backend", names, indirect=True)


def need(name: str) -> None:
    """Skip the test where a backend cannot run; with MINIKD_REQUIRE_C=1 a missing C backend is a failure."""
    reason = importlib.import_module("minikd.kernels").BACKENDS[name].missing()
    if reason and name == "c" and os.environ.get("MINIKD_REQUIRE_C") == "1":
        pytest.fail(f"MINIKD_REQUIRE_C=1, but the C backend is missing: {reason}")
    if reason:
        pytest.skip(f"needs the {name} backend: {reason}")


def _in_use(name: str) -> Iterator[str]:
    """This backend, and the one before it afterwards."""
    need(name)
    kernels = importlib.import_module("minikd.kernels")
    before = kernels.current_backend()
    kernels.use_backend(name)
    yield name
    kernels.use_backend(before)


@pytest.fixture
def minikd_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn: chosen before the test, and the one before it chosen again afterwards."""
    name: Any = request.param
    yield from _in_use(name)


@pytest.fixture
def minikd_c() -> Iterator[str]:
    """The C backend is in use during the test."""
    yield from _in_use("c")


@pytest.fixture
def minikd_numba() -> Iterator[str]:
    """The Numba backend is in use during the test."""
    yield from _in_use("numba")


@pytest.fixture
def minikd_numpy() -> Iterator[str]:
    """The NumPy backend is in use during the test."""
    yield from _in_use("numpy")
