"""The benchmark: that contenders compute the same, that bytes and ratios are counted right, that files come out."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minikd.bench import add_arguments, command, contenders, machine, run, suite, worker
from minikd.bench import report as report_of
from minikd.bench.cases import KERNELS, QUICK, ROWS, error
from minikd.bench.contenders import CONTENDERS, PEERS, Bound
from minikd.bench.machine import PATTERNS, describe, patterns
from minikd.bench.measure import LEAST_ROUNDS, MOST_IN_BATCH, Effort, Turn, calibrate, interleave, order
from minikd.bench.report import errors_text, markdown, micro, ratios, tables
from minikd.bench.worker import CONDITIONS, WRONG, Task, WorkerFailed, bind_all, spawn
from minikd.errors import ArgumentError, DataError
from minikd.report.table import plain

SHORT = Effort(LEAST_ROUNDS, 0.01)
SLOW_TO_COMPILE = {"torch-compile"}  # its results are compared in every run of the benchmark


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


# --- cases and contenders ---


@pytest.mark.parametrize("name", KERNELS)
def test_every_contender_agrees_with_the_reference(name: str) -> None:
    kernel = KERNELS[name]
    inputs = kernel.make_inputs((1030,) if len(kernel.shapes[0]) == 1 else (33, 10))
    able = [k for k, c in CONTENDERS.items() if name in c.kernels and k not in SLOW_TO_COMPILE and not c.missing()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers
        bound, rows = bind_all(able, kernel, inputs, kernel.expected(inputs))
    assert list(bound) == able, {key: row for key, row in rows.items() if "failed" in row}
    for key, row in rows.items():
        assert not row["wrong"], (key, row)
        assert all(e < 1e-4 for e in row["errors"].values()), (key, row)


@pytest.mark.parametrize("name", ["softmax", "distillation_loss"])
def test_what_torch_compiles_agrees_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is before the compiler has it, which would take a minute."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'minikd[test-oracles]'")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    kernel = KERNELS[name]
    inputs = kernel.make_inputs((33, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers
        bound, rows = bind_all(sorted(SLOW_TO_COMPILE), kernel, inputs, kernel.expected(inputs))
    assert set(bound) == SLOW_TO_COMPILE, rows
    assert all(e < 1e-4 for row in rows.values() for e in row["errors"].values()), rows


def test_inputs_are_the_same_in_every_process_and_left_as_they_are() -> None:
    kernel = KERNELS["adam_step"]
    inputs, again = kernel.make_inputs((67,)), kernel.make_inputs((67,))
    CONTENDERS["numpy"].bind(kernel, inputs).call()
    kernel.expected(inputs)
    assert all(np.array_equal(inputs[name], again[name]) for name in again)


def test_a_wrong_contender_and_a_broken_one_are_shown_and_not_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KERNELS["softmax"]
    inputs = kernel.make_inputs((5, 10))

    def make(form: str, *more: Any) -> Bound:
        if form == "broken":
            raise RuntimeError("no compiler\nand more")
        return Bound(lambda: inputs["x"] * 0, lambda result: {"y": result})

    monkeypatch.setattr("minikd.bench.peer_numpy.make", make)
    monkeypatch.setitem(CONTENDERS, "scipy", CONTENDERS["numpy"]._replace(form="broken"))
    bound, rows = bind_all(["numpy", "scipy"], kernel, inputs, kernel.expected(inputs))
    assert list(bound) == ["numpy"]
    assert rows["numpy"]["wrong"]
    assert rows["scipy"] == {"failed": "RuntimeError: no compiler"}


def test_errors_are_relative_to_the_row() -> None:
    expected = np.array([[1.0, 100.0], [1e-6, 1e-7]])
    assert math.isclose(error(expected + np.array([[0, 1], [0, 0]]), expected), 0.01)
    assert math.isclose(error(expected + np.array([[0, 0], [1e-7, 0]]), expected), 0.1)
    assert error(np.full((2, 2), np.nan), expected) == math.inf
    assert error(np.zeros(3), expected) == math.inf
    assert error(np.float32(2.0), np.float64(1.0)) == 1.0 > WRONG


def test_a_mask_that_drops_too_little_is_an_error() -> None:
    kernel = KERNELS["dropout"]
    inputs = kernel.make_inputs((100, 100))
    assert kernel.errors({"y": 2 * inputs["x"]}, {}, inputs) == {"y": math.inf}


@pytest.mark.parametrize(
    ("name", "bytes_per_element"),
    [("distillation_loss", 16), ("cross_entropy", 12), ("softmax", 12), ("softmax_vjp", 16), ("adam_step", 28)],
)
def test_bytes_are_counted_with_write_allocate(name: str, bytes_per_element: int) -> None:
    assert KERNELS[name].bytes_moved((3, 5)) == 15 * bytes_per_element


def test_a_peer_that_is_not_installed_is_named_with_the_way_to_get_it() -> None:
    absent = CONTENDERS["jax"]._replace(requires="a_package_that_nobody_has", install="pip install it")
    assert absent.missing() == "a_package_that_nobody_has is not installed: pip install it"
    assert not CONTENDERS["numpy"].missing()


# --- the clock ---


def test_tiny_calls_are_repeated_within_a_sample_and_slow_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0}
    monkeypatch.setattr("time.perf_counter_ns", lambda: clock["now"])

    def taking(ns: int) -> Any:
        return lambda: clock.update(now=clock["now"] + ns)

    tiny, slow = calibrate(taking(1_000)), calibrate(taking(50_000_000))
    assert (tiny.samples, tiny.warm) == (MOST_IN_BATCH, True)
    assert tiny.calls * 1_000 >= 200_000
    assert (slow.calls, slow.samples, slow.warm) == (1, 1, False)
    timings = interleave({"a": taking(1_000), "b": taking(2_000)}, Effort(20, 60.0))
    assert timings["b"].figures()["median_ns"] == 2 * timings["a"].figures()["median_ns"] == 2_000
    assert len(timings["a"].samples) == 20 * MOST_IN_BATCH


def test_rounds_stop_in_time_but_never_before_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minikd.bench.measure.calibrate", lambda call, clock: Turn(calls=1, samples=3, warm=True))
    timings = interleave({"a": lambda: None}, Effort(1000, 0.0))
    assert len(timings["a"].samples) == LEAST_ROUNDS * 3


def test_each_round_has_every_contender_once_in_another_order() -> None:
    orders = [order(list("abc"), number) for number in range(6)]
    assert all(sorted(names) == list("abc") for names in orders)
    assert len({tuple(names) for names in orders}) == 6


# --- the machine ---


@pytest.mark.parametrize("threads", [1, 2])
def test_patterns_move_what_they_count(threads: int) -> None:
    moves = patterns(3 * 2**22, threads)
    assert {name: moved // PATTERNS[name] for name, (_, moved) in moves.items()} == dict.fromkeys(PATTERNS, 2**20)
    for call, _ in moves.values():
        call()


def test_the_machine_is_described_in_json() -> None:
    machine = json.loads(json.dumps(describe()))
    assert machine["cores"] >= 1
    assert machine["versions"]["numpy"] == np.__version__
    assert machine["blas"]
    assert machine["cpu"]


def test_thread_counts_of_the_environment_reach_no_peer_that_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("XLA_FLAGS", "--something")
    alone, one, tuned = (CONDITIONS[name].environment() for name in ("alone", "one", "tuned"))
    assert "OMP_NUM_THREADS" not in alone
    assert "XLA_FLAGS" not in alone
    assert one["OMP_NUM_THREADS"] == one["OPENBLAS_NUM_THREADS"] == one["MINIKD_NUM_THREADS"] == "1"
    assert len(CONDITIONS["one"].processors()) == 1
    assert "MALLOC_MMAP_MAX_" in tuned.keys() - one.keys()


# --- ratios and tables, of figures made up ---


def case(condition: str, medians: dict[str, float], wrong: str = "") -> dict[str, Any]:
    rows = {
        key: {
            "errors": {"loss": 1e-8, "gradient": None if key == wrong else 1e-7},
            "wrong": key == wrong,
            "median_ns": ns,
            "min_ns": ns,
            "iqr_ns": 0.0,
            "samples": 9,
            "calls_per_sample": 1,
            "ns_per_element": ns / 1280,
            "bytes_per_second": 20480e9 / ns,
            "share": None if condition == "alone" else 0.5,
            "over_floor": None if condition == "alone" else 2.0,
        }
        for key, ns in medians.items()
    }
    limit = {} if condition == "alone" else {"read": 1e10, "copy": 2e10, "add": 4e10}
    whole = {"kernel": "distillation_loss", "shape": [128, 10], "condition": condition, "threads": 1}
    return {**whole, "elements": 1280, "bytes": 20480, "limit": limit, "memory": limit, "contenders": rows}


@pytest.fixture
def report() -> dict[str, Any]:
    cases = [
        case("one", {"c": 10e3, "numba": 20e3, "jax": 100e3, "torch": 200e3, "numpy": 1e3}, wrong="numpy"),
        case("alone", {"jax": 50e3}),
        case("tuned", {"c": 10e3, "numba": 20e3, "jax": 30e3}),
    ]
    machine = {"cpu": "a CPU", "cores": 2, "cpu_level": "v4", "blas": "a BLAS", "system": "Linux", "python": "3"}
    missing = {"scipy": "scipy is not installed: pip install scipy"}
    whole = {"machine": {**machine, "versions": {"numpy": "2"}}, "missing": missing, "settings": {}}
    return {**whole, "cases": cases, "ratios": ratios(cases)}


def test_the_best_condition_of_a_peer_counts_and_a_wrong_peer_does_not(report: dict[str, Any]) -> None:
    c, numba = report["ratios"]
    assert (c["contender"], c["same"], c["same_peer"]) == ("c", 10.0, "jax")
    assert (c["best"], c["best_peer"], c["best_condition"]) == (5.0, "jax", "alone")
    assert (c["tuned"], numba["same"], numba["best"]) == (3.0, 5.0, 2.5)


def test_the_tables_name_everything(report: dict[str, Any]) -> None:
    text = "\n".join(plain(table, 140) for table in tables(report))
    assert "distillation_loss, 128 × 10 · one thread, interleaved · limit 40.0 GB/s" in text
    assert "WRONG: not finite, loss 1e-08" in text
    page = markdown(report)
    assert "| 128 × 10 | 10.0 · 5.0 | 5.0 · 2.5 | jax.jit | jax.jit, alone | 3.0 | 2.0 | 50 % | 2.00 |" in page
    assert "| 128 × 10 | 10 (1e-07) | 20 (1e-07) | 200 (1e-07) | 100 (1e-07) | wrong |" in page
    assert "Not measured: SciPy (scipy is not installed: pip install scipy)." in page
    assert "###" not in markdown(report, ["softmax"])


def test_numbers_as_texts() -> None:
    assert [micro(ns) for ns in (1234.0, 98_760.0, 1_234_567.0)] == ["1.23", "98.8", "1,235"]
    assert errors_text({"w": 0.0, "m": 2e-7}) == "2e-07"


def test_the_picture_is_a_png_of_what_was_measured(report: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib to draw")
    from minikd.bench.picture import roofline

    drawn = roofline(report)
    assert drawn is not None
    assert drawn.startswith(b"\x89PNG")
    assert roofline({"cases": [], "ratios": []}) is None


# --- what is asked for ---


def test_everything_is_every_kernel_in_every_condition() -> None:
    asked = list(command.tasks(options("--tuned-malloc"), dict.fromkeys(PEERS, "absent"), ""))
    assert {task.kernel for task in asked} == set(KERNELS)
    assert {task.condition for task in asked} == {"one", "all", "tuned"}
    alone = [task for task in command.tasks(options(), {}, "") if task.condition == "alone"]
    assert all(len(task.contenders) == 1 for task in alone)
    assert {task.contenders[0] for task in alone} == set(PEERS)


def test_quick_and_the_other_options_narrow_it_down() -> None:
    quick = list(command.tasks(options("--quick"), {}, ""))
    assert {task.kernel: task.shapes for task in quick} == QUICK
    assert {task.condition for task in quick} == {"one"}
    asked = options("--kernel", "softmax", "--shape", "128x10", "--peers", "none", "--threads", "1")
    (task,) = command.tasks(asked, {}, "")
    assert (task.shapes, task.contenders) == (ROWS[:1], ["c", "numba", "function"])


def test_a_shape_that_no_kernel_has_is_an_error() -> None:
    with pytest.raises(ArgumentError, match=r"--shape must be one of 1276810, 2395210 for adam_step, got 128x10"):
        list(command.tasks(options("--kernel", "adam_step", "--shape", "128x10"), {}, ""))


# --- whole runs, in processes of their own ---


def test_a_run_writes_its_figures_and_a_readme_takes_them_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SHORT", SHORT)
    monkeypatch.setattr(command, "LARGEST_QUICK", 2**20)
    out, page = tmp_path / "results" / "kernels.json", tmp_path / "README.md"
    asked = ["--out", str(out), "--quick", "--kernel", "softmax", "--shape", "128x10", "--peers", "numpy"]
    assert run(options(*asked)) == 0
    assert "softmax, 128 × 10 · one thread, interleaved" in capsys.readouterr().out
    (found,) = json.loads(out.read_text())["cases"]
    assert found["threads"] == 1
    assert set(found["limit"]) == set(found["memory"]) == set(PATTERNS)
    row = found["contenders"]["numpy"]
    assert row["samples"] >= LEAST_ROUNDS
    assert row["min_ns"] <= row["median_ns"]
    assert math.isclose(row["bytes_per_second"], 1e9 * 12 * 1280 / row["median_ns"])

    page.write_text("before\n<!-- bench softmax -->\nold\n<!-- end bench -->\nafter\n")
    for _ in "twice":
        assert run(options("--out", str(out), "--update-readme", str(page))) == 0
        text = page.read_text()
        assert text.startswith("before\n<!-- bench softmax -->\n")
        assert text.endswith("\n<!-- end bench -->\nafter\n")
        assert text.count("### softmax") == 1
        assert "old" not in text


def test_a_run_adds_to_what_was_measured_before_and_replaces_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SHORT", SHORT)
    monkeypatch.setattr(command, "LARGEST_QUICK", 2**20)
    monkeypatch.setattr("minikd.bench.suite.spawn", lambda task, module: worker.run_task(task))  # it is quicker here
    out = tmp_path / "kernels.json"

    def measure(kernel: str, *more: str) -> list[str]:
        asked = ["--out", str(out), "--quick", "--kernel", kernel, "--shape", "128x10", "--peers", "none", *more]
        assert run(options(*asked)) == 0
        return [found["kernel"] for found in json.loads(out.read_text())["cases"]]

    assert measure("softmax") == ["softmax"]
    assert measure("distillation_loss", "--add") == ["distillation_loss", "softmax"]
    assert measure("softmax", "--add") == ["distillation_loss", "softmax"]
    assert measure("softmax") == ["softmax"]
    other = json.loads(out.read_text())
    other["machine"]["cpu"] = "another"
    out.write_text(json.dumps(other))
    with pytest.raises(DataError, match=r"--add must be a report of cpu .*, got another in"):
        measure("softmax", "--add")


def test_a_readme_without_markers_and_a_missing_report_are_errors(tmp_path: Path) -> None:
    page, out = tmp_path / "README.md", tmp_path / "kernels.json"
    page.write_text("nothing")
    with pytest.raises(DataError, match="--out must be an existing report"):
        run(options("--out", str(out), "--update-readme", str(page)))
    out.write_text(json.dumps({"machine": {}, "cases": []}))
    with pytest.raises(DataError, match=r"--update-readme must be a file with <!-- bench -->"):
        run(options("--out", str(out), "--update-readme", str(page)))


def test_a_process_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    task = Task("no_such_kernel", [(2, 3)], "one", ["numpy"], SHORT, str(tmp_path), 2**16)
    with pytest.raises(WorkerFailed, match="KeyError: 'no_such_kernel'"):
        spawn(task)


def test_processes_share_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KERNELS["softmax"]
    inputs = kernel.make_inputs((2, 3))
    first = worker.reference(kernel, (2, 3), inputs, tmp_path)
    monkeypatch.setattr("minikd.bench.cases.bind_reference", lambda name: pytest.fail("computed twice"))
    assert np.array_equal(worker.reference(kernel, (2, 3), inputs, tmp_path)["y"], first["y"])


def test_the_table_has_a_contender_for_each_backend_that_is_fast() -> None:
    assert {"c", "numba"} <= set(contenders.BACKENDS) & set(CONTENDERS)


def test_a_run_says_what_it_leaves_out_and_goes_on_without_processes_that_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def dies(*_: Any) -> Any:
        raise WorkerFailed("its last words")

    monkeypatch.setattr("minikd.bench.suite.spawn", dies)
    monkeypatch.setattr(CONTENDERS["torch"].__class__, "missing", lambda self: "" if self.ours else "not installed")
    out = tmp_path / "kernels.json"
    asked = ["--out", str(out), "--quick", "--kernel", "softmax", "--shape", "128x10", "--peers", "torch", "--add"]
    assert run(options(*asked)) == 1
    said = capsys.readouterr().err
    assert f"{CONTENDERS['torch'].label} is left out: not installed" in said
    assert "the process failed and is left out:\nits last words" in said
    assert not out.exists(), "nothing was measured"


def test_a_process_that_is_not_waited_for_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Interrupted(subprocess.Popen):
        def communicate(self, *_: Any, **__: Any) -> Any:
            started.append(self)
            self.stdin.close()
            self.stderr.close()
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        spawn(Task("softmax", [(2, 3)], "one", ["numpy"], SHORT, str(tmp_path), 2**16))
    assert started[0].returncode is not None


def test_processes_are_not_pinned_where_the_system_has_no_such_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with worker.pinned([0]):
        assert not hasattr(os, "sched_setaffinity")


def test_a_machine_without_c_kernels_and_with_a_blas_unknown_is_described_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.BACKENDS["c"].__class__, "missing", lambda self: "no compiler")
    monkeypatch.setattr(Path, "read_text", lambda self: "")
    monkeypatch.setattr(np, "show_config", lambda mode: {"Build Dependencies": {"blas": {"name": "a-blas"}}})
    assert machine.cpu_level() == ""
    assert machine.blas() == "a-blas"


def test_turns_wait_for_the_threads_of_others_to_go_to_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = []
    monkeypatch.setattr("minikd.bench.measure.time.sleep", slept.append)
    timings = interleave({"a": lambda: None, "b": lambda: None}, SHORT, rest=True)
    assert len(slept) >= 2 * LEAST_ROUNDS
    assert set(timings) == {"a", "b"}


def test_a_script_of_the_folder_writes_its_figures_beside_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    script, page = tmp_path / "bench" / "kernels.py", tmp_path / "README.md"
    script.parent.mkdir()
    page.write_text("the checkout's")
    monkeypatch.setattr("sys.argv", [str(script), "--update-readme"])
    assert suite.script(str(script), "a text", add_arguments, lambda found: asked.append(found) or 3) == 3
    assert asked[0].out == str(script.with_suffix(".json"))
    assert asked[0].update_readme == [str(page)]


def test_a_failed_and_a_missing_contender_leave_their_cells_empty() -> None:
    row = report_of._row("numpy", {"failed": "RuntimeError: no such thing"}, None)
    assert row == (CONTENDERS["numpy"].label, *["–"] * 7, "RuntimeError: no such thing")
    assert report_of.time_cell(None) == "–"
    assert report_of.time_cell({"failed": "RuntimeError"}) == "failed"
    assert report_of._peers_cells(None) == ["–", "–"]
    assert report_of._limit_cells(None) == report_of._limit_cells({"share": None}) == ["–"] * 3
