"""The experiments on soft labels: that a run leaves its tables behind, and what the pieces promise."""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A script of bench/ by its name, whose teachers are kept in a folder of the test."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return importlib.import_module


def run(script: Any, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    script.add_arguments(parser)
    return int(script.run(parser.parse_args(["--data", "digits", "--quick", *arguments])))


@pytest.mark.parametrize(
    ("name", "marker", "says"),
    [
        ("temperature", "temperature", ["| T | 8, all labels | 8, 100 labels |", "| alone |", "2 seeds"]),
        ("omitted_class", "omitted", ["| transfer set, T | before |", "| without 3, 4 |", "| only 7, 8, 4 |"]),
    ],
)
def test_a_run_writes_its_figures_and_a_readme_takes_them_in(
    experiment: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, marker: str, says: list[str]
) -> None:
    script, out, page = experiment(name), tmp_path / "figures.json", tmp_path / "README.md"
    assert run(script, "--out", str(out)) == 0
    assert "±" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert {r["seed"] for r in report["runs"]} == {0, 1}
    assert 0 < report["teacher_errors"] < report["data"]["test"]
    page.write_text(f"<!-- {marker} -->\nold\n<!-- end {marker} -->\n")
    assert run(script, "--out", str(out), "--update-readme", str(page)) == 0
    text = page.read_text()
    assert "old" not in text
    assert [words for words in says if words not in text] == []


def test_the_teacher_is_trained_once(experiment: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soft_labels, options = experiment("soft_labels"), argparse.Namespace(data="digits", quick=True)
    first, second = soft_labels.prepare(options), soft_labels.prepare(options)
    assert capsys.readouterr().err.count("Training the teacher") == 1
    assert len(list(tmp_path.glob("minikd-soft-labels-*.npz"))) == 1
    for part, scores in first.logits.items():
        assert np.array_equal(scores, second.logits[part])
        assert scores.shape == (len(getattr(first.data, f"x_{part}")), 10)


def test_a_shifted_image_is_the_image_beside_background(experiment: Any) -> None:
    soft_labels, rng = experiment("soft_labels"), np.random.default_rng(0)
    images = rng.uniform(1, 2, (200, 5, 4)).astype(np.float32)
    images[:, :, 0] = -3.0  # the smallest value is the background
    found = soft_labels.shifted(images.reshape(200, 20), (5, 4), 1, rng).reshape(200, 5, 4)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=-3.0)
    windows = [padded[:, d : d + 5, r : r + 4] for d in range(3) for r in range(3)]
    matches = np.array([(found == window).all(axis=(1, 2)) for window in windows])
    assert (matches.sum(axis=0) == 1).all()
    assert (matches.sum(axis=1) > 5).all(), "each of the nine shifts occurs"


def test_only_temperatures_that_are_not_clearly_worse_than_the_best_are_marked(experiment: Any) -> None:
    temperature = experiment("temperature")
    figures = {None: [10, 10], 1.0: [50, 52], 2.0: [20, 24], 4.0: [21, 23]}
    runs = [
        {"student": "8", "labels": 0, "temperature": t, "seed": seed, "errors": wrong}
        for t, both in figures.items()
        for seed, wrong in enumerate(both)
    ]
    settings = {"students": ["8"], "labels": [0], "temperatures": [1.0, 2.0, 4.0]}
    _, rows = temperature.errors_table({"settings": settings, "data": {"test": 1000}, "runs": runs})
    assert {row[0]: row[1].endswith("°") for row in rows} == {"alone": False, "1": False, "2": True, "4": True}


def test_a_smaller_transfer_set_is_passed_as_many_steps(experiment: Any) -> None:
    omitted_class = experiment("omitted_class")
    assert omitted_class.epochs(15, 1000, 1000) == 15
    assert omitted_class.epochs(15, 1000, 200) == 75


def test_the_few_classes_are_those_omitted_or_those_left(experiment: Any) -> None:
    omitted_class = experiment("omitted_class")
    assert omitted_class.fewer((3,), 10) == [3]
    assert omitted_class.fewer(omitted_class.OMITTED["only-7-8"], 10) == [7, 8]


def test_labels_choose_the_shift_that_leaves_the_fewest_errors(experiment: Any) -> None:
    omitted_class = experiment("omitted_class")
    y = np.arange(300) % 3
    scores = 4.0 * np.eye(3)[y] + np.random.default_rng(0).normal(0, 0.1, (300, 3)) - [0, 0, 6]
    added = omitted_class.chosen(scores, y, (2,))
    assert (added[:2] == 0).all()
    assert ((scores + added).argmax(axis=1) == y).all()
