"""The benchmark on a GPU, on the stand-in for CuPy: the clock, what is counted, that contenders compute the same."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from standin import computing
from standin import cupy as standin

from minikd.bench import add_arguments, run
from minikd.bench.contenders import Bound
from minikd.bench.gpu import cases, clock, command, report, worker
from minikd.bench.gpu.cases import CASES, GPU_STEPS, MEASURED, GpuCase
from minikd.bench.gpu.contenders import CONTENDERS
from minikd.bench.gpu.worker import Task, run_task
from minikd.bench.measure import LEAST_ROUNDS, Effort, interleave
from minikd.bench.worker import bind_all
from minikd.cli import main
from minikd.errors import ArgumentError, BackendError
from minikd.kernels import current_backend
from minikd.report.table import plain

SHORT = Effort(LEAST_ROUNDS, 0.0)
OURS = [key for key, contender in CONTENDERS.items() if contender.ours]


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--backend", "cupy", *arguments])


@pytest.fixture
def cupy() -> Iterator[Any]:
    """The stand-in as cupy, and its backend in use."""
    if cuda_on_cpu.compiler() is None:
        pytest.skip("needs g++, which makes kernels run on the processor")
    with computing() as module:
        yield module


# --- what is measured ---


def test_every_case_is_one_of_the_tables_and_a_shape_narrows_them() -> None:
    assert {case.name for case in CASES} == {*MEASURED, *GPU_STEPS}
    assert GpuCase("distillation_loss", (4096, 32000)) in CASES
    assert cases.chosen(["softmax"], ["128x10"], quick=False) == [GpuCase("softmax", (128, 10))]
    quick = cases.chosen(None, None, quick=True)
    assert [case.name for case in quick] == list(cases.NAMES)
    with pytest.raises(ArgumentError, match=r"names among distillation_loss, .* got gelu"):
        list(command.tasks(argparse.Namespace(kernel=["gelu"], shape=None, quick=False, peers=None), {}, ""))


@pytest.mark.parametrize(
    ("name", "bytes_an_element"), [("distillation_loss", 12), ("cross_entropy", 8), ("softmax", 8), ("adam_step", 28)]
)
def test_bytes_are_counted_once_for_each_time_that_they_pass(name: str, bytes_an_element: int) -> None:
    assert GpuCase(name, (3, 5)).bytes_moved == 15 * bytes_an_element


def test_a_task_names_who_is_able_and_asked_for() -> None:
    (task,) = command.tasks(options("--kernel", "adam-784-1200-1200-10", "--peers", "jax"), {}, "")
    assert task.contenders == ["plan", "eager"]  # JAX is measured on kernels
    (task,) = command.tasks(options("--kernel", "softmax", "--shape", "4096x32000"), {"jax": "not there"}, "")
    assert task.contenders == ["kernel", "function", "torch", "torch-compile", "torch-graphs"]


# --- the clock ---


def test_time_is_taken_between_two_events_around_all_calls(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(standin.Event, "synchronize", lambda event: order.append("waited"))

    def call() -> None:
        now[0] += 2e-6
        order.append("called")

    assert clock.Events()(call, 5) == pytest.approx(2_000)
    assert order == ["called"] * 5 + ["waited"]


def test_each_contender_is_timed_by_the_clock_that_sees_its_work() -> None:
    asked: list[str] = []

    def slow(call: Any, calls: int) -> float:
        asked.append("device")
        call()
        return 3_000_000.0

    timings = interleave({"a": lambda: None, "b": lambda: None}, SHORT, clocks={"b": slow})
    assert set(timings["b"].samples) == {3_000_000.0}
    assert len(asked) == len(timings["b"].samples) + 1  # and once to find out how often to call
    assert max(timings["a"].samples) < 3_000_000.0


def test_a_copy_is_counted_as_read_and_written(cupy: Any) -> None:
    copy, moved = clock.copying(4096)
    assert moved == 8192
    before = standin._pool.allocations
    copy()
    assert standin._pool.allocations == before


# --- contenders ---


@pytest.mark.parametrize("case", [GpuCase(n, (1030,) if n == "adam_step" else (7, 10)) for n in MEASURED], ids=str)
def test_our_contenders_agree_with_the_reference_and_copy_nothing_when_called(case: GpuCase, cupy: Any) -> None:
    inputs = case.make_inputs()
    able = [key for key in OURS if case.name in CONTENDERS[key].kernels]
    bound, rows = bind_all(able, case.subject, inputs, case.subject.expected(inputs), CONTENDERS)
    assert list(bound) == able, rows
    assert not any(row["wrong"] for row in rows.values())
    assert all(error < 1e-5 for row in rows.values() for error in row["errors"].values())
    standin.COPIES.reset()
    for contender in bound.values():
        contender.call()
    assert (standin.COPIES.to_host, standin.COPIES.to_device) == (0, 0)


def small_step(monkeypatch: pytest.MonkeyPatch, name: str) -> GpuCase:
    small = {"sizes": (12, 9, 4), "batch": 6, "steps": 4}
    step = GPU_STEPS[name]
    more = {"teacher": (12, 10, 4)} if step.teacher else {}
    monkeypatch.setitem(GPU_STEPS, name, type(step)(**{**vars(step), **small, **more}))
    return GpuCase(name)


@pytest.mark.parametrize("name", GPU_STEPS)
def test_our_steps_have_the_losses_of_float64(name: str, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_step(monkeypatch, name)
    inputs = case.make_inputs()
    bound, rows = bind_all(["plan", "eager"], case.subject, inputs, case.subject.expected(inputs), CONTENDERS, 1e-5)
    assert list(bound) == ["plan", "eager"], rows
    assert not any(row["wrong"] for row in rows.values()), rows


@pytest.mark.parametrize("name", [*MEASURED, *GPU_STEPS])
def test_pytorch_computes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the processor: its code for a GPU differs in where tensors lie."""
    pytest.importorskip("torch", reason="compares with PyTorch")
    from minikd.bench.gpu import peer_torch

    monkeypatch.setattr(peer_torch, "DEVICE", "cpu")
    monkeypatch.setattr(peer_torch, "captured", lambda call: (call(), call)[1])
    case = small_step(monkeypatch, name) if name in GPU_STEPS else GpuCase(name, (67,) if "step" in name else (7, 10))
    inputs = case.make_inputs()
    forms = ["torch"] if name == "adam_step" else ["torch", "torch-graphs"]  # no capturable optimizer on a processor
    if name in GPU_STEPS:
        forms = ["torch"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bound, rows = bind_all(forms, case.subject, inputs, case.subject.expected(inputs), CONTENDERS, 1e-4)
    assert list(bound) == forms, rows
    assert not any(row["wrong"] for row in rows.values()), rows


def test_a_step_that_is_captured_begins_with_the_weights_that_all_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="compares with PyTorch")
    from minikd.bench.gpu import peer_torch

    monkeypatch.setattr(peer_torch, "DEVICE", "cpu")
    case = small_step(monkeypatch, "adam-784-1200-1200-10")
    inputs = case.make_inputs()
    train = peer_torch.Training(inputs, capturable=False)
    batches = [tuple(map(peer_torch.put, batch)) for batch in case.subject.batches(inputs)]
    wanted = [train(*batch).item() for batch in batches]
    train.begin_again()
    assert [train(*batch).item() for batch in batches] == wanted


def test_jax_without_a_gpu_is_left_out_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax", reason="needs JAX")
    case = GpuCase("softmax", (3, 4))
    _, rows = bind_all(["jax"], case.subject, case.make_inputs(), {}, CONTENDERS)
    assert rows["jax"]["failed"].startswith("RuntimeError: JAX sees no GPU")


# --- a whole run ---


def test_a_task_gives_times_shares_and_errors(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = current_backend()
    (case,) = run_task(Task("softmax", (7, 10), "gpu", ["kernel", "function"], SHORT, copied=1 << 16))
    assert current_backend() == before
    assert case["gpu"] == "a stand-in on the host"
    assert case["bytes"] == 70 * 8
    for row in case["contenders"].values():
        assert row["share"] == pytest.approx(1e9 * case["bytes"] / row["median_ns"] / case["copy"])
        assert row["samples"] >= LEAST_ROUNDS
    step = small_step(monkeypatch, "adam-784-1200-1200-10")
    (case,) = run_task(Task(step.name, (), "gpu", ["plan"], SHORT, copied=1 << 16))
    assert case["contenders"]["plan"]["median_ns"] > 0
    assert "share" not in case["contenders"]["plan"]


def row(ns: float, **more: Any) -> dict[str, Any]:
    times = {"median_ns": ns, "min_ns": ns, "iqr_ns": 0.0, "samples": 9, "calls_per_sample": 1}
    return {**times, "errors": {"y": 1e-7}, "wrong": False, "bytes_per_second": 1e12, "share": 0.5, **more}


FOUND = {
    "name": "softmax",
    "shape": [128, 10],
    "condition": "gpu",
    "gpu": "a card",
    "bytes": 1,
    "copy": 2e12,
    "contenders": {
        "kernel": row(2_000.0),
        "torch": row(6_000.0),
        "jax": row(1_000.0, wrong=True),
        "torch-compile": {"failed": "RuntimeError: no GPU"},
    },
}


def test_ratios_are_to_the_fastest_peer_that_is_right() -> None:
    (ratio,) = report.ratios([FOUND])
    assert (ratio["contender"], ratio["peer"], ratio["same"]) == ("kernel", "torch", 3.0)


def test_tables_show_who_failed_who_is_wrong_and_the_share_of_the_copy() -> None:
    text = "\n".join(plain(table) for table in report.tables({"cases": [FOUND]}))
    assert "softmax, 128 × 10 · a card · copy 2,000 GB/s" in text
    assert "RuntimeError: no GPU" in text
    assert "WRONG: 1e-07" in text
    assert "50 %" in text


def test_a_run_writes_its_report_and_a_readme(
    cupy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "spawn", None, raising=False)
    monkeypatch.setattr("minikd.bench.suite.spawn", lambda task, module: [dict(FOUND)])
    out = tmp_path / "gpu.json"
    assert run(options("--kernel", "softmax", "--shape", "128x10", "--peers", "torch", "--out", str(out))) == 0
    assert json.loads(out.read_text())["ratios"][0]["same"] == 3.0
    readme = tmp_path / "README.md"
    readme.write_text("<!-- gpu -->\n<!-- end gpu -->\n")
    assert run(options("--out", str(out), "--update-readme", str(readme))) == 0
    assert "| softmax, 128 × 10 | 2 (50 %, 1e-07) | 6 (50 %, 1e-07) | failed | wrong | 3.00, PyTorch eager |" in (
        readme.read_text()
    )


def test_without_a_gpu_the_command_says_why_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minikd.kernels import BACKENDS, Backend

    monkeypatch.setitem(BACKENDS, "cupy", Backend("minikd.kernels.cuda", "a_package_that_nobody_has", "cupy", False))
    with pytest.raises(BackendError, match="a_package_that_nobody_has is not installed"):
        run(options())
    assert main(["bench", "--backend", "cupy"]) == 2
    said = capsys.readouterr()
    assert "pip install 'minikd[cupy]'" in said.err + said.out


def test_a_step_is_measured_on_a_gpu_only() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ArgumentError, match="Add --backend cupy"):
        run(parser.parse_args(["--kernel", "adam-784-1200-1200-10"]))


def test_the_clocks_of_a_task_are_the_hosts_for_jax_alone(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(worker, "interleave", lambda calls, effort, clocks: seen.update(clocks))
    bound = {"kernel": Bound(lambda: None, dict), "jax": Bound(lambda: None, dict)}
    worker.timed(bound, lambda: None, SHORT)
    assert {name: isinstance(c, clock.Events) for name, c in seen.items()} == {
        "copy": True, "kernel": True, "jax": False,
    }  # fmt: skip
    assert np.isfinite(seen["jax"](lambda: None, 3))
