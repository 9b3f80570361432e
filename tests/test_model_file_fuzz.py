"""Files changed at random, by the thousand: each is read, or refused with a ModelFormatError, in little memory.

MINIKD_FUZZ=100000 sets how many; the run takes a fraction of a millisecond for each. MINIKD_FUZZ_SEED takes others.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.changes import IN_THE_HEADER, File, mutants
from fuzz.targets import SAFETENSORS, Slot, model_files, most_memory

import minikd as kd
from minikd import runtime
from minikd.errors import ModelFormatError
from minikd.export import read_tensors, write_tensors

COUNT = int(os.environ.get("MINIKD_FUZZ", "3000"))
SEED = int(os.environ.get("MINIKD_FUZZ_SEED", "0"))
MOST_MEMORY = 4 << 20  # bytes; the files have two thousand


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return model_files(tmp_path_factory.mktemp("whole"))


def changed(files: list[bytes], count: int, seed: int = SEED) -> Iterator[bytes]:
    return mutants(files, SAFETENSORS, count, seed)


def attempt(read: Callable[[Path], Any], path: Path, refusal: type[Exception]) -> Any:
    """What was read, or None where it was refused in the one way that is allowed."""
    try:
        return read(path)
    except refusal:
        return None


def test_changed_files_are_read_or_refused_in_words(files: list[bytes], tmp_path: Path) -> None:
    slot, x, loaded = Slot(tmp_path), np.ones((1, 4), np.float32), 0
    for raw in changed(files, COUNT):
        path = slot.holds(raw)
        tensors = attempt(read_tensors, path, ModelFormatError)
        model = attempt(kd.load, path, ModelFormatError)
        small = attempt(runtime.load, path, runtime.ModelFormatError)
        assert model is None or tensors is not None
        if model is not None:
            assert all(np.isfinite(p.array).all() for p in model.parameters())
            loaded += 1
        if small is not None and model is not None and model.sizes[0] == 4:
            with np.errstate(all="ignore"):
                np.testing.assert_allclose(small.logits(x), model.logits(x), rtol=1e-3, atol=1e-3)
    assert loaded > COUNT // 50  # some changes do no harm: so the others are not refused for one and the same reason


def test_changed_files_take_little_memory(files: list[bytes], tmp_path: Path) -> None:
    slot = Slot(tmp_path)

    def read(raw: bytes) -> None:
        attempt(kd.load, slot.holds(raw), ModelFormatError)
        attempt(runtime.load, slot.path, runtime.ModelFormatError)

    assert most_memory(read, changed(files, COUNT // 8, SEED + 2)) < MOST_MEMORY


def test_what_the_runtime_reads_minikd_reads_too(files: list[bytes], tmp_path: Path) -> None:
    rng, slot, read = random.Random(SEED + 1), Slot(tmp_path), 0
    for _ in range(COUNT // 3):
        path = slot.holds(rng.choice(IN_THE_HEADER)(files[0], rng))
        if attempt(runtime.load, path, runtime.ModelFormatError) is not None:
            error = why_not(path)
            assert error is None or any(name in error.argument for name in ("dropout", "seed"))
            read += 1
    assert read


def why_not(path: Path) -> ModelFormatError | None:
    """Why minikd refuses a file, if it does."""
    try:
        kd.load(path)
    except ModelFormatError as error:
        return error
    return None


def test_absurd_sizes_take_no_memory(files: list[bytes], tmp_path: Path) -> None:
    slot, whole, rng = Slot(tmp_path), File.of(files[0]), random.Random(0)
    header = json.loads(whole.text)
    cases = [struct.pack("<Q", size) + b"{}" for size in (2**32, 2**40, 2**63, 2**64 - 1)]
    for size in (2**32, 2**50, 2**61):
        for shape in ([size], [size, size, 0], [1, size]):
            entry = {"dtype": "F64", "shape": shape, "data_offsets": [0, 8 * size]}
            cases.append(whole.with_header({"t": entry}, rng).bytes)
        layers = [{"name": "0", "inputs": 4, "outputs": size, "activation": ""}]
        about = {**header["__metadata__"], "layers": json.dumps(layers)}
        cases.append(whole.with_header({**header, "__metadata__": about}, rng).sealed().bytes)

    def read(raw: bytes) -> None:
        assert attempt(kd.load, slot.holds(raw), ModelFormatError) is None
        assert attempt(runtime.load, slot.path, runtime.ModelFormatError) is None

    assert most_memory(read, cases) < MOST_MEMORY


# --- beside the format's own library ---


def library() -> Any:
    pytest.importorskip("safetensors", reason="needs safetensors: pip install 'minikd[test-teachers]'")
    return import_module("safetensors.numpy")


def test_what_is_accepted_the_safetensors_library_accepts_too(files: list[bytes], tmp_path: Path) -> None:
    numpy, slot, both = library(), Slot(tmp_path), 0
    for raw in changed(files, COUNT):
        ours = attempt(read_tensors, slot.holds(raw), ModelFormatError)
        if ours is not None:
            theirs = numpy.load(raw)  # raises if it refuses
            both += 1
            assert set(theirs) == set(ours[0])
            for name, value in theirs.items():
                assert value.dtype == ours[0][name].dtype
                assert value.tobytes() == ours[0][name].tobytes()
    assert both > COUNT // 20


def test_files_of_the_safetensors_library_are_read_and_ours_by_it(tmp_path: Path) -> None:
    numpy, path, rng = library(), tmp_path / "t", np.random.default_rng(0)
    kinds = (np.float64, np.float32, np.float16, np.int64, np.int32, np.int8, np.uint8)
    tensors = {np.dtype(k).name: (100 * rng.random((2, 3))).astype(k) for k in kinds}
    tensors |= {"scalar": np.array(3, np.float32), "none": np.zeros((0, 4), np.float32), "naïve ✓": np.ones(5)}
    for metadata in (None, {"about": "naïve ✓"}):
        numpy.save_file(tensors, path, metadata=metadata)
        found, about = read_tensors(path)
        assert about == (metadata or {})
        write_tensors(path, tensors, metadata or {})
        for other in (found, numpy.load_file(path)):
            assert set(other) == set(tensors)
            for name, value in tensors.items():
                assert other[name].dtype == value.dtype
                np.testing.assert_array_equal(other[name], value)


def test_a_saved_model_is_a_file_of_the_safetensors_library(tmp_path: Path) -> None:
    numpy, model = library(), kd.nn.MLP([4, 6, 3])
    kd.save(tmp_path / "m", model)
    for name, value in numpy.load_file(tmp_path / "m").items():
        np.testing.assert_array_equal(value, model.state_dict()[name])
    with import_module("safetensors").safe_open(tmp_path / "m", "np") as file:
        assert json.loads(file.metadata()["layers"])[0]["outputs"] == 6
