"""`minikd export` and `minikd size`: what is written, what is proven of it, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minikd as kd
from minikd import cli
from minikd.errors import ArgumentError, BackendError
from minikd.export.network import Layer, Network
from minikd.export.verify import compiler, verify

NEEDS_COMPILER = pytest.mark.skipif(compiler() is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    quick = ["--teacher", "24", "--student", "8", "--teacher-epochs", "6", "--epochs", "8", "--labels", "0"]
    assert cli.main(["distill", "--quiet", *quick, "--seeds", "0", "--out", str(out)]) == 0
    return out


def command(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    status = cli.main([*arguments])
    said = capsys.readouterr()
    return status, " ".join(said.out.split()), said.err


@NEEDS_COMPILER
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_c_is_written_compiled_and_gives_the_bits_of_the_reference(
    quantize: str, run: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "device"
    status, said, _ = command(capsys, "export", str(run), "--to", "c", "--quantize", quantize, "--out", str(out))
    assert status == 0
    assert "197 rows give the same bits as the NumPy reference" in said
    names = ["CMakeLists.txt", "main.c", "student.c", "student.h", "student.ino"]
    assert sorted(path.name for path in out.iterdir()) == names
    if quantize == "int8":
        assert all(words in said for words in ("calibration", "zero point", "points lost"))


@NEEDS_COMPILER
def test_a_student_can_be_trained_on_for_int8_against_the_runs_teacher(run: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--to", "c", "--quantize", "int8", "--finetune", "--epochs", "2", "--out", str(tmp_path / "device")]
    status, said, err = command(capsys, "export", str(run), *arguments)
    assert status == 0
    assert "labels alone" not in err, "the teacher is in the run's folder"
    assert "same bits" in said


def test_onnx_is_checked_by_onnx_itself(run: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("onnx", reason="needs the extra minikd[onnx]")
    for quantize in ("none", "int8"):
        out = tmp_path / f"{quantize}.onnx"
        status, said, _ = command(capsys, "export", str(run), "--to", "onnx", "--quantize", quantize, "--out", str(out))
        assert status == 0
        assert "by onnx.reference logits at most" in said
        assert out.stat().st_size > 1000


def test_a_safetensors_file_is_read_again_and_holds_no_int8(run: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "a.safetensors"
    status, said, _ = command(capsys, "export", str(run), "--to", "safetensors", "--out", str(out))
    assert (status, "read again the same bits" in said) == (0, True)
    x = kd.data.load("digits").raw(kd.data.load("digits").x_test)
    assert np.array_equal(kd.load(out).logits(x), kd.load(run / "student.safetensors").logits(x))
    status, _, err = command(capsys, "export", str(run), "--to", "safetensors", "--quantize", "int8", "--out", str(out))
    assert status == 2
    assert "--quantize must be none for safetensors, got int8" in err


def test_a_models_file_is_exported_without_its_data_but_not_verified(run: Path, tmp_path: Path, capsys: Any) -> None:
    file, out = run / "student.safetensors", tmp_path / "b.safetensors"
    status, said, _ = command(capsys, "export", str(file), "--to", "safetensors", "--out", str(out))
    assert (status, "not verified there is no data: name it with --data" in said) == (0, True)
    status, said, _ = command(capsys, "export", str(file), "--to", "safetensors", "--data", "digits", "--out", str(out))
    assert (status, "read again the same bits" in said) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "c", "--finetune"], "--finetune must be used with int8"),
        (["--to", "c", "--quantize", "int8"], "--data must be there for the ranges of int8"),
        (["--to", "c", "--verify"], "--data must be there for verifying"),
        (["--to", "c", "--name", "9x"], "name must be"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_words(
    arguments: list[str], words: str, run: Path, tmp_path: Path, capsys: Any
) -> None:
    file = str(run / "student.safetensors")
    status, _, err = command(capsys, "export", file, *arguments, "--out", str(tmp_path / "out"))
    assert (status, words in err) == (2, True), err


def test_a_run_without_a_student_is_named(tmp_path: Path, capsys: Any) -> None:
    for name in (str(tmp_path), str(tmp_path / "none")):
        status, _, err = command(capsys, "export", name, "--to", "c")
        assert (status, "a run's folder with student.safetensors in it" in err) == (2, True)


def test_size_tells_flash_and_stack_of_both_forms(run: Path, capsys: Any) -> None:
    status, said, _ = command(capsys, "size", str(run))
    assert status == 0
    assert "64-8-10: 592 multiply-accumulates" in said
    assert "bytes float32 int8" in said
    assert "stack in a call, at most" in said


def test_where_the_teacher_is_gone_a_student_is_trained_on_for_int8_on_its_labels(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    (moved / "teacher.safetensors").unlink()
    arguments = ["--to", "c", "--quantize", "int8", "--finetune", "--epochs", "1", "--no-verify"]
    status, _, err = command(capsys, "export", str(moved), *arguments, "--out", str(tmp_path / "device"))
    assert status == 0, err
    assert "The run's teacher is not there: the student is trained on its labels alone." in err


def test_without_a_compiler_c_is_written_and_said_to_be_unchecked(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minikd.exporting.compiler", lambda: None)
    status, said, _ = command(capsys, "export", str(run), "--to", "c", "--out", str(tmp_path / "device"))
    assert (status, "not checked there is no C compiler here to build the files with" in said) == (0, True)
    monkeypatch.setattr("minikd.export.verify.compiler", lambda: None)
    model = kd.load(run / "student.safetensors")
    with pytest.raises(BackendError, match="a C compiler must be installed, got no cc, gcc or clang"):
        verify(tmp_path / "device", model, np.zeros((1, 64), np.float32))


@NEEDS_COMPILER
def test_what_was_proven_is_told_in_words(run: Path, tmp_path: Path, capsys: Any) -> None:
    command(capsys, "export", str(run), "--to", "c", "--out", str(tmp_path / "device"))
    model, data = kd.load(run / "student.safetensors"), kd.data.load("digits")
    said = str(verify(tmp_path / "device", model, data.raw(data.x_test), data.y_test))
    assert "rows through" in said
    assert "the same bits as the NumPy reference" in said
    assert "accuracy" in said
    assert "lost +0.00 points" in said


def test_a_network_of_several_activations_has_no_mlp() -> None:
    linear = [Layer(np.eye(3, dtype=np.float32), np.zeros(3, np.float32), kind) for kind in ("relu", "tanh", "")]
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    with pytest.raises(ArgumentError, match="all alike in the hidden layers, got relu, tanh"):
        Network(tuple(linear), zero, one, ("a", "b", "c")).model()


def test_the_size_of_what_cannot_be_quantised_is_told_in_float32_alone(
    run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise ArgumentError("quantise", "the network", expected="one with ranges", got="none")

    monkeypatch.setattr("minikd.exporting.quantise", refused)
    status, said, _ = command(capsys, "size", str(run))
    assert status == 0
    assert "Not in int8: quantise: the network must be one with ranges" in said
    assert "bytes float32 int8" not in said
