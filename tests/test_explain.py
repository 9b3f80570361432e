"""What a plan says of itself: its kernels with their work and time, and its graph."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import minikd as kd
from minikd.errors import PlanError
from minikd.explain import _quantity, flops, measure, rows

F = kd.functional


@pytest.fixture
def trained(backend: str) -> tuple[Any, Any, Any]:
    """A step that has its plan, its model and its optimizer."""
    rng = np.random.default_rng(0)
    model = kd.nn.MLP([64, 32, 10], seed=1)
    opt = kd.optim.Adam(model.parameters(), 1e-3)

    @kd.compile
    def step(x: Any, y: Any) -> Any:
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    for _ in range(2):
        step(rng.normal(size=(32, 64)).astype(np.float32), rng.integers(0, 10, 32))
    return step, model, opt


def test_the_products_of_a_step_have_the_flops_of_their_multiply_adds(trained: Any) -> None:
    (plan,) = trained[0].plans
    counted = sum(flops(call) for call in plan.calls if "linear" in call.name)
    forward, first_layer, second_layer = 64 * 32 + 32 * 10, 64 * 32, 32 * 10
    assert counted == 2 * 32 * (forward + first_layer + 2 * second_layer)  # the first layer's input needs no gradient


def test_every_kernel_stands_below_the_line_that_it_came_from(trained: Any) -> None:
    text = trained[0].explain(timed=False)
    order = [text.index(line) for line in ("loss = F.cross_entropy(model(x), y)", "loss.backward()", "opt.step()")]
    assert order == sorted(order)
    after_step = text[order[-1] :]
    assert "adam_step" in after_step
    assert "cross_entropy" not in after_step
    assert "test_explain.py, line" in text


def test_the_table_says_where_every_input_is_from(trained: Any) -> None:
    (plan,) = trained[0].plans
    table = rows(plan)
    assert {"argument 0", "parameters"} <= set(table[0].reads)
    assert any("argument 1" in row.reads for row in table if row.name == "cross_entropy")
    last = table[-1]
    assert last.name == "adam_step"
    assert "parameters" in last.writes
    for row in table:
        for source in row.reads:
            assert not source.startswith("#") or int(source[1:]) < row.number


def test_measuring_leaves_parameters_and_optimizer_as_they_were(trained: Any) -> None:
    step, model, opt = trained
    kept = [*(p.array for p in model.parameters()), *opt.state.values(), opt._steps, opt.arena.gradients]
    before = [x.tobytes() for x in kept]
    seconds = measure(step.plans[0])
    assert [x.tobytes() for x in kept] == before
    assert len(seconds) == len(step.plans[0].calls)
    assert all(s > 0 for s in seconds)


def test_the_shares_of_time_add_up_to_everything(trained: Any) -> None:
    shares = [int(s) for s in re.findall(r"(\d+) %$", trained[0].explain(), re.M)]
    assert len(shares) == len(trained[0].plans[0].calls)
    assert abs(sum(shares) - 100) <= len(shares) / 2 + 1


def test_the_graph_joins_every_kernel_to_what_it_reads(trained: Any) -> None:
    (plan,) = trained[0].plans
    text = plan.dot()
    assert text.startswith("digraph step {")
    assert text.count("[label=") == len(plan.calls)
    for row in rows(plan):
        for source in row.reads:
            start = f"c{source[1:]}" if source.startswith("#") else f'"{source}"'
            assert f"  {start} -> c{row.number};" in text


def test_a_step_without_a_plan_has_nothing_to_explain() -> None:
    with pytest.raises(PlanError, match="Call it twice"):
        kd.compile(lambda x: x).explain()


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0 B"), (999.4, "999 B"), (999.5, "1.00 kB"), (12_345, "12.3 kB"), (123e6, "123 MB"), (1e13, "10000 GB")],
)
def test_quantities_have_three_digits_and_the_prefix_that_fits(value: float, said: str) -> None:
    assert _quantity(value, "B") == said
