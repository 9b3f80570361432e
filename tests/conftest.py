"""What all tests share: Hypothesis profiles, names for the plugin's fixtures, and a check of what a test leaves."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from minikd.kernels import current_backend
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


# Where minikd is installed, pytest has found its plugin already.
_INSTALLED = any(point.name == "minikd" for point in importlib.metadata.entry_points(group="pytest11"))
pytest_plugins = [] if _INSTALLED else ["minikd.testing.plugin"]


def pytest_collection_finish() -> None:
    """Take modules and collected tests out of Python's garbage collections, which many tests ask for."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Give them back to a process that goes on."""
    gc.unfreeze()


@pytest.fixture
def backend(minikd_backend: str) -> str:
    """Each backend in turn: chosen before the test, and the one before it chosen again afterwards."""
    return minikd_backend


@pytest.fixture
def c_built() -> None:
    """The extension module is there."""
    importlib.import_module("minikd.testing.plugin").need("c")


@pytest.fixture
def c_in_use(minikd_c: str) -> None:
    """The C backend, and the one before it afterwards."""


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """A test that changes the backend, or switches recording off, puts it back."""
    before = current_backend()
    yield
    assert current_backend() == before, "the test left another backend behind"
    assert is_recording(), "the test left recording switched off"
