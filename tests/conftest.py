"""What all tests share: Hypothesis profiles, names for the plugin's fixtures, and a check of what a test leaves.

They may run in several processes at once (`pytest -n 2`, of pytest-xdist).
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from minikd.kernels import current_backend
from minikd.tape import is_recording

# The seeds are fixed in all profiles, and a failure prints the line that reproduces it.
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
settings.register_profile("mutants", parent=settings.get_profile("dev"), max_examples=10)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


# Where minikd is installed, pytest has found its plugin already.
_INSTALLED = any(point.name == "minikd" for point in importlib.metadata.entry_points(group="pytest11"))
pytest_plugins = [] if _INSTALLED else ["minikd.testing.plugin"]


def pytest_configure(config: pytest.Config) -> None:
    """Beside others, each worker's BLAS keeps to one thread: on one processor two of them wait for each other."""
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the workers, which are not there yet, inherit it


def pytest_collection_finish() -> None:
    """Take modules and collected tests out of Python's garbage collections, which many tests ask for."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Give them back to a process that goes on."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def made_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder by its name, filled by whichever worker wants it first; the others wait, and take it as it is."""

    def made(name: str, fill: Callable[[Path], object]) -> Path:
        if not hasattr(request.config, "workerinput"):
            folder = tmp_path_factory.mktemp(name)
            fill(folder)
            return folder
        import fcntl

        shared = tmp_path_factory.getbasetemp().parent  # of all workers of this session
        folder, whole = shared / name, shared / f"{name}-is-whole"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                whole.touch()
        return folder

    return made


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
