"""The backend "cupy" on a strict stand-in for CuPy: what is computed there, what moves, and what is refused.

No GPU is needed. The stand-in refuses hidden copies; that it asks of CuPy only what CuPy has is compared with the real
one where that is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from standin import cupy as standin
from standin.cupy import COPIES

import minikd as kd
from minikd import functional as F
from minikd.kernels import composed, cuda, current_backend, execute, input_arguments, run
from minikd.kernels.arrays import HOST_KINDS, here, on_device, to_device, to_host
from minikd.objectives import IGNORED, NAMES, Batch
from minikd.ops import OPS, Op


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in as cupy, and its backend in use: on formulas alone, without kernels of its own."""
    before = current_backend()
    monkeypatch.setattr(cuda, "NAMES", frozenset())
    with standin.installed() as module:
        kd.use_backend("cupy")
        try:
            yield module
        finally:
            kd.use_backend(before)


def moved(op: Op, inputs: list[Any]) -> list[Any]:
    """An operation's inputs where the backend "cupy" takes them: numbers stay on the host."""
    arguments = input_arguments(op, len(inputs))
    return [
        x if x is None or a.kind in HOST_KINDS else to_device(np.asarray(x))
        for a, x in zip(arguments, inputs, strict=True)
    ]


# --- the table of operations ---

COMPUTED = [name for name, op in OPS.items() if not op.updates and op.outs[0].kind not in HOST_KINDS]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", COMPUTED)
def test_an_operation_on_the_device_has_the_bits_of_its_reference(name: str, dtype: Any, cupy: Any) -> None:
    op = OPS[name]
    for inputs, attrs in op.example(np.random.default_rng(5), dtype):
        kd.use_backend("numpy")
        outs, saved, _ = execute(op, inputs, attrs)
        kd.use_backend("cupy")
        given = moved(op, inputs)
        cupy.COPIES.reset()
        found, kept, _ = execute(op, given, attrs)
        assert (cupy.COPIES.to_host, cupy.COPIES.to_device) == (0, 0)
        for mine, wanted in zip([*found, *kept], [*outs, *saved], strict=True):
            if wanted is None:
                assert mine is None
            elif name in composed.KERNELS:  # which adds up in another order there
                np.testing.assert_allclose(
                    to_host(mine), wanted, rtol=1e-4 if dtype is np.float32 else 1e-12, atol=1e-5
                )
            else:
                assert on_device(mine)
                assert to_host(mine).tobytes() == np.asarray(wanted).tobytes()


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.updates])
def test_an_update_on_the_device_has_the_bits_of_its_reference(name: str, cupy: Any) -> None:
    op, rng = OPS[name], np.random.default_rng(6)
    for inputs, attrs in op.example(rng, np.float32):
        shape = np.shape(inputs[0]) if inputs else (4, 3) if "m" in op.letters else (12,)
        host: list[Any] = [
            np.array(3) if a.kind in HOST_KINDS else rng.uniform(0, 1, shape).astype(np.float32) for a in op.updates
        ]
        device = [x.copy() if a.kind in HOST_KINDS else to_device(x) for a, x in zip(op.updates, host, strict=True)]
        run(name, *device, *moved(op, inputs), **attrs)
        kd.use_backend("numpy")
        run(name, *host, *(np.asarray(x) for x in inputs), **attrs)
        kd.use_backend("cupy")
        for mine, wanted in zip(device, host, strict=True):
            assert to_host(mine).tobytes() == wanted.tobytes()


def test_a_tensor_is_made_on_the_device_and_its_gradient_comes_from_there(cupy: Any) -> None:
    x = kd.Tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    loss = F.cross_entropy(x @ np.ones((3, 3)).tolist(), [0, 2])
    loss.backward()
    assert on_device(x.array)
    assert on_device(loss.array)
    assert x.grad is not None
    assert on_device(x.grad.array)
    np.testing.assert_allclose(x.grad.numpy(), np.zeros((2, 3)), atol=1e-12)


# --- training by hand ---


def learned(optimizer: str, backend: str, steps: int = 4) -> dict[str, np.ndarray]:
    """The weights of a small network after a few steps with dropout, clipping and a bound on the weights."""
    kd.use_backend(backend)
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(12, 6)).astype(np.float32), rng.integers(0, 4, 12)
    model = kd.nn.MLP([6, 8, 4], activation="gelu", dropout=0.3, seed=1)
    opt = kd.optim.OPTIMIZERS[optimizer](model.parameters(), 0.05, clip=0.5, max_norm=1.0)
    batch, labels = kd.Tensor(x), here.put(y)
    COPIES.reset()
    for step in range(steps):
        loss = F.distillation_loss(model(batch), batch @ model.layers[0].weight.T.detach()[:, :4], labels) * 0.5
        opt.zero_grad()
        opt.lr = 0.05 / (1 + step)
        loss.backward()
        opt.step()
    return model.state_dict() | opt.state_dict()


@pytest.mark.parametrize("optimizer", kd.optim.OPTIMIZERS)
def test_a_network_learns_the_same_bits_on_the_device_as_by_numpy(optimizer: str, cupy: Any) -> None:
    wanted, found = learned(optimizer, "numpy"), learned(optimizer, "cupy")
    assert {name: value.tobytes() for name, value in found.items()} == {n: v.tobytes() for n, v in wanted.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_term_has_the_bits_of_the_host_and_copies_nothing_on_its_way(name: str, cupy: Any) -> None:
    rng = np.random.default_rng(8)
    given = {
        "logits": rng.normal(size=(7, 5)),
        "teacher": rng.normal(size=(7, 5)),
        "target": np.array([0, 4, IGNORED, 2, 1, 1, IGNORED]),
        "student's layer": np.abs(rng.normal(size=(7, 6))),
        "teacher's layer": np.abs(rng.normal(size=(7, 6))),
    }

    def of(backend: str) -> list[bytes]:
        kd.use_backend(backend)
        mine = {name: here.put(value) for name, value in given.items()}
        logits, layer = (kd.Tensor(mine[name], requires_grad=True) for name in ("logits", "student's layer"))
        batch = Batch(logits, mine["teacher"], mine["target"], {"1": layer}, {"1": mine["teacher's layer"]})
        term = NAMES[name](0.5)
        term.prepare(batch)
        COPIES.reset()
        loss = term(batch)
        loss.backward()
        assert (COPIES.to_host, COPIES.to_device) == (0, 0)
        leaves = [loss.array, *(t.grad.array for t in (logits, layer, *term.parameters()) if t.grad is not None)]
        return [to_host(leaf).tobytes() for leaf in leaves]

    assert of("cupy") == of("numpy")
