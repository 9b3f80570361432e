"""Networks in int8 in safetensors files: the same integers come back, and what does not fit is refused by its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minikd.data import Normalisation
from minikd.errors import ModelFormatError
from minikd.export import read_tensors, write_tensors
from minikd.export.int8_file import load_int8, save_int8
from minikd.export.network import Network
from minikd.export.quantise import Quantised, quantise
from minikd.nn import MLP
from minikd.ops.elementwise import ACTIVATIONS


def network(activation: str = "tanh") -> Quantised:
    rng = np.random.default_rng(1)
    model = MLP([4, 6, 5, 3], activation, seed=2)
    model.normalisation = Normalisation(rng.normal(size=4).astype(np.float32), np.full(4, 2, np.float32))
    model.class_names = ("cat", 'do"g', "naïve ✓")
    return quantise(Network.of(model), rng.normal(size=(60, 4)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_network_comes_back_with_the_same_integers(activation: str, tmp_path: Path) -> None:
    q, path = network(activation), tmp_path / "q"
    save_int8(path, q)
    found = load_int8(path)
    x = np.random.default_rng(0).normal(size=(50, 4))
    np.testing.assert_array_equal(found.quantise_input(x), q.quantise_input(x))
    np.testing.assert_array_equal(found.integers(q.quantise_input(x)), q.integers(q.quantise_input(x)))
    np.testing.assert_array_equal(found.logits(x), q.logits(x))
    assert (found.class_names, found.calibration, found.divergence) == (q.class_names, q.calibration, q.divergence)
    for ours, theirs in zip(found.layers, q.layers, strict=True):
        assert (ours.input, ours.product, ours.output) == (theirs.input, theirs.product, theirs.output)


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        save_int8(tmp_path / name, network())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


Edit = Callable[[dict[str, np.ndarray], dict[str, str]], Any]


def layer(number: int, **values: Any) -> Edit:
    """Put these values into the metadata of a layer."""

    def edit(tensors: dict[str, np.ndarray], about: dict[str, str]) -> None:
        layers = json.loads(about["layers"])
        layers[number].update(values)
        about["layers"] = json.dumps(layers)

    return edit


EDITS: dict[str, tuple[Edit, str]] = {
    "another format": (lambda t, a: a.update(format="minikd"), "format must be a network of minikd in int8"),
    "another version": (lambda t, a: a.update(format_version="2"), "version 1, got 'minikd int8' version '2'"),
    "no layers": (lambda t, a: a.update(layers="[]"), "layers must be a list of layers"),
    "layers that are no JSON": (lambda t, a: a.update(layers="[{"), "the metadata must be a table with layers"),
    "no names": (lambda t, a: a.pop("class_names"), "the metadata must be a table with layers, class_names"),
    "too few names": (lambda t, a: a.update(class_names='["a"]'), "class_names must be 3 names"),
    "names that are numbers": (lambda t, a: a.update(class_names="[1, 2, 3]"), "class_names must be a list of texts"),
    "an unknown activation": (layer(0, activation="swish"), r"layers\[0\]: activation must be one of relu"),
    "an activation that is a list": (layer(0, activation=["tanh"]), r"layers\[0\]: activation must be one of"),
    "an activation at the end": (layer(2, activation="relu"), r"layers\[2\]: activation must be empty in the last"),
    "more about a layer": (layer(0, more=1), r"layers\[0\] must be a table of activation"),
    "a scale of 0": (layer(1, product=[0.0, 3]), r"layers\[1\]: product must be \[a float32 number above 0"),
    "a scale beyond float32": (layer(1, product=[0.1, 3]), r"layers\[1\]: product must be \[a float32 number"),
    "a zero point beyond int8": (layer(1, product=[0.5, 128]), r"layers\[1\]: product must be .* from -128 to 127"),
    "a zero point with a comma": (layer(1, product=[0.5, 1.0]), r"layers\[1\]: product must be"),
    "inputs that are no outputs": (layer(1, input=[0.5, 1]), r"layers\[1\]: input must be .*, the output before it"),
    "a product beside a table": (layer(2, output=[0.5, 1]), r"layers\[2\]: output must be the product"),
    "a tensor less": (lambda t, a: t.pop("1.bias"), r"1\.bias must be int32 with 1 axes .*, got nothing"),
    "a tensor more": (lambda t, a: t.update(more=np.zeros(1, np.int8)), "the tensors must be .* got also more"),
    "a table less": (lambda t, a: t.pop("0.table"), r"0\.table must be int8"),
    "a short table": (lambda t, a: t.update({"0.table": np.zeros(255, np.int8)}), r"0\.table must be 256 numbers"),
    "another dtype": (lambda t, a: t.update({"0.bias": np.zeros(6, np.float32)}), r"0\.bias must be int32"),
    "another shape": (lambda t, a: t.update({"0.bias": np.zeros(5, np.int32)}), r"0\.bias must be 6 numbers"),
    "an empty weight": (lambda t, a: t.update({"0.weight": np.zeros((0, 4), np.int8)}), r"0\.weight must be int8"),
    "a weight of -128": (lambda t, a: t["0.weight"].__setitem__((0, 0), -128), r"0\.weight must be from -127 to 127"),
    "a shift of 0": (lambda t, a: t["1.shift"].__setitem__(0, 0), r"1\.shift must be from 1 to 62"),
    "a negative multiplier": (lambda t, a: t["1.multiplier"].__setitem__(0, -1), r"1\.multiplier must be from 0"),
    "a scale that is NaN": (lambda t, a: t["0.weight_scale"].__setitem__(0, np.nan), r"0\.weight_scale must be finite"),
    "a negative scale": (lambda t, a: t["0.weight_scale"].__setitem__(0, -1), r"0\.weight_scale must be from"),
    "a deviation of 0": (lambda t, a: t["normalisation.deviation"].__setitem__(0, 0), "deviation must be 4 numbers"),
    "layers that do not chain": (
        lambda t, a: t.update({"1.weight": np.zeros((5, 7), np.int8)}),
        "layer 1 must be one that takes 6 numbers, got one that takes 7",
    ),
    "sums that overflow": (
        lambda t, a: t["2.bias"].__setitem__(0, 2**31 - 1),
        r"layer 2 must be one whose sums stay below 2\^31",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_file_that_does_not_fit_is_refused_with_the_place(name: str, tmp_path: Path) -> None:
    path, (edit, words) = tmp_path / "q", EDITS[name]
    save_int8(path, network())
    tensors, about = read_tensors(path)
    edit(tensors, about)
    write_tensors(path, tensors, about)
    with pytest.raises(ModelFormatError, match=words):
        load_int8(path)
