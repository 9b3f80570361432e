"""The C kernels and plans under AddressSanitizer: no read or write outside of a buffer, none of freed memory.

The extension module is built once more, with the checks in, and a child process runs the script below with it. Asked
for by MINIKD_SANITIZE=1, because the build takes most of a minute.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

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


def sanitizer() -> str:
    """The path of AddressSanitizer's library, or an empty text."""
    compiler = shutil.which("gcc")
    if compiler is None:
        return ""
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    return str(path) if path.is_absolute() else ""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package whose extension module checks every access."""
    if os.environ.get("MINIKD_SANITIZE") != "1":
        pytest.skip("needs MINIKD_SANITIZE=1, which builds the kernels once more: that takes a minute")
    if not sanitizer():
        pytest.fail("MINIKD_SANITIZE=1 asks for AddressSanitizer, but there is no gcc that has it")
    folder = tmp_path_factory.mktemp("sanitized")
    for name in ("minikd", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    checked = "-fsanitize=address -fno-omit-frame-pointer"
    environment = {**os.environ, "CFLAGS": checked, "LDFLAGS": checked, "MINIKD_REQUIRE_C": "1"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=folder, env=environment, check=True, capture_output=True)
    return folder


def levels() -> tuple[str, ...]:
    from minikd.kernels import native

    return native.cpu_levels() or ("base",)


@pytest.mark.parametrize("level", levels())
def test_plans_touch_nothing_but_their_buffers(sanitized: Path, level: str) -> None:
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizer(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(sanitized),
        "MINIKD_BACKEND": "c",
        "MINIKD_CPU": level,
    }
    done = subprocess.run(
        [sys.executable, "-c", PLANS, level], env=environment, cwd=sanitized, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "clean\n"
