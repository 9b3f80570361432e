"""Models in safetensors files: exact round trips, the same bytes each time, and refusals that say where."""

import contextlib
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minikd as kd
from minikd.data import Normalisation
from minikd.errors import ArgumentError, ModelFormatError, OutputError
from minikd.export import read_tensors, write_tensors


@pytest.fixture
def model() -> kd.nn.MLP:
    model = kd.nn.MLP([4, 6, 3], activation="tanh", dropout=0.25, seed=3)
    model.normalisation = Normalisation(np.arange(4, dtype=np.float32), np.full(4, 2, np.float32))
    model.class_names = ("cat", 'do"g', "naïve ✓")
    return model


def test_a_loaded_model_predicts_the_same_bits_from_raw_features(model: kd.nn.MLP, tmp_path: Path) -> None:
    kd.save(tmp_path / "m.safetensors", model)
    loaded = kd.load(tmp_path / "m.safetensors")
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    assert np.array_equal(loaded.logits(x), model.logits(x))
    assert (loaded.sizes, loaded.activation, loaded.class_names) == (model.sizes, "tanh", model.class_names)
    assert (loaded.dropout, loaded.training) == (0.25, False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_both_dtypes_survive(dtype, tmp_path: Path) -> None:
    model = kd.nn.MLP([3, 5, 2], dtype=dtype, seed=1)
    kd.save(tmp_path / "m", model)
    for name, value in kd.load(tmp_path / "m").state_dict().items():
        assert value.dtype == dtype
        assert np.array_equal(value, model.state_dict()[name])


def test_the_same_model_gives_the_same_bytes_and_no_temporary_file_stays(model: kd.nn.MLP, tmp_path: Path) -> None:
    kd.save(tmp_path / "a", model)
    kd.save(tmp_path / "b", model)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_saving_below_a_file_is_refused_in_words(model: kd.nn.MLP, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file that can be written"):
        kd.save(tmp_path / "file" / "m", model)


def test_only_an_mlp_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="an MLP"):
        kd.save(tmp_path / "m", kd.nn.Linear(2, 2))


def header_of(path: Path) -> dict:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def rewrite(path: Path, header: dict, body: bytes | None = None) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + (data[8 + length :] if body is None else body))


def set_metadata(name: str, value: str):
    def change(header: dict) -> None:
        header["__metadata__"][name] = value

    return change


def drop_metadata(name: str):
    return lambda header: header["__metadata__"].pop(name)


def set_layer(number: int, field: str, value: object):
    def change(header: dict) -> None:
        layers = json.loads(header["__metadata__"]["layers"])
        layers[number][field] = value
        header["__metadata__"]["layers"] = json.dumps(layers)

    return change


def set_entry(name: str, field: str, value: object):
    def change(header: dict) -> None:
        header[name][field] = value

    return change


def rename(name: str, other: str):
    """The same tensors in the same order, one of them under another name."""

    def change(header: dict) -> None:
        entries = [(other if n == name else n, entry) for n, entry in header.items()]
        header.clear()
        header.update(entries)

    return change


def turn_round(header: dict) -> None:
    entries = list(header.items())
    header.clear()
    header.update(entries[::-1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_metadata("format_version", "99"), "version '99'"),
        (drop_metadata("format_version"), "version 'none'"),
        (set_metadata("format", "other"), "a model of minikd"),
        (set_metadata("layers", "[["), "the metadata's layers"),
        (set_metadata("layers", "[" * 100_000), "the metadata's layers"),
        (set_metadata("layers", "[]"), "a list of layers"),
        (set_metadata("layers", "[1]"), r"layers\[0\]"),
        (drop_metadata("layers"), "a table with layers"),
        (set_layer(0, "activation", "swish"), r"layers\[0\]: activation must be one of .*'swish'"),
        (set_layer(0, "activation", []), r"layers\[0\] must be with texts"),
        (set_layer(1, "activation", "tanh"), "the last layer's activation must be empty"),
        (set_layer(0, "outputs", 7), r"layers\[1\]: inputs must be 7"),
        (set_layer(1, "outputs", 600_000_000_000), r"3\.weight must be"),
        (set_layer(1, "outputs", 0), "whole numbers from 1"),
        (set_layer(1, "outputs", True), "whole numbers from 1"),
        (set_layer(1, "name", "0"), "of different names"),
        (set_layer(1, "rate", 1), "a table of name, inputs, outputs, activation"),
        (set_metadata("class_names", '["a"]'), "3 names"),
        (set_metadata("class_names", '["a", "b", "\\ud800"]'), "class_names"),
        (set_metadata("dropout", "2.0"), "metadata"),
        (set_metadata("dropout", "much"), "dropout must be a number"),
        (set_metadata("seed", "-1"), "metadata"),
        (set_metadata("kept", "changed"), "the file was changed after it had been written"),
        (drop_metadata("sha256"), "the file was changed"),
        (set_entry("0.bias", "dtype", "F8"), "dtype"),
        (set_entry("0.bias", "dtype", ">F4"), "dtype"),
        (set_entry("0.bias", "dtype", "I32"), "0.bias must be float32.*got int32|float32 or float64"),
        (set_entry("0.weight", "dtype", "I32"), "0.weight must be float32.*got int32|float32 or float64"),
        (set_entry("0.weight", "shape", [4, 6]), "0.weight must be float32 of shape"),
        (set_entry("0.bias", "shape", [7]), "0.bias"),
        (set_entry("0.bias", "shape", [-6]), "whole numbers"),
        (set_entry("0.bias", "shape", [2**61, 2**61, 0]), "fewer than"),
        (set_entry("0.bias", "shape", [1] * 99), "0.bias"),
        (set_entry("0.bias", "data_offsets", [0, 23]), "0.bias"),
        (set_entry("0.bias", "data_offsets", [24, 0]), "0.bias"),
        (set_entry("0.bias", "data_offsets", [4, 28]), "0.bias"),
        (set_entry("0.weight", "data_offsets", [20, 116]), "0.weight"),
        (set_entry("0.weight", "data_offsets", [24, 2**61]), "0.weight"),
        (lambda h: h.pop("0.bias"), "begins at byte 0"),
        (lambda h: h.pop("normalisation.mean"), "the data must be"),
        (lambda h: h.update({"more": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), r"unknown \['more'\]"),
        (rename("normalisation.mean", "normalisation.median"), "missing .*mean.*unknown .*median"),
        (turn_round, "in the order of the data"),
    ],
)
def test_a_header_that_lies_is_refused(change, words: str, model: kd.nn.MLP, tmp_path: Path) -> None:
    path = tmp_path / "m"
    kd.save(path, model, kept="as it is")
    header = header_of(path)
    change(header)
    rewrite(path, header)
    with pytest.raises(ModelFormatError, match=words):
        kd.load(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a":1,"a":1}', "a name comes twice"),
        (b'{"a":NaN}', "NaN is no number"),
        (b'{"a":-0}', "-0 is no whole number"),
        (b'{"__metadata__":{"a":"\\ud800"}}', "surrogates not allowed"),
        (b'{"__metadata__":{"a":"\xff"}}', "utf-8"),
        (b'{"__metadata__":{"a":1}}', "a table of texts"),
        (b' {"a":1}', "a JSON object"),
        (b"[]", "a JSON object"),
        (b'{"a":' * 100_000, "the header"),
        (b'{"a":' + b"9" * 5_000 + b"}", "the header"),
        (b"{}\0", "the header"),
    ],
)
def test_a_header_that_is_not_quite_json_is_refused(text: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ModelFormatError, match=words):
        read_tensors(tmp_path / "t")


def test_a_seal_covers_every_byte(model: kd.nn.MLP, tmp_path: Path) -> None:
    kd.save(tmp_path / "m", model)
    data = (tmp_path / "m").read_bytes()
    seal = header_of(tmp_path / "m")["__metadata__"]["sha256"].encode()
    assert hashlib.sha256(data.replace(seal, b"0" * 64)).hexdigest() == seal.decode()
    for place in range(0, len(data), 7):
        (tmp_path / f"{place}").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ModelFormatError):
            kd.load(tmp_path / f"{place}")


@pytest.mark.parametrize(("dropout", "input_dropout"), [(0.0, 0.0), (0.25, 0.0), (0.0, 0.1), (0.25, 0.1)])
def test_a_file_of_version_1_is_still_read(dropout: float, input_dropout: float, tmp_path: Path) -> None:
    model = kd.nn.MLP([4, 6, 5, 3], "gelu", dropout=dropout, input_dropout=input_dropout, seed=7)
    about = {
        "format": "minikd",
        "format_version": "1",
        "minikd_version": "0.1.0",
        "sizes": "[4, 6, 5, 3]",
        "activation": "gelu",
        "class_names": '["a", "b", "c"]',
        "dropout": repr(dropout),
        "input_dropout": repr(input_dropout),
        "seed": "7",
    }
    scale = {"normalisation.mean": np.arange(4, dtype=np.float32), "normalisation.deviation": np.full(4, 2, np.float32)}
    write_tensors(tmp_path / "m", model.state_dict() | scale, about)
    loaded = kd.load(tmp_path / "m")
    model.normalisation = Normalisation(*scale.values())
    x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    assert np.array_equal(loaded.logits(x), model.logits(x))
    assert (loaded.activation, loaded.class_names, loaded.seed) == ("gelu", ("a", "b", "c"), 7)
    for name, value in (("sizes", "[4, 6, 5]"), ("sizes", "[[4]]"), ("activation", "swish"), ("dropout", "x")):
        write_tensors(tmp_path / "m", model.state_dict() | scale, about | {name: value})
        with pytest.raises(ModelFormatError):
            kd.load(tmp_path / "m")


def test_what_the_format_cannot_hold_is_not_written(model: kd.nn.MLP, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="metadata epochs must be a text"):
        kd.save(tmp_path / "m", model, epochs=3)
    with pytest.raises(ModelFormatError, match="UTF-8"):
        write_tensors(tmp_path / "m", {"\ud800": np.zeros(2)}, {})
    with pytest.raises(ModelFormatError, match="something else"):
        write_tensors(tmp_path / "m", {"__metadata__": np.zeros(2)}, {})
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = kd.nn.MLP([2, 2])
    model.parameters()[0].array[0, 0] = np.nan
    kd.save(tmp_path / "m", model)
    with pytest.raises(ModelFormatError, match="finite"):
        kd.load(tmp_path / "m")


def test_a_missing_file_and_a_cut_one_are_refused(model: kd.nn.MLP, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="readable file"):
        kd.load(tmp_path / "nothing")
    kd.save(tmp_path / "m", model)
    whole = (tmp_path / "m").read_bytes()
    for length in [*range(64), *range(64, len(whole), 37), len(whole) - 1]:
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ModelFormatError):
            kd.load(tmp_path / "cut")
    (tmp_path / "long").write_bytes(whole + b"\0")
    with pytest.raises(ModelFormatError, match="as the header says"):
        kd.load(tmp_path / "long")


@given(st.data())
def test_a_damaged_file_loads_or_is_refused_but_nothing_else(tmp_path_factory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    kd.save(path, kd.nn.MLP([3, 4, 2], seed=0))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw))
    with contextlib.suppress(ModelFormatError):  # any other exception is a failure
        kd.load(path)


def test_tensors_of_every_kind_come_back_as_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = (np.float64, np.float32, np.float16, np.int64, np.int32, np.int8, np.uint8)
    tensors = {np.dtype(k).name: (100 * rng.random((2, 3))).astype(k) for k in kinds}
    tensors |= {"scalar": np.float32(3).reshape(()), "none": np.zeros((0, 4), np.float32)}
    write_tensors(tmp_path / "t", tensors, {"about": "all"})
    found, metadata = read_tensors(tmp_path / "t")
    assert metadata == {"about": "all"}
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert np.array_equal(found[name], value)


def test_a_dtype_without_a_name_in_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="complex"):
        write_tensors(tmp_path / "t", {"z": np.zeros(2, complex)}, {})
