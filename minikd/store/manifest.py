"""What a store says of itself: manifest.json, the shards that it is made of, and the footer of each.

A shard is a file of records (see `Encoding`), row after row, and a footer of FOOTER bytes: one line of JSON, filled up
with spaces. Row i of the data is record i % rows_per_shard of shard i // rows_per_shard.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import minikd
from minikd.errors import DataError
from minikd.safetensors import write_whole
from minikd.store.encoding import MOST_CLASSES, REALS, TEMPERATURES, Encoding

NAME, FORMAT, VERSION = "manifest.json", "minikd store", 1
FOOTER = 512
_MOST_KL = 1e300  # a sum of these over all shards is finite, too
AGAIN = "Label again with overwrite=True (--overwrite), or into another folder."


@dataclass(frozen=True)
class Spec:
    """What a store is of, and how it is cut: all that must agree before shards may stand side by side."""

    data_sha256: str
    rows: int
    row_order: str
    features: str
    preprocessing: str
    teacher: str
    classes: int
    class_names: tuple[str, ...] | None
    dtype: str
    top_k: int
    rows_per_shard: int

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.classes, self.dtype, self.top_k)

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def samples(self, number: int) -> range:
        """The sample numbers in a shard."""
        start = number * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    @cached_property
    def digest(self) -> str:
        """Which spec a shard belongs to, in its footer."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def differences(self, other: Spec) -> list[tuple[str, str, str]]:
        """Where another differs: what it is, here and there."""
        names = [field.name for field in dataclasses.fields(self)]
        both = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [(WORDS[name], in_words(a), in_words(b)) for name, a, b in both if a != b]


# How errors call the parts of a spec.
WORDS = {
    "data_sha256": "the data (sha256)",
    "rows": "the number of rows",
    "row_order": "the order of the rows",
    "features": "the features",
    "preprocessing": "the preprocessing",
    "teacher": "the teacher",
    "classes": "the number of classes",
    "class_names": "the classes and their order",
    "dtype": "dtype",
    "top_k": "top_k",
    "rows_per_shard": "rows_per_shard",
}


def in_words(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


class Shard(NamedTuple):
    """What is known of a finished shard: a digest of its records, and (Σ KL, largest KL) at each of TEMPERATURES."""

    sha256: str
    error: tuple[tuple[float, float], ...]


SHARDS = "shard-*.logits"  # what all names of shards look like


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.logits"


def shard_path(folder: Path, number: int) -> Path:
    return folder / shard_name(number)


def write_shard(folder: Path, spec: Spec, number: int, records: np.ndarray, errors: np.ndarray) -> Shard:
    """Write a shard, whole or not at all.

    records : (n,), C-contiguous.  errors : (2, m), see `Encoding.error`; m is 0 where nothing is lost.
    """
    sums = tuple((float(e.sum()), float(e.max(initial=0))) for e in errors)
    shard = Shard(_sha256(records), sums)
    footer = json.dumps({"spec": spec.digest, "shard": number, **shard._asdict()}).encode()
    write_whole(shard_path(folder, number), _bytes(records), footer.ljust(FOOTER - 1), b"\n")
    return shard


def finished_shard(folder: Path, spec: Spec, number: int) -> Shard | None:
    """What the shard says of itself, if it is there, belongs to this spec and its bytes are what its digest says."""
    try:
        data = shard_path(folder, number).read_bytes()
        footer = json.loads(data[-FOOTER:])
        shard = _shard(footer)
    except (OSError, ValueError, RecursionError):
        return None
    size = len(spec.samples(number)) * spec.encoding.record.itemsize
    whole = len(data) == size + FOOTER and hashlib.sha256(data[:size]).hexdigest() == shard.sha256
    return shard if whole and (footer.get("spec"), footer.get("shard")) == (spec.digest, number) else None


def _sha256(records: np.ndarray) -> str:
    return hashlib.sha256(_bytes(records)).hexdigest()


def _bytes(records: np.ndarray) -> memoryview:
    return records.view(np.uint8).data


def _shard(entry: Any) -> Shard:
    """A shard's entry in a footer or a manifest; ValueError where it is none."""
    if not isinstance(entry, dict) or not _is_sha256(entry.get("sha256")):
        raise ValueError("no sha256")
    error = entry.get("error")
    if not isinstance(error, list) or len(error) != len(TEMPERATURES) or not all(_is_pair(pair) for pair in error):
        raise ValueError("no error")
    return Shard(entry["sha256"], tuple((float(total), float(most)) for total, most in error))


# --- the manifest ---


class Manifest(NamedTuple):
    """A spec and, once labelling is finished, its shards; None before."""

    spec: Spec
    shards: tuple[Shard, ...] | None


def write_manifest(folder: Path, spec: Spec, shards: Sequence[Shard] | None = None) -> None:
    """Write manifest.json; the same store has the same bytes, however it came about."""
    record = spec.encoding.record
    fields = [(name, *_field(record, name)) for name in record.names or ()]
    content = {
        "format": FORMAT,
        "format_version": VERSION,
        "minikd_version": minikd.__version__,
        "complete": shards is not None,
        **dataclasses.asdict(spec),
        "record": [{"name": name, "dtype": dtype, "shape": shape} for name, dtype, shape in fields],
        "footer_bytes": FOOTER,
        "kl_error": None if shards is None else kl_error(spec, shards),
        "shards": [{"file": shard_name(k), **s._asdict()} for k, s in enumerate(shards or ())],
    }
    write_whole(folder / NAME, json.dumps(content, indent=1).encode() + b"\n")


def _field(record: np.dtype[Any], name: str) -> tuple[str, list[int]]:
    dtype: np.dtype[Any] = record[name]
    return dtype.base.str, list(dtype.shape)


def kl_error(spec: Spec, shards: Sequence[Shard]) -> list[dict[str, float]]:
    """Mean and largest KL(teacher ‖ stored) over all rows, at each of TEMPERATURES."""
    columns = [[shard.error[k] for shard in shards] for k in range(len(TEMPERATURES))]
    return [
        {"temperature": t, "mean": math.fsum(s for s, _ in column) / spec.rows, "max": max(m for _, m in column)}
        for t, column in zip(TEMPERATURES, columns, strict=True)
    ]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_pair(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) for v in value)
    return numbers and all(0 <= v < _MOST_KL for v in value)


def _whole(least: int, most: int = 1 << 62) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data_sha256": (_is_sha256, "64 hexadecimal digits"),
    "rows": (_whole(1), "a whole number from 1"),
    "row_order": (_is_text, "a text"),
    "features": (_is_text, "a text"),
    "preprocessing": (_is_text, "a text"),
    "teacher": (_is_text, "a text"),
    "classes": (_whole(2, MOST_CLASSES), f"a whole number from 2 to {MOST_CLASSES}"),
    "class_names": (_is_names, "a list of texts, or null"),
    "dtype": (lambda v: isinstance(v, str) and v in REALS, "one of " + ", ".join(REALS)),
    "top_k": (_whole(0, MOST_CLASSES), "a whole number from 0"),
    "rows_per_shard": (_whole(1), "a whole number from 1"),
}


def damaged(path: Path, part: str, expected: str, got: Any, fix: str = "") -> DataError:
    """The error for a file of a store that is not as it was written."""
    words = fix or "The store is damaged: copy it again, or write it again, which labels the damaged shards alone."
    return DataError("store.open", f"{path}{part and f': {part}'}", expected=expected, got=str(got)[:200], fix=words)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store; DataError says what is wrong with it."""
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        fix = "minikd label DATA --teacher T --out STORE, or kd.store.write, makes one."
        got = "no such file" if folder.is_dir() else "no such folder"
        raise damaged(path, "", "a store's manifest", got, fix) from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, "", "readable JSON", error, AGAIN) from error
    if not isinstance(content, dict):
        raise damaged(path, "", "a JSON object", type(content).__name__, AGAIN)
    if (content.get("format"), content.get("format_version")) != (FORMAT, VERSION):
        got = f"{content.get('format')!r} version {content.get('format_version')!r}"
        raise damaged(path, "format", f"{FORMAT!r} version {VERSION}", got, "Read it with the minikd that wrote it.")
    for name, (fits, expected) in CHECKS.items():
        if name not in content or not fits(content[name]):
            got = repr(content[name]) if name in content else "nothing"
            raise damaged(path, name, expected, got, AGAIN)
    names = content["class_names"]
    values = {name: content[name] for name in CHECKS}
    spec = Spec(**{**values, "class_names": None if names is None else tuple(names)})
    if spec.top_k >= spec.classes or (names is not None and len(names) != spec.classes):
        got = f"top_k {spec.top_k}, {'no' if names is None else len(names)} class names"
        raise damaged(path, "classes", "more than top_k, and as many as there are names", got, AGAIN)
    return Manifest(spec, _shards(path, spec, content))


def _shards(path: Path, spec: Spec, content: dict[str, Any]) -> tuple[Shard, ...] | None:
    entries, complete = content.get("shards"), content.get("complete")
    if complete is False:
        return None
    if complete is not True or not isinstance(entries, list) or len(entries) != spec.shards:
        got = f"{len(entries)}" if isinstance(entries, list) else repr(entries)
        raise damaged(path, "shards", f"{spec.shards} entries", got, AGAIN)
    try:
        return tuple(_shard(entry) for entry in entries)
    except ValueError as error:
        raise damaged(path, "shards", "a list with the sha256 and the error of each shard", error, AGAIN) from error
