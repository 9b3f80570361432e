"""The benchmark of whole steps: that contenders train alike, that times are those of one step, that files come out."""

from __future__ import annotations

import argparse
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minikd.bench.measure import LEAST_ROUNDS, Effort, Timing
from minikd.bench.steps import add_arguments, command, run, worker
from minikd.bench.steps.cases import CHECKED, LR, QUICK, STEPS, TOLERANCE
from minikd.bench.steps.contenders import CONTENDERS, EPOCHS, PEERS, one_by_one
from minikd.bench.steps.peer_numpy import products
from minikd.bench.steps.report import markdown, ratios, tables
from minikd.bench.steps.worker import Task, run_task
from minikd.bench.worker import bind_all
from minikd.errors import DataError
from minikd.report.table import plain

SLOW_TO_COMPILE = {"torch-compile"}  # its results are compared in every run of the benchmark
UPDATES = [name for name, step in STEPS.items() if step.optimizer]


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


# --- steps and contenders ---


@pytest.mark.parametrize("name", STEPS)
def test_every_contender_agrees_with_the_reference(name: str) -> None:
    step, left_out = STEPS[name], SLOW_TO_COMPILE
    inputs = step.make_inputs()
    able = [k for k, c in CONTENDERS.items() if name in c.kernels and k not in left_out and not c.missing()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers
        bound, rows = bind_all(able, step, inputs, step.expected(inputs), CONTENDERS, TOLERANCE)
    assert list(bound) == able, {key: row for key, row in rows.items() if "failed" in row}
    assert not any(row["wrong"] for row in rows.values()), rows


@pytest.mark.parametrize("name", STEPS)
def test_what_torch_compiles_agrees_with_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is before the compiler has it, which would take a minute."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'minikd[test-oracles]'")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    step = STEPS[name]
    inputs = step.make_inputs()
    able = [key for key in SLOW_TO_COMPILE if name in CONTENDERS[key].kernels]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers
        bound, rows = bind_all(able, step, inputs, step.expected(inputs), CONTENDERS, TOLERANCE)
    assert list(bound) == able, rows
    assert not any(row["wrong"] for row in rows.values()), rows


@pytest.mark.parametrize("name", UPDATES)
def test_a_step_that_is_a_twentieth_too_long_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = STEPS[name]
    inputs = step.make_inputs()
    expected = step.expected(inputs)
    monkeypatch.setitem(LR, step.optimizer, 1.05 * LR[step.optimizer])
    _, rows = bind_all(["numpy"], step, inputs, expected, CONTENDERS, TOLERANCE)
    assert rows["numpy"]["wrong"]


def test_inputs_are_the_same_in_every_process_and_left_as_they_are() -> None:
    step = STEPS["sgd-64-32-10"]
    inputs, again = step.make_inputs(), step.make_inputs()
    step.expected(inputs)
    CONTENDERS["numpy"].bind(step, inputs).call()
    CONTENDERS["eager"].bind(step, inputs).call()
    for name in ("x", "y"):
        assert np.array_equal(inputs[name], again[name])
    assert all(np.array_equal(a, b) for a, b in zip(inputs["network"], again["network"], strict=True))


def test_each_call_takes_the_next_batch_and_begins_anew_after_the_last() -> None:
    step = STEPS["sgd-64-32-10"]
    bound = one_by_one(step, [(k,) for k in range(CHECKED + 1)], lambda k: k)
    assert list(bound.read(bound.call())["loss"]) == [0, 1, 2]
    assert [bound.call() for _ in range(3)] == [3, 0, 1]


@pytest.mark.parametrize(
    ("name", "count"),
    [("sgd-64-32-10", 5), ("adam-784-800-800-10", 8), ("distil-784-800-800-10", 11), ("predict-784-800-800-10", 3)],
)
def test_the_yardstick_has_no_gradient_of_the_inputs(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    step = STEPS[name]
    inputs, shapes = step.make_inputs(), []
    monkeypatch.setattr(np, "matmul", lambda a, b, out: shapes.append(out.shape))
    products(step, inputs)()
    assert len(shapes) == count


def test_a_peer_that_is_not_installed_is_named_with_the_way_to_get_it() -> None:
    absent = CONTENDERS["sklearn"]._replace(requires="a_package_that_nobody_has")
    assert absent.missing() == "a_package_that_nobody_has is not installed: pip install scikit-learn"


# --- what a process measures ---


def test_times_are_those_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = one_by_one(STEPS["sgd-64-32-10"], [(k,) for k in range(9)], lambda k: 0.0)._replace(steps=50)
    rows = {"numpy": {"errors": {"loss": 0.0}, "wrong": False}}
    monkeypatch.setattr(worker, "bind_all", lambda *arguments: ({"numpy": whole}, rows))
    monkeypatch.setattr(worker, "interleave", lambda calls, *more, **other: {n: Timing([5e3] * 9, 2) for n in calls})
    (case,) = run_task(Task("sgd-64-32-10", "one", ["numpy"], Effort(LEAST_ROUNDS, 0.0)))
    assert (case["threads"], case["products_ns"]) == (1, 5e3)
    row = case["contenders"]["numpy"]
    assert (row["median_ns"], row["min_ns"], row["over_products"]) == (100.0, 100.0, 0.02)
    assert (row["samples"], row["calls_per_sample"]) == (9, 2)


def test_whoever_runs_alone_has_no_yardstick_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(worker, "bind_all", lambda *arguments: ({}, {}))
    monkeypatch.setattr(worker, "interleave", lambda calls, *more, **other: timed.extend(calls))
    (case,) = run_task(Task("sgd-64-32-10", "alone", ["numpy"], Effort(LEAST_ROUNDS, 0.0)))
    assert (case["products_ns"], timed) == (None, [])


# --- ratios and tables, of figures made up ---


def case(condition: str, medians: dict[str, float], wrong: str = "") -> dict[str, Any]:
    rows = {
        key: {
            "errors": {"loss": None if key == wrong else 1e-7},
            "wrong": key == wrong,
            "median_ns": ns,
            "min_ns": ns,
            "iqr_ns": 0.0,
            "samples": 9,
            "calls_per_sample": 1,
            "over_products": None if condition == "alone" else ns / 5e3,
        }
        for key, ns in medians.items()
    }
    whole = {"step": "sgd-64-32-10", "condition": condition, "threads": 1}
    whole["products_ns"] = None if condition == "alone" else 5e3
    return {**whole, "contenders": rows}


@pytest.fixture
def report() -> dict[str, Any]:
    together = {"plan": 10e3, "epoch": 5e3, "eager": 80e3, "jax": 100e3, "jax-scan": 20e3, "numpy": 60e3}
    cases = [
        case("one", {**together, "torch": 1e3}, wrong="torch"),
        case("alone", {"plan": 8e3}),
        case("alone", {"jax": 40e3}),
    ]
    cases[1]["contenders"]["sklearn"] = {"failed": "RuntimeError: no such thing"}
    machine = {"cpu": "a CPU", "cores": 2, "cpu_level": "v4", "blas": "a BLAS", "system": "Linux", "python": "3"}
    missing = {"mygrad": "mygrad is not installed: pip install mygrad"}
    whole = {"machine": {**machine, "versions": {"numpy": "2"}}, "missing": missing, "settings": {}}
    return {**whole, "cases": cases, "ratios": ratios(cases)}


def test_steps_are_compared_with_steps_and_epochs_with_all(report: dict[str, Any]) -> None:
    plan, epoch, eager = report["ratios"]
    assert (plan["same"], plan["same_peer"]) == (6.0, "numpy")
    assert (plan["best"], plan["best_peer"], plan["best_condition"]) == (5.0, "jax", "alone")
    assert (plan["own_condition"], plan["over_products"]) == ("alone", 2.0)
    assert (epoch["same"], epoch["same_peer"], epoch["best"]) == (4.0, "jax-scan", 4.0)
    assert (eager["contender"], eager["same"], eager["own_condition"]) == ("eager", 0.75, "one")


def test_the_tables_name_everything(report: dict[str, Any]) -> None:
    text = "\n".join(plain(table, 140) for table in tables(report))
    assert "64-32-10, SGD with momentum, batch 32 · one thread, interleaved" in text
    assert "WRONG: not finite" in text
    assert "RuntimeError: no such thing" in text
    page = markdown(report)
    assert "| minikd plan | 10 (1e-07) |" in page
    assert "| PyTorch eager | wrong |" in page
    assert "| matrix products alone | 5 |" in page
    assert "6.00 · 5.00 | NumPy, out= | jax.jit, alone | 2.00 | 4.00 · 4.00 | jax.lax.scan" in page
    assert "Not measured: MyGrad (mygrad is not installed: pip install mygrad)." in page
    assert page.count("\n| ---") == 3
    summary = markdown(report, ["summary"])
    assert summary.count("\n| ---") == 1
    assert "minikd eager" not in summary


# --- what is asked for ---


def test_everything_is_every_step_together_and_everybody_alone() -> None:
    asked = list(command.tasks(options(), {}, ""))
    together = [task for task in asked if task.condition == "one"]
    assert [task.step for task in together] == list(STEPS)
    alone = [task for task in asked if task.condition == "alone"]
    assert all(len(task.contenders) == 1 for task in alone)
    assert {task.contenders[0] for task in alone} == set(CONTENDERS)
    assert {task.condition for task in asked} == {"one", "alone"}


def test_the_options_narrow_it_down() -> None:
    assert [(task.step, task.condition) for task in command.tasks(options("--quick"), {}, "")] == [
        (name, "one") for name in QUICK
    ]
    asked = options("--step", "predict-64-32-10", "--peers", "jax", "--threads", "1", "all", "--no-alone")
    assert [task.contenders for task in command.tasks(asked, {}, "")] == [["plan", "eager", "jax"]] * 2
    assert [task.contenders for task in command.tasks(asked, {"jax": "absent"}, "")] == [["plan", "eager"]] * 2


def test_whoever_runs_epochs_takes_part_in_training_alone() -> None:
    assert EPOCHS - set(PEERS) == {"epoch"}
    assert all(CONTENDERS[key].kernels == set(UPDATES) for key in EPOCHS)


# --- whole runs, in processes of their own ---


def test_a_run_writes_its_figures_and_a_readme_takes_them_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "SHORT", Effort(LEAST_ROUNDS, 0.01))
    out, page = tmp_path / "results" / "steps.json", tmp_path / "README.md"
    asked = ["--out", str(out), "--quick", "--step", "sgd-64-32-10", "--peers", "numpy"]
    assert run(options(*asked)) == 0
    assert "64-32-10, SGD with momentum, batch 32 · one thread, interleaved" in capsys.readouterr().out
    (found,) = json.loads(out.read_text())["cases"]
    row = found["contenders"]["numpy"]
    assert not row["wrong"]
    assert row["samples"] >= LEAST_ROUNDS
    assert math.isclose(row["over_products"], row["median_ns"] / found["products_ns"])
    assert not found["contenders"]["eager"]["wrong"]

    assert run(options("--out", str(out), "--quick", "--add", "--step", "predict-64-32-10", "--peers", "none")) == 0
    report = json.loads(out.read_text())
    assert [one["step"] for one in report["cases"]] == ["sgd-64-32-10", "predict-64-32-10"]
    assert {ratio["step"] for ratio in report["ratios"]} == {"sgd-64-32-10"}

    page.write_text("<!-- bench -->\nkept\n<!-- end bench -->\n<!-- steps summary -->\nold\n<!-- end steps -->\n")
    for _ in "twice":
        assert run(options("--out", str(out), "--update-readme", str(page))) == 0
        text = page.read_text()
        assert "old" not in text
        assert text.startswith("<!-- bench -->\nkept\n<!-- end bench -->\n<!-- steps summary -->\n")
        assert text.count("64-32-10, SGD with momentum, batch 32") == 1
    page.write_text("nothing")
    with pytest.raises(DataError, match=r"--update-readme must be a file with <!-- steps -->"):
        run(options("--out", str(out), "--update-readme", str(page)))
