"""kd.threads: our threads and BLAS's, set together, reported, and put back."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

import minikd as kd
from minikd.errors import ArgumentError
from minikd.kernels import native
from minikd.kernels.threads import Threads

needs_threadpoolctl = pytest.mark.skipif(
    importlib.util.find_spec("threadpoolctl") is None, reason="needs threadpoolctl (extra cli)"
)


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = kd.threads()
    yield
    with Threads(before):
        pass


@needs_threadpoolctl
def test_both_kernels_and_blas_use_the_number_that_was_set() -> None:
    for n in (1, 2, 1):
        found = kd.threads(n)
        assert found.blas == n
        assert kd.threads().blas == n
        if not native.unavailable():
            assert found.kernels == native.threads() == n


@needs_threadpoolctl
def test_as_a_context_manager_it_puts_the_numbers_of_before_back() -> None:
    kd.threads(2)
    with kd.threads(1) as inside:
        assert inside.blas == 1
    assert kd.threads().blas == 2
    assert kd.threads().kernels == (1 if native.unavailable() else 2)


@pytest.mark.parametrize("n", [0, -1, 257, 1.5, "2", True])
def test_what_is_no_number_of_threads_is_refused(n: object) -> None:
    with pytest.raises(ArgumentError, match="a whole number from 1 to 256"):
        kd.threads(n)


def test_without_threadpoolctl_blas_keeps_its_threads_and_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minikd.kernels.threads._has_threadpoolctl", lambda: False)
    with pytest.warns(UserWarning, match=r"pip install 'minikd\[cli\]'"):
        found = kd.threads(1)
    assert found.blas is None
    assert "threadpoolctl would know" in str(found)
