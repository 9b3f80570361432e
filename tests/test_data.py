"""Data sets: every source gives the same kind of Dataset, splits never leak, and bad input is named exactly."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import hashlib
import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minikd.data import Dataset, Normalisation, batches, load, sha256_of, sources
from minikd.data.archive import mapped_npy
from minikd.data.batches import shuffled
from minikd.data.idx import FILES, read_idx
from minikd.data.splits import identical_rows, split
from minikd.errors import ArgumentError, DataError, DTypeError, MinikdError, ShapeError

quickly = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PARTS = ("train", "validation", "test")

# What must never change: other numbers here would mean other data, or other splits in earlier reports.
PIXELS_SHA = "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"
DIGITS_SHA = "74d952634280e5e9d5d3bac3c0e1f96b108dac75b2f5f591888e2ebb3316cbef"
FASHION_SHA = "8035d6b6ebfa3a85bd76bc2f83dc22ffdf47ef3dfd72c2198af2457c730a6a99"
FIRST_TEST_LABELS = [4, 5, 6, 4, 5, 0, 7, 3, 5, 2, 2, 0, 3, 6, 4, 0, 8, 1, 3, 8]
BATCH_ORDER = [9, 7, 2, 0, 4, 3, 5, 6, 1, 8]
SPLIT_ORDER = [5, 3, 2, 8, 7, 0, 1, 4, 9, 6]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def blobs(n: int = 120, m: int = 3, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are all different, with labels 0, 1, 2, 0, …"""
    return np.random.default_rng(seed).normal(size=(n, m)), np.arange(n) % classes


def pixels(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 5), dtype=np.uint8), (np.arange(n) % 3).astype(np.uint8)


def write_idx(path: Path, array: np.ndarray, code: int = 0x08) -> Path:
    content = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def idx_folder(folder: Path, ending: str = "", n: int = 60) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, names in enumerate(FILES.values()):
        for name, array in zip(names, pixels(n, seed), strict=True):
            write_idx(folder / (name + ending), array)
    return folder


def write_csv(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


def rows_of(data: Dataset) -> np.ndarray:
    """All rows as they were read, in a fixed order, for comparison with the source."""
    x = data.raw(np.concatenate([data.x_train, data.x_validation, data.x_test]))
    return x[np.lexsort(x.T)]


# ---------------------------------------------------------------------------------------------- the Dataset


def test_every_array_has_the_promised_dtype_layout_and_length(digits: Dataset) -> None:
    for part in PARTS:
        x, y = getattr(digits, f"x_{part}"), getattr(digits, f"y_{part}")
        assert x.dtype == np.float32
        assert x.flags.c_contiguous
        assert x.shape == (digits.sizes[part], digits.features)
        assert y.dtype == np.int64
        assert y.shape == (digits.sizes[part],)


def test_a_dataset_is_returned_as_it_is(digits: Dataset) -> None:
    assert load(digits) is digits


def test_raw_undoes_the_normalisation(digits: Dataset) -> None:
    raw = digits.raw(digits.x_test)
    assert raw.dtype == np.float32
    assert np.abs(raw - raw.round()).max() < 1e-5
    assert (raw.round().min(), raw.round().max()) == (0, 16)


def test_raw_refuses_rows_of_another_width(digits: Dataset) -> None:
    with pytest.raises(ShapeError, match=r"x must be shape \(n, 64\), got shape \(2, 63\)"):
        digits.raw(np.zeros((2, 63)))


# --- the numbers of the samples ---


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("form", ["x and y", "with a test part", "with all parts"])
def test_a_sample_number_is_the_place_in_the_source_whatever_the_split(form: str, seed: int, tmp_path: Path) -> None:
    x, y = blobs(90)
    source: object = (x, y)
    if form == "with a test part":
        source = (x[:60], y[:60], x[60:], y[60:])
    if form == "with all parts":
        source = tmp_path / "parts.npz"
        parts = {"train": slice(0, 50), "validation": slice(50, 60), "test": slice(60, 90)}
        np.savez(source, **{f"{a}_{name}": v[place] for name, place in parts.items() for a, v in (("x", x), ("y", y))})
    data = load(source, split_seed=seed, normalise="none")
    numbers = [getattr(data, f"rows_{part}") for part in data.sizes]
    assert [rows.dtype for rows in numbers] == [np.int64] * 3
    np.testing.assert_array_equal(np.sort(np.concatenate(numbers)), np.arange(90))
    for part, rows in zip(data.sizes, numbers, strict=True):
        np.testing.assert_array_equal(getattr(data, f"x_{part}"), x[rows].astype(np.float32))
        np.testing.assert_array_equal(getattr(data, f"y_{part}"), y[rows])


def test_rows_that_nobody_numbered_are_counted_through_and_numbers_must_fit(digits: Dataset) -> None:
    nobody = {f"rows_{part}": np.empty(0, np.int64) for part in digits.sizes}
    data = dataclasses.replace(digits, **nobody)
    assert [int(getattr(data, f"rows_{part}")[0]) for part in data.sizes] == [0, 1200, 1397]
    assert len(data.rows_test) == 400
    with pytest.raises(ShapeError, match=r"rows_test must be a number for each of 400 rows, got shape \(3,\)"):
        dataclasses.replace(digits, rows_test=np.arange(3))


def test_arrays_have_the_digest_of_the_data_set_that_they_make(tmp_path: Path) -> None:
    x, y = blobs(30)
    assert sha256_of(x, y) == load((x, y)).sha256
    large = np.arange(3_000_000, dtype=np.float64).reshape(-1, 2)  # more than is read at a time
    text = f"<f8 {large.shape}\n".encode()
    assert sha256_of(large) == sha256_of(large.astype(">f8")) == hashlib.sha256(text + large.tobytes()).hexdigest()
    assert sha256_of(large[:, ::-1]) == sha256_of(large[:, ::-1].copy())
    np.save(tmp_path / "large.npy", large)
    assert sha256_of(np.load(tmp_path / "large.npy", mmap_mode="r")) == sha256_of(large)
    assert sha256_of(np.array(3), np.empty((2, 0))) != sha256_of(np.array(3), np.empty((0, 2)))


@pytest.mark.parametrize("count", [0, 1, 9, 10, 57, 1193, 1200])
def test_few_labels_are_balanced_to_one(digits: Dataset, count: int) -> None:
    few = digits.few_labels(count, seed=3)
    kept = few >= 0
    assert kept.sum() == count
    assert np.array_equal(few[kept], digits.y_train[kept])
    have, had = np.bincount(few[kept], minlength=10), np.bincount(digits.y_train)
    for label in range(10):
        assert have[label] >= have.max() - 1 or have[label] == had[label]


def test_few_labels_of_a_smaller_count_are_among_those_of_a_larger_one(digits: Dataset) -> None:
    small, large = digits.few_labels(20, seed=1), digits.few_labels(50, seed=1)
    assert np.array_equal(small[small >= 0], large[small >= 0])
    assert not np.array_equal(small, digits.few_labels(20, seed=2))
    assert np.array_equal(small, digits.few_labels(20, seed=1))


def test_few_labels_leave_the_dataset_alone_and_skip_unlabelled_rows() -> None:
    x, y = blobs()
    y[:60] = -1
    data = load((x, y))
    before = data.y_train.copy()
    assert (data.few_labels(12, 0) >= 0).sum() == 12
    assert np.array_equal(data.y_train, before)


@pytest.mark.parametrize("count", [-1, 1201, 2.0, True])
def test_few_labels_refuse_an_impossible_count(digits: Dataset, count: int) -> None:
    with pytest.raises(ArgumentError, match="few_labels: count must be"):
        digits.few_labels(count, 0)


# ---------------------------------------------------------------------------------------------- normalisation


def test_columns_are_normalised_by_the_training_part_alone() -> None:
    x, y = blobs(200)
    data = load((x * [1, 10, 0.1] + [5, -3, 0], y))
    assert np.abs(data.x_train.mean(axis=0)).max() < 1e-6
    assert np.abs(data.x_train.std(axis=0) - 1).max() < 1e-5
    assert np.abs(data.x_test.mean(axis=0)).max() > 1e-4


def test_byte_images_share_one_mean_and_deviation() -> None:
    x, y = pixels(90)
    data = load((x, y))
    assert data.feature_shape == (4, 5)
    train = data.raw(data.x_train)
    assert np.allclose(data.normalisation.mean, train.mean(), rtol=1e-6)
    assert np.allclose(data.normalisation.deviation, train.std(), rtol=1e-6)
    assert np.unique(data.normalisation.mean).size == np.unique(data.normalisation.deviation).size == 1


def test_each_kind_of_normalisation_can_be_forced() -> None:
    x, y = pixels(90)
    assert np.unique(load((x, y), normalise="column").normalisation.mean).size == 20
    assert np.unique(load((x.astype(float), y), normalise="image").normalisation.mean).size == 1
    plain = load((x, y), normalise="none")
    assert np.array_equal(rows_of(plain), x.reshape(90, 20)[np.lexsort(x.reshape(90, 20).T)])
    with pytest.raises(ArgumentError, match="normalise must be auto, column, image, none, got 'no'"):
        load((x, y), normalise="no")


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3e5, 1e-40])
def test_a_constant_column_becomes_zero_with_deviation_one(value: float) -> None:
    x, y = blobs(90)
    x[:, 1] = value
    data = load((x, y))
    assert data.normalisation.deviation[1] == 1
    assert not data.x_train[:, 1].any()
    assert not data.x_test[:, 1].any()


@quickly
@given(
    offset=st.floats(-1e6, 1e6),
    spread=st.floats(1e-3, 1e3),
    outlier=st.sampled_from([0.0, 1e6]),
    n=st.integers(2, 9000),
)
def test_moments_agree_with_float64_numpy(offset: float, spread: float, outlier: float, n: int) -> None:
    x = (np.random.default_rng(n).normal(size=(n, 2)) * spread + offset).astype(np.float32)
    x[0, 0] += np.float32(outlier)
    fit, wide = Normalisation.fitted(x, "column"), x.astype(np.float64)
    expected = wide.std(axis=0)
    assert np.allclose(fit.mean, wide.mean(axis=0), rtol=1e-6, atol=1e-6 * spread)
    assert np.allclose(fit.deviation, np.where(expected == 0, 1, expected), rtol=1e-5)


def test_apply_flattens_images_and_leaves_its_input_alone(digits: Dataset) -> None:
    image = digits.raw(digits.x_test[:5]).round().reshape(5, 8, 8)
    before = image.copy()
    assert np.allclose(digits.normalisation.apply(image), digits.x_test[:5], atol=1e-6)
    assert np.array_equal(image, before)
    assert digits.normalisation.apply(np.zeros((0, 64))).shape == (0, 64)
    with pytest.raises(ShapeError, match=r"rows of 64 features, got shape \(5, 8\)"):
        digits.normalisation.apply(np.zeros((5, 8)))


# ---------------------------------------------------------------------------------------------- splits


@st.composite
def rows_with_repeats(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Few distinct rows, some of them with more than one label, a few unlabelled."""
    n = draw(st.integers(20, 120))
    kinds, classes = draw(st.integers(8, 60)), draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    kind = rng.integers(0, kinds, n)
    x = np.stack([kind % 7, kind // 7, -0.0 * kind], axis=1).astype(np.float32)
    y = np.where(rng.random(n) < 0.9, kind % classes, rng.integers(0, classes, n))
    return x, np.where(rng.random(n) < draw(st.sampled_from([0.0, 0.1])), -1, y)


@quickly
@given(rows_with_repeats(), st.integers(0, 5))
def test_identical_rows_never_sit_on_both_sides_of_a_split(data: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    x, y = data
    try:
        parts = split(x, y, {"test": 5, "validation": 5}, seed)
    except DataError:
        return  # too few distinct rows: said so, leaked nothing
    sides = {name: {tuple(row) for row in x[rows].tolist()} for name, rows in parts.items()}
    assert not sides["train"] & sides["test"]
    assert not sides["train"] & sides["validation"]
    assert not sides["test"] & sides["validation"]
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(y)))
    assert all((y[parts[name]] >= 0).all() and parts[name].size for name in ("test", "validation"))
    assert set(y[parts["train"]]) >= set(y[y >= 0])


@quickly
@given(n=st.integers(30, 300), classes=st.integers(2, 6), test=st.integers(1, 9), seed=st.integers(0, 99))
def test_splits_of_distinct_rows_are_exact_and_stratified(n: int, classes: int, test: int, seed: int) -> None:
    x, y = blobs(n, 2, classes)
    y = np.where(np.arange(n) % 3 == 0, 0, y)  # class 0 is larger
    parts = split(x.astype(np.float32), y, {"test": test, "validation": 7}, seed)
    assert [parts[name].size for name in ("test", "validation")] == [test, 7]
    share = np.bincount(y, minlength=classes) / n
    for name in ("test", "validation"):
        off = np.bincount(y[parts[name]], minlength=classes) - share * parts[name].size
        assert np.abs(off).max() <= 2
    assert np.all(np.diff(parts["train"]) > 0)


def test_a_split_is_a_function_of_its_seed() -> None:
    x, y = blobs()
    one, same, other = (load((x, y), split_seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(one.x_test, same.x_test)
    assert not np.array_equal(one.raw(one.x_test), other.raw(other.x_test))


def test_large_groups_of_identical_rows_still_split_as_near_as_they_can() -> None:
    corners = np.array([[0, 0], [1, 1], [0, 1], [1, 0]]).repeat(25, axis=0)
    data = load((corners, np.array([0, 0, 1, 1]).repeat(25)), test=20, validation=20)
    assert data.sizes == {"train": 50, "validation": 25, "test": 25}


def test_one_giant_group_does_not_crowd_out_the_single_rows() -> None:
    x, y = blobs(100, 2, 2)
    x[:60], y[:60] = 9.0, 0
    assert load((x, y), test=10, validation=10).sizes == {"train": 80, "validation": 10, "test": 10}


def test_zero_and_minus_zero_are_one_value() -> None:
    assert identical_rows(np.array([[0.0, 1], [-0.0, 1], [0, 2]], np.float32)).tolist() == [0, 0, 1]


def test_rows_that_differ_only_beyond_float32_are_one_row() -> None:
    x = np.random.default_rng(0).normal(size=(40, 1)).repeat(2, axis=0).astype(np.float32).astype(np.float64)
    x[1::2] += 1e-12
    data = load((x, np.arange(80) // 2 % 2), normalise="none")
    assert not set(data.x_train.ravel().tolist()) & set(data.x_test.ravel().tolist())


def test_unlabelled_rows_and_their_copies_go_to_train() -> None:
    x, y = blobs(90)
    x[:10], y[80:] = x[80:], -1
    data = load((x, y))
    assert (data.y_train == -1).sum() == 10
    assert not {tuple(r) for r in np.round(data.raw(data.x_test), 4)} & {tuple(r) for r in np.round(x[:10], 4)}


def test_a_class_of_one_row_stays_in_train() -> None:
    x, y = blobs(90)
    y[17] = 3
    assert load((x, y)).y_train.max() == 3


def test_default_sizes_are_a_fifth_each() -> None:
    assert load(blobs(100)).sizes == {"train": 60, "validation": 20, "test": 20}


def test_sizes_may_be_rows_or_fractions_of_the_labelled_rows() -> None:
    x, y = blobs(110)
    y[100:] = -1
    assert load((x, y), validation=7, test=0.5).sizes == {"train": 53, "validation": 7, "test": 50}
    assert load((x, y), validation=np.int64(7), test=np.float32(0.5)).sizes["test"] == 50


@pytest.mark.parametrize("size", [0, -3, 0.0, 1.0, 1.5, 120, float("nan"), True, "5"])
@pytest.mark.parametrize("part", ["validation", "test"])
def test_an_impossible_size_is_refused(part: str, size: object) -> None:
    with pytest.raises(ArgumentError, match=f"{part} must be a fraction between 0 and 1, or a number of rows from 1"):
        load(blobs(), **{part: size})


def test_too_few_rows_for_the_split_are_refused() -> None:
    x, y = blobs(90)
    with pytest.raises(DataError, match="rows for the validation part must be 50 or near it, got 37"):
        load((x, y), test=50, validation=50)
    with pytest.raises(DataError, match="rows for the test part"):
        load((x[:2], y[:2]), validation=1, test=1)


def test_the_test_part_does_not_depend_on_the_size_of_the_validation_part() -> None:
    small, large = load(blobs(), validation=1, normalise="none"), load(blobs(), validation=50, normalise="none")
    assert np.array_equal(small.x_test, large.x_test)


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_a_split_seed_must_be_a_whole_number(seed: object) -> None:
    with pytest.raises(ArgumentError, match="split_seed must be a whole number of at least 0"):
        load(blobs(), split_seed=seed)


# ---------------------------------------------------------------------------------------------- batches


@quickly
@given(n=st.integers(0, 300), size=st.integers(1, 70), seed=st.integers(0, 2**70), epoch=st.integers(0, 1000))
def test_batches_hold_every_row_once_and_depend_on_seed_and_epoch_alone(
    n: int, size: int, seed: int, epoch: int
) -> None:
    once = list(batches(n, size, seed=seed, epoch=epoch))
    again = list(batches(n, size, seed=seed, epoch=epoch))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert [len(rows) for rows in once] == [size] * (n // size) + [n % size] * (n % size > 0)
    assert all(rows.dtype == np.int64 for rows in once)
    assert sorted(int(row) for rows in once for row in rows) == list(range(n))


def test_other_epochs_and_seeds_give_other_orders() -> None:
    orders = {
        tuple(next(batches(50, 50, seed=seed, epoch=epoch))) for seed in (0, 1, 2**32, 2**32 + 1) for epoch in range(5)
    }
    assert len(orders) == 20


def test_without_shuffle_rows_come_in_order() -> None:
    parts = batches(7, 3, seed=0, epoch=4, shuffle=False)
    assert [rows.tolist() for rows in parts] == [[0, 1, 2], [3, 4, 5], [6]]


def test_the_order_is_the_same_in_every_version_of_numpy() -> None:
    assert next(batches(10, 10, seed=0, epoch=0)).tolist() == BATCH_ORDER
    assert shuffled(10, 1, 1).tolist() == SPLIT_ORDER


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"batch_size": 0}, "batch_size"), ({"n": -1}, "n"), ({"seed": -1}, "seed"), ({"epoch": 0.5}, "epoch")],
)
def test_batches_refuse_bad_arguments_at_the_call(changed: dict[str, object], name: str) -> None:
    with pytest.raises(ArgumentError, match=f"batches: {name} must be a whole number"):
        batches(**{"n": 5, "batch_size": 2, "seed": 0, "epoch": 0, **changed})


# ---------------------------------------------------------------------------------------------- built in and installed


def test_the_digits_are_those_of_the_uci_repository() -> None:
    with np.load(Path(sources.__file__).with_name("digits.npz"), allow_pickle=False) as archive:
        x, y = archive["x"], archive["y"]
    assert (x.shape, x.dtype, y.dtype, x.max(), int(x.sum())) == ((1797, 8, 8), np.uint8, np.uint8, 16, 561718)
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert hashlib.sha256(x.tobytes()).hexdigest() == PIXELS_SHA
    assert x[0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_the_digits_split_is_fixed(digits: Dataset) -> None:
    assert digits.sizes == {"train": 1200, "validation": 197, "test": 400}
    assert digits.sha256 == DIGITS_SHA
    assert (digits.name, digits.classes, digits.features, digits.feature_shape) == ("digits", 10, 64, (8, 8))
    assert digits.class_names == tuple("0123456789")
    assert np.bincount(digits.y_test).tolist() == [40, 40, 39, 41, 40, 41, 40, 40, 39, 40]
    assert digits.y_test[:20].tolist() == FIRST_TEST_LABELS


def test_fashion_mnist_is_read_from_debians_package() -> None:
    if not any(Path(prefix, "share/datasets/fashion-mnist").is_dir() for prefix in sources.PREFIXES):
        pytest.skip("needs the data set: apt install dataset-fashion-mnist")
    data = load("fashion-mnist")
    assert data.sizes == {"train": 55000, "validation": 5000, "test": 10000}
    assert data.class_names[0] == "T-shirt/top"
    assert data.class_names[9] == "Ankle boot"
    assert (data.features, data.feature_shape, data.classes) == (784, (28, 28), 10)
    assert np.bincount(data.y_validation).tolist() == [500] * 10
    assert np.bincount(data.y_test).tolist() == [1000] * 10
    assert data.y_test[:5].tolist() == [9, 2, 1, 1, 6]
    assert data.sha256 == FASHION_SHA


def test_a_missing_fashion_mnist_says_where_it_looked_and_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PREFIXES", (str(tmp_path / "usr"),))
    monkeypatch.setenv("MINIKD_DATA", str(tmp_path / "mine"))
    with pytest.raises(DataError) as error:
        load("fashion-mnist")
    for words in ("apt install dataset-fashion-mnist", "--data FOLDER", "IDX", "usr/share/datasets", "mine"):
        assert words in str(error.value)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_minikd_data_names_folders_that_are_searched_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    idx_folder(tmp_path / "second" / "mnist", ending)
    monkeypatch.setenv("MINIKD_DATA", f"{tmp_path / 'first'}{os.pathsep}{tmp_path / 'second'}")
    data = load("MNIST")
    assert data.sizes == {"train": 55, "validation": 5, "test": 60}
    assert (data.name, data.classes) == ("mnist", 10)


# ---------------------------------------------------------------------------------------------- round trips


def test_the_same_arrays_from_any_source_are_the_same_data(tmp_path: Path) -> None:
    (x, y), (x_test, y_test) = pixels(60, 0), pixels(60, 1)
    np.savez_compressed(tmp_path / "pair.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    idx_folder(tmp_path / "plain")
    idx_folder(tmp_path / "packed", ".gz")
    arrays = load((x, y, x_test, y_test), validation=5)
    for source in (tmp_path / "pair.npz", tmp_path / "plain", str(tmp_path / "packed"), [x, y, x_test, y_test]):
        data = load(source, validation=5)
        assert data.sha256 == arrays.sha256
        assert np.array_equal(data.x_train, arrays.x_train)
        assert np.array_equal(data.raw(data.x_test).round(), x_test.reshape(60, 20))
        assert data.feature_shape == (4, 5)
        assert data.class_names == ("0", "1", "2")


def test_the_sha256_sees_values_shapes_and_dtypes_but_not_byte_order() -> None:
    x, y = blobs()
    known = load((x, y)).sha256
    assert load((x.astype(">f8"), y.astype(">i8"))).sha256 == load((np.asfortranarray(x), y)).sha256 == known
    changed = x.copy()
    changed[3, 1] += 1
    for others in ((changed, y), (x.astype(np.float32), y), (x.reshape(120, 3, 1), y), (x, y.astype(np.int32))):
        assert load(others).sha256 != known
    expected = hashlib.sha256(b"<f8 (120, 3)\n" + x.tobytes() + b"<i8 (120,)\n" + y.astype("<i8").tobytes())
    assert load((x, y.astype(np.int64))).sha256 == expected.hexdigest()


@pytest.mark.parametrize(
    ("code", "dtype"), [(0x08, "u1"), (0x09, "i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")]
)
def test_every_idx_type_is_read(tmp_path: Path, code: int, dtype: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    found = read_idx(write_idx(tmp_path / "a", array, code))
    assert found.dtype == np.dtype(dtype)
    assert np.array_equal(found, array)


def test_an_npz_may_bring_its_own_parts_and_class_names(tmp_path: Path) -> None:
    (x, y), (other, labels) = blobs(60, classes=2), blobs(20, classes=2, seed=1)
    np.savez(
        tmp_path / "all.npz",
        x_train=np.asfortranarray(x),
        y_train=y,
        x_validation=other,
        y_validation=labels,
        x_test=other,
        y_test=labels,
        class_names=np.array(["cat", "dog", "owl"]),
    )
    data = load(tmp_path / "all.npz", normalise="none")
    assert np.array_equal(data.x_train, x.astype(np.float32))
    assert np.array_equal(data.x_test, other.astype(np.float32))
    assert data.sizes == {"train": 60, "validation": 20, "test": 20}
    assert data.class_names == ("cat", "dog", "owl")
    with pytest.raises(ArgumentError, match=r"test must be None, since all has a test part of its own, got 0.2"):
        load(tmp_path / "all.npz", test=0.2)


def test_a_given_test_part_is_left_as_given() -> None:
    x, y = blobs(60)
    data = load((x, y, x[:10], y[:10]), normalise="none")
    assert np.array_equal(data.x_test, x[:10].astype(np.float32))
    assert np.array_equal(data.y_test, y[:10])
    assert data.sizes == {"train": 48, "validation": 12, "test": 10}


def test_a_csv_comes_back_as_it_was_written(tmp_path: Path) -> None:
    x, y = blobs(60)
    with open(tmp_path / "table.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["a", "kind", "b", "c"])
        writer.writerows([p, f"class, {label}", q, r] for (p, q, r), label in zip(x.tolist(), y, strict=True))
    data = load(tmp_path / "table.csv", label_column="kind", normalise="none")
    assert np.array_equal(rows_of(data), x.astype(np.float32)[np.lexsort(x.T)])
    assert data.class_names == ("class, 0", "class, 1", "class, 2")
    assert data.name == "table"
    assert data.feature_shape == (3,)


def test_csv_labels_that_are_integers_are_sorted_by_value(tmp_path: Path) -> None:
    text = "x,label\n" + "".join(f"{i},{(10, 9, '007', -5)[i % 4]}\n" for i in range(40))
    data = load(write_csv(tmp_path / "a.csv", text))
    assert data.class_names == ("-5", "7", "9", "10")
    for x, label in zip(data.raw(data.x_test)[:, 0].round(), data.y_test, strict=True):
        assert label == (3, 2, 1, 0)[int(x) % 4]


def test_empty_and_minus_one_csv_labels_are_unlabelled_training_rows(tmp_path: Path) -> None:
    text = "x,label\n" + "".join(f"{i},{('a', 'b', '', -1, ' a ')[i % 5]}\n" for i in range(50))
    data = load(write_csv(tmp_path / "a.csv", text))
    assert data.class_names == ("a", "b")
    assert (data.y_train == -1).sum() == 20
    assert data.sizes == {"train": 38, "validation": 6, "test": 6}


@pytest.mark.parametrize(("encoding", "ending"), [("utf-8-sig", "\n"), ("utf-8", "\r\n")])
def test_byte_order_marks_quotes_and_blank_lines_do_no_harm(tmp_path: Path, encoding: str, ending: str) -> None:
    lines = ["", '"first, of two", second ,label', *(f'"{i}", {i / 8:e} ,{"ab"[i % 2]}ß' for i in range(30)), "", ",,"]
    data = load(write_csv(tmp_path / "a.csv", ending.join(lines), encoding), label_column="label")
    assert data.features == 2
    assert data.class_names == ("aß", "bß")


# ---------------------------------------------------------------------------------------------- arrays that are wrong


def pair(**changed: object) -> tuple[object, object]:
    x, y = blobs()
    return changed.get("x", x), changed.get("y", y)


def with_value(row: int, column: int, value: float) -> np.ndarray:
    x = blobs()[0]
    x[row, column] = value
    return x


def with_label(row: int, label: int) -> np.ndarray:
    y = blobs()[1]
    y[row] = label
    return y


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (pair(x=np.zeros(120)), ShapeError, r"x must be an array of shape \(rows, features\).*shape \(120,\).*reshape"),
        (pair(x=np.zeros((120, 0))), ShapeError, r"at least one row and feature, got shape \(120, 0\)"),
        (pair(x=np.zeros((0, 3))), ShapeError, r"got shape \(0, 3\)"),
        (pair(x=[[1, 2], [3]]), ShapeError, "x and y must be arrays"),
        (pair(x=np.zeros((120, 3), complex)), DTypeError, "real numbers.*got dtype complex128"),
        (pair(x=np.full((120, 3), None)), DTypeError, "got dtype object"),
        (pair(x=np.full((120, 3), "1")), DTypeError, "got dtype <U1"),
        (pair(x=with_value(7, 2, np.nan)), DataError, "x, row 7, column 2 must be a finite number.*got nan"),
        (pair(x=with_value(8, 0, -np.inf)), DataError, "x, row 8, column 0 must be .* got -inf"),
        (pair(x=with_value(9, 1, 1e300)), DataError, "x, row 9, column 1 must be .* within float32"),
        (
            pair(y=np.arange(119) % 3),
            ShapeError,
            r"y must be one label for each of the 120 rows of x, got shape \(119,",
        ),
        (pair(y=np.eye(120)), ShapeError, r"got shape \(120, 120\).*argmax"),
        (pair(y=(np.arange(120) % 3).astype(float)), ArgumentError, "integer class ids, got dtype float64"),
        (pair(y=["a", "b"] * 60), ArgumentError, "got dtype <U1.*np.unique"),
        (pair(y=with_label(4, -2)), ArgumentError, "y, row 4 must be a class id .*, or -1 .* got -2"),
        (pair(y=with_label(5, 120)), ArgumentError, "y, row 5 must be a class id from 0 to 119.* got 120"),
        (pair(y=with_label(5, 2**62)), ArgumentError, "y, row 5 must be"),
        (pair(y=np.full(120, 2**64 - 1, np.uint64)), ArgumentError, "y, row 0 must be .* got 18446744073709551615"),
        (pair(y=np.ones(120, int)), DataError, "labels of arrays must be of at least two classes, got only class 1"),
        (pair(y=np.full(120, -1)), DataError, "got no labelled row"),
        ((*pair(), blobs(9, 4)[0], blobs(9)[1]), ShapeError, r"x_test must be rows of shape \(3,\), as in x_train"),
        ((*pair(), blobs(9)[0], with_label(3, -1)[:9]), ArgumentError, "y_test, row 3 .* training part only"),
        ((*pair(), np.zeros((9, 3), np.uint8), blobs(9)[1]), DTypeError, "x_test must be on the same scale as x_train"),
        (pair()[:1], ArgumentError, r"source must be \(x, y\) or .*got 1 arrays"),
        ({"x": 1}, ArgumentError, "source must be a Dataset, a name or path, or a tuple.*got dict"),
    ],
)
def test_a_wrong_array_is_named_with_its_row_and_column(source: object, error: type[MinikdError], words: str) -> None:
    with pytest.raises(error, match=words):
        load(source)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64, bool, np.float16, np.float32])
def test_features_of_any_real_dtype_are_read(dtype: type) -> None:
    x = np.random.default_rng(0).integers(0, 2, (60, 12))
    assert load((x.astype(dtype), np.arange(60) % 2), test=1, validation=1).x_train.dtype == np.float32


def test_what_overflows_only_after_normalisation_is_refused() -> None:
    x, y = blobs(60)
    with pytest.raises(DataError, match="x_test as normalised, row 4, column 1 must be a finite number"):
        load((x * [1, 1e-37, 1], y, with_value(4, 1, 1e30), blobs()[1]))


# ---------------------------------------------------------------------------------------------- files that are wrong


def test_an_unknown_source_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one of digits, fashion-mnist, mnist, a folder .*'digitz', which does not ex"):
        load("digitz")
    with pytest.raises(DataError, match="which does not exist"):
        load(tmp_path / "no.csv")
    (tmp_path / "data.txt").write_text("1")
    with pytest.raises(DataError, match="which is none of these"):
        load(tmp_path / "data.txt")
    with pytest.raises(DataError, match="Of an IDX file, give the folder"):
        load(idx_folder(tmp_path) / "train-images-idx3-ubyte")
    with pytest.raises(DataError, match="which does not exist"):
        load(Path("digits"))


def test_a_folder_without_all_four_idx_files_names_the_missing_one(tmp_path: Path) -> None:
    (idx_folder(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"a folder with train-images-idx3-ubyte, .* got no t10k-labels-idx1-ubyte"):
        load(tmp_path)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-7], r"of 1216 bytes, as its header says \(shape \(60, 4, 5\)\), got 1209 bytes"),
        (lambda content: content + b"\0", "got 1217 bytes or more"),
        (lambda content: content[:3], "starts with two zero bytes"),
        (lambda content: content[:9], "and ends within the sizes"),
        (lambda content: b"\0\1" + content[2:], "starts with two zero bytes.*got a file that starts with"),
        (lambda content: b"\0\0\7" + content[3:], "starts with two zero bytes"),
        (lambda content: content[:4] + b"\xff" * 8 + content[12:], "of 92233720325[0-9]* bytes.*got 1216 bytes"),
        (lambda content: content[:3] + b"\xff" + content[4:], "data.load: .*train-images"),
        (lambda content: b"", "starts with two zero bytes"),
    ],
)
def test_a_damaged_idx_file_says_what_its_header_promises(
    tmp_path: Path, damage: object, words: str, ending: str
) -> None:
    path = idx_folder(tmp_path) / "train-images-idx3-ubyte"
    content = damage(path.read_bytes())
    path.unlink()
    (tmp_path / f"{path.name}{ending}").write_bytes(gzip.compress(content) if ending else content)
    with pytest.raises(DataError, match=words) as error:
        load(tmp_path)
    assert path.name in str(error.value)


@pytest.mark.parametrize(
    "damage", [lambda c: c[: len(c) // 2], lambda c: c[:40] + b"\xff" * 9 + c[49:], lambda c: b"x" + c]
)
def test_a_corrupt_gzip_is_a_data_error(tmp_path: Path, damage: object) -> None:
    path = idx_folder(tmp_path, ".gz") / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz must be a complete, readable IDX file"):
        load(tmp_path)


def test_images_and_labels_of_different_lengths_are_refused_by_file(tmp_path: Path) -> None:
    write_idx(idx_folder(tmp_path) / "t10k-labels-idx1-ubyte", pixels(59)[1])
    with pytest.raises(
        ShapeError, match=r"t10k-labels-idx1-ubyte must be one label for each of the 60 rows of .*t10k-im"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "error", "words"),
    [
        ({"x": pair()[0]}, DataError, "an archive of x, y, or of x_train.* got x"),
        ({"x": pair()[0], "y": pair()[1], "x_val": pair()[0]}, DataError, "got x, x_val, y"),
        ({"x": pair()[0], "y": np.array([{}] * 120)}, DataError, "a.npz: y must be .* got Python objects"),
        (
            {"x": pair()[0], "y": pair()[1], "class_names": np.array(["a"])},
            DataError,
            "class_names must be .* at least two",
        ),
        (
            {"x": pair()[0], "y": pair()[1], "class_names": np.array(["a", "b"])},
            ArgumentError,
            "a.npz: y, row 2 .* 0 to 1",
        ),
        ({"x": with_value(3, 1, np.nan), "y": pair()[1]}, DataError, "a.npz: x, row 3, column 1"),
    ],
)
def test_a_wrong_archive_is_named_with_its_array(
    tmp_path: Path, arrays: dict[str, np.ndarray], error: type[MinikdError], words: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(error, match=words):
        load(tmp_path / "a.npz")


def archive_of(header: bytes) -> bytes:
    """An npz whose x has this .npy header text and 8 bytes of values."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(8))
        archive.writestr("y.npy", b"")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a complete, readable npz file, got BadZipFile"),
        (b"PK\3\4 and no more", "BadZipFile"),
        (
            archive_of(b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000, 784)}\n"),
            "62720000000000 bytes",
        ),
        (archive_of(b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}\n"), "a.npz"),
        (archive_of(b"{'descr': '<f8', 'fortran_order': False}\n"), "readable npz file"),
        (archive_of(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n"), "Python objects"),
        (archive_of(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}\n"), "readable npz file"),  # y is empty
    ],
)
def test_a_damaged_archive_is_a_data_error(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=words):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1 must be a header row, got an empty file"),
        ("\n\n", "got an empty file"),
        ("x,label\n", "line 1 must be rows below the header, got none"),
        ("x,y\n1,a\n", "line 1 must be a header with the label column 'label' .* got the columns x, y"),
        ("label\n1\n", "at least one feature"),
        ("x,x,label\n1,2,a\n", "a header with each name once, got x repeated"),
        (",x,label\n1,2,a\n", "a header that names every column, got no name for column 1 of 3"),
        ("x,z,label\n1,2,a\n1,2\n", "line 3 must be a row of 3 cells, as in the header, got 2 cells"),
        ("x,z,label\n1,2,a\n\n1,2,3,b\n", "line 4 must be a row of 3 cells, as in the header, got 4 cells"),
        ("x,z,label\n1,2,a\n1,two,b\n", "line 3, column 'z' must be a finite number, got 'two'"),
        ("x,z,label\n1,,a\n1,2,b\n", "line 2, column 'z' must be a finite number, got ''"),
        ("x,z,label\n1,2,a\nnan,2,b\n", "line 3, column 'x' must be a finite number, got 'nan'"),
        ("x,z,label\n1,2,a\n1,-inf,b\n", "line 3, column 'z' must be a finite number, got '-inf'"),
        ("x,label\n1_000,a\n", "line 2, column 'x' must be a finite number, got '1_000'"),
        ('x,label\n1,a\n2,"b\n', "line 3 must be a row of comma-separated values, got unexpected end of data"),
        ("x,label\n" + "".join(f"{i},a\n" for i in range(9)), "the labels of a must be of at least two classes"),
        ("x,label\n" + "".join(f"{i},a{i}\n" for i in range(9)), "rows for the test part"),
    ],
)
def test_a_wrong_table_is_named_with_its_line_and_column(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load(write_csv(tmp_path / "a.csv", text))


def test_a_table_that_is_not_utf8_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a complete, readable CSV file, got UnicodeDecodeError"):
        load(write_csv(tmp_path / "a.csv", "x,label\n1,größe\n", "latin-1"))


def complaint(source: Path) -> str | None:
    """What minikd says against a source, None if it loads; any other exception fails the test."""
    try:
        load(source)
    except MinikdError as error:
        return str(error)
    return None


@pytest.mark.parametrize("form", ["idx", "idx.gz", "npz", "csv"])
@quickly
@given(st.data())
def test_random_damage_is_a_minikd_error_or_harmless(tmp_path: Path, form: str, data: st.DataObject) -> None:
    if form == "npz":
        path = source = tmp_path / "a.npz"
        np.savez_compressed(path, x=pixels(30)[0], y=pixels(30)[1])
    elif form == "csv":
        text = "x,z,label\n" + "".join(f"{i},{i}.5,{'abc'[i % 3]}\n" for i in range(30))
        path = source = write_csv(tmp_path / "a.csv", text)
    else:
        ending = form.removeprefix("idx")
        source = idx_folder(tmp_path / "folder", ending, 30)
        path = source / f"train-images-idx3-ubyte{ending}"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
    said = complaint(source)
    assert said is None or path.stem in said or "rows for the" in said


def test_an_archive_in_a_way_that_numpy_does_not_write_is_a_data_error(tmp_path: Path) -> None:
    x, y = (io.BytesIO() for _ in "xy")
    for stream, array in zip((x, y), pair(), strict=True):
        np.save(stream, array)
    later = b"\x93NUMPY\x09\0" + x.getvalue()[8:]  # a version of the format that there is not
    for how, content, words in (
        (zipfile.ZIP_DEFLATED, later, r"x is written in the .npy version \(9, 0\)"),
        (zipfile.ZIP_BZIP2, x.getvalue(), "x is packed in another way than np.savez and np.savez_compressed do"),
    ):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", how) as archive:
            archive.writestr("x.npy", content)
            archive.writestr("y.npy", y.getvalue())
        with pytest.raises(DataError, match=words):
            load(tmp_path / "a.npz")


def test_an_empty_array_is_read_without_being_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.empty((0, 4), np.float32))
    found = mapped_npy(tmp_path / "a.npy")
    assert (found.shape, found.dtype, type(found)) == ((0, 4), np.float32, np.ndarray)
