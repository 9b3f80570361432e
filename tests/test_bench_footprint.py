"""What a program costs that predicts: a run leaves a table behind, and whoever predicts something else is refused."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc, where Linux tells memory")


@pytest.fixture
def footprint(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("footprint")


def options(footprint: Any, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    footprint.add_arguments(parser)
    return parser.parse_args(arguments)


def test_a_run_writes_its_figures_and_a_readme_takes_them_in(
    footprint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "footprint.json", tmp_path / "README.md"
    asked = ["--only", "numpy", "runtime", "--rounds", "1", "--out", str(out)]
    assert footprint.run(options(footprint, *asked)) == 0
    assert "minikd.runtime" in capsys.readouterr().out
    (found,) = json.loads(out.read_text())["runs"]["runtime"]
    assert 0 < found["import_seconds"] < 60
    assert found["peak_bytes"] > 5e6
    assert 0 <= found["error"] < 1e-6
    page.write_text("<!-- footprint -->\nold\n<!-- end footprint -->\n")
    assert footprint.run(options(footprint, "--out", str(out), "--update-readme", str(page))) == 0
    assert "old" not in page.read_text()
    assert "| minikd.runtime |" in page.read_text()


def test_a_program_that_predicts_something_else_is_refused(footprint: Any, tmp_path: Path) -> None:
    expected = footprint.write_network(tmp_path, onnx=False, torch=False)
    wrong = footprint.PROGRAMS["runtime"]._replace(predict="probabilities = row[:, :10]")
    with pytest.raises(AssertionError, match=r"minikd\.runtime predicts"):
        footprint.measure(wrong, str(tmp_path), expected)
