"""What all tests share: Hypothesis profiles, the backends one by one, and a check that no test leaves state behind."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import minikd as kd
from minikd.kernels import BACKENDS, current_backend
from minikd.tape import is_recording

# The seeds are fixed in both profiles, and a failure prints the line that reproduces it.
settings.register_profile(
    "dev",
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
settings.register_profile("ci", parent=settings.get_profile("dev"), max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def why_missing(name: str) -> str:
    """Why a backend cannot run here, or an empty text if it can."""
    return BACKENDS[name].missing()


def need(name: str) -> None:
    """Skip the test where a backend cannot run; with MINIKD_REQUIRE_C=1 a missing C backend is a failure."""
    reason = why_missing(name)
    if reason and name == "c" and os.environ.get("MINIKD_REQUIRE_C") == "1":
        pytest.fail(f"MINIKD_REQUIRE_C=1, but the C backend is missing: {reason}")
    if reason:
        pytest.skip(f"needs the {name} backend: {reason}")


def pytest_report_header() -> list[str]:
    states = [f"{name} ({why_missing(name) or 'available'})" for name in BACKENDS]
    lines = [f"minikd {kd.__version__}, NumPy {np.__version__}, backends: {', '.join(states)}"]
    if not why_missing("c"):
        lines.append(f"C kernels for {importlib.import_module(BACKENDS['c'].module).cpu_level()}")
    return lines


@pytest.fixture(params=tuple(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn: chosen before the test, and the one before it chosen again afterwards."""
    name = request.param
    need(name)
    before = current_backend()
    kd.use_backend(name)
    yield name
    kd.use_backend(before)


@pytest.fixture
def c_built() -> None:
    """The extension module is there."""
    need("c")


@pytest.fixture
def c_in_use(c_built: None) -> Iterator[None]:
    """The C backend, and the one before it afterwards."""
    before = current_backend()
    kd.use_backend("c")
    yield
    kd.use_backend(before)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """A test that changes the backend, or switches recording off, puts it back."""
    before = current_backend()
    yield
    assert current_backend() == before, "the test left another backend behind"
    assert is_recording(), "the test left recording switched off"
