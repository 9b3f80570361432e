"""The C kernels and plans under the compiler's checks: of memory, of what C leaves undefined, and of threads.

The extension module is built twice more, with AddressSanitizer and UndefinedBehaviorSanitizer and with ThreadSanitizer.
Child processes run the scripts below and tests of the kernels with it. Asked for by MINIKD_SANITIZE=1, because a build
takes a minute and the tests of threads take several.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

PLANS = """
import gc
import math
import sys

import numpy as np

import minikd as kd
from minikd.kernels import native

F = kd.functional
assert native.cpu_level() == sys.argv[1], native.cpu_level()
rng = np.random.default_rng(0)


def data(n, k, c, real):
    return rng.normal(size=(n, k)).astype(real), rng.integers(0, c, n), rng.normal(size=(n, c)).astype(real)


def training(sizes, activation, optimizer, real):  # whose arrays nobody else holds
    x, y, teacher = data(101, sizes[0], sizes[-1], real)
    model = kd.nn.MLP(sizes, activation, dropout=0.2, dtype=real)
    opt, side = optimizer(model.parameters(), 0.01, clip=0.5), math.isqrt(sizes[0])
    shape = (side, side) if side * side == sizes[0] else (1, sizes[0])
    count, moved = np.zeros((), np.int64), {"most": min(2, shape[0] - 1), "fill": np.ones(sizes[0], real)}

    @kd.compile
    def step(rows, temperature):
        kd.kernels.run("advance", count)
        soft, labels = F.take(teacher, rows), F.take(y, rows)
        scores = model(F.shift_images(F.take(x, rows), shape, count, **moved))
        weights = F.teacher_confidence(soft, labels, temperature), F.teacher_confidence(kd.Tensor.of(soft))
        soft = F.corrected_logits(soft, labels)
        rows_of_loss = F.distillation_loss(scores, soft, labels, temperature=temperature, reduction="none")
        loss = (rows_of_loss * (weights[1] + weights[0])).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    return step, model


for real in ("float32", "float64"):
    for sizes, activation, optimizer in (
        ((7, 5, 3), "relu", kd.optim.Adam),
        ((64, 33, 10), "gelu", kd.optim.SGD),
        ((17, 48, 31, 101), "tanh", kd.optim.AdamW),
    ):
        step, model = training(sizes, activation, optimizer, real)
        for batch in (1, 13, 32):
            losses = step.epoch(rng.integers(0, 101, (20, batch)), np.linspace(1, 5, 20))
            assert np.isfinite(losses).all()
        for rows in (1, 2, 7, 40):
            for _ in range(3):
                model.predict_proba(rng.normal(size=(rows, sizes[0])))
        plans = len(step.plans)
        gc.collect()
        junk = [np.full(k, np.nan) for k in range(1, 2000)]
        assert np.isfinite(step.epoch(rng.integers(0, 101, (20, 32)), np.linspace(1, 5, 20))).all()
        assert len(step.plans) == plans == 3
        try:
            step(np.full(32, 101), np.array(2.0))
        except ValueError as error:
            assert "row number" in str(error)
        else:
            raise AssertionError("a row number out of range was taken")
        step(np.arange(32), np.array(2.0))
    for n, c in ((1, 3), (33, 10), (5, 100), (3, 101), (2, 1003), (2, 5003)):
        _, labels, student = data(n, 1, c, real)
        teacher, labels[0] = data(n, 1, c, real)[2], -100
        for found in (
            F.reverse_kl(student, teacher, return_grad=True),
            F.jensen_shannon(student, teacher, return_grad=True),
            F.skewed_kl(student, teacher, return_grad=True),
            F.skewed_kl(student, teacher, alpha=0, return_grad=True),
            F.decoupled_kd(student, teacher, labels, return_grad=True),
            F.standardised_kl(student, teacher, return_grad=True),
        ):
            assert all(np.isfinite(x).all() for x in found)
print("clean")
"""


RACE = """
import threading

import numpy as np

from minikd.kernels import native

native.set_threads(1)
y = np.zeros(3_000_000, np.float32)
calls = [native.binder("add_into")(y, np.ones_like(y)) for _ in range(2)]
both = threading.Barrier(2)


def add(call):
    both.wait()
    call()


threads = [threading.Thread(target=add, args=(call,)) for call in calls]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""

OUTSIDE = """
import numpy as np

from minikd.kernels import native

call = native.binder("add_into")(np.zeros(100, np.float32), np.ones(100, np.float32))
call.record.size[0] = 101
call()
"""


class Checks(NamedTuple):
    """A package whose extension module was built with checks, and what a process needs that loads it."""

    folder: Path
    environment: dict[str, str]

    def run(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A Python that has the checks in it."""
        environment = {**os.environ, **self.environment, "PYTHONPATH": str(self.folder), "MINIKD_BACKEND": "c", **more}
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=self.folder, capture_output=True, text=True
        )

    def test(self, *arguments: str, **more: str) -> None:
        """Run some of the tests, those of the C backend."""
        chosen = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = self.run(*chosen, **more)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        assert " passed" in done.stdout


def library(name: str) -> str:
    """The path of a sanitizer's library; the test fails where gcc has none."""
    compiler = shutil.which("gcc")
    if compiler is not None:
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(found.stdout.strip())
        if path.is_absolute():
            return str(path)
    pytest.fail(f"MINIKD_SANITIZE=1 needs a gcc that has {name}")


def build(folder: Path, checks: str) -> None:
    """Copy the package, with its tests, and build the extension module with these checks in it."""
    for name in ("minikd", "csrc", "tests", "docs", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    flags = f"-fsanitize={checks} -fno-sanitize-recover=all -fno-omit-frame-pointer"
    environment = {**os.environ, "CFLAGS": flags, "LDFLAGS": flags, "CC": "gcc", "MINIKD_REQUIRE_C": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)


@pytest.fixture(scope="module")
def built(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Callable[[str], Path]:
    """A function of checks: the folder of a package that has them."""
    if os.environ.get("MINIKD_SANITIZE") != "1":
        pytest.skip("needs MINIKD_SANITIZE=1, which builds the kernels once more: that takes a minute")
    return lambda checks: made_once("checked-" + checks.replace(",", "-"), partial(build, checks=checks))


@pytest.fixture(scope="module")
def memory(built: Callable[[str], Path]) -> Checks:
    """Every access is looked at, and every operation that C leaves undefined."""
    folder = built("address,undefined")
    preloaded = f"{library('libasan.so')} {library('libubsan.so')}"
    options = "detect_leaks=0 allocator_may_return_null=1"  # as malloc does where there is no memory
    return Checks(folder, {"LD_PRELOAD": preloaded, "ASAN_OPTIONS": options, "PYTHONMALLOC": "malloc"})


@pytest.fixture(scope="module")
def races(built: Callable[[str], Path]) -> Checks:
    """Two threads that are at one place, one of them writing, are an error."""
    folder = built("thread")
    options = "halt_on_error=1 die_after_fork=0"
    return Checks(folder, {"LD_PRELOAD": library("libtsan.so"), "TSAN_OPTIONS": options, "OPENBLAS_NUM_THREADS": "1"})


def levels() -> tuple[str, ...]:
    from minikd.kernels import native

    return native.cpu_levels() or ("base",)


each_level = pytest.mark.parametrize("level", levels())


@each_level
def test_plans_touch_nothing_but_their_buffers(memory: Checks, level: str) -> None:
    done = memory.run("-c", PLANS, level, MINIKD_CPU=level)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "clean\n"


@each_level
def test_every_kernel_of_the_table_touches_nothing_but_its_buffers(memory: Checks, level: str) -> None:
    memory.test("tests/test_ops.py", "-k", "not numba and not numpy", MINIKD_CPU=level)


def test_kernels_touch_nothing_else_where_rows_are_wide_or_few_or_cut_for_threads(memory: Checks) -> None:
    """Each of these files asks for every level itself."""
    files = ("native", "products", "linear_losses", "launch")
    memory.test(*(f"tests/test_{name}.py" for name in files), "-k", "not numba and not numpy")


def test_an_access_outside_of_a_buffer_would_be_noticed(memory: Checks) -> None:
    done = memory.run("-c", OUTSIDE)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


def test_threads_of_kernels_are_never_at_one_place(races: Checks) -> None:
    """The checker has a thread of its own, so the test that counts threads is left out."""
    races.test("tests/test_threads.py", "-k", "not starts_no_thread")
    races.test("tests/test_products.py", "-k", f"any_number_of_threads and {levels()[-1]} and float32")


def test_threads_at_one_place_would_be_noticed(races: Checks) -> None:
    done = races.run("-c", RACE)
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr
