"""The history as TensorBoard events, one run for each training.

A file is a list of records (TFRecord): the length of the data, the data, and a masked CRC-32C of each. The data are
messages of protocol buffers, `Event` in TensorBoard's event.proto: a time, a step, and tags with their values.

Sources: "TFRecord and tf.train.Example", section "TFRecords format details", of the TensorFlow guide; "Encoding" of the
protocol buffers' documentation.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from minikd.errors import OutputError
from minikd.safetensors import write_whole

FIGURES = ("loss", "lr", "validation_accuracy", "validation_nll")
VERSION = b"brain.Event:2"
CASTAGNOLI = 0x82F63B78  # the polynomial of CRC-32C, its bits reversed
MASK = 0xA282EAD8  # added to a checksum, so that one of data that hold checksums is none of theirs


def write_events(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """Add the event files of these rows of a history to a folder, whole or not at all.

    Raises
    ------
    OutputError : a file cannot be written.
    """
    names = [", ".join(filter(None, (f"seed {r['seed']}", r["situation"], r["model"]))) for r in history]
    for name in dict.fromkeys(names):
        now = time.time()
        records = [_event(now, file_version=VERSION)]
        for row in (row for row, own in zip(history, names, strict=True) if own == name):
            records.append(_event(now, row["epoch"], _figures(row)))
        place = folder / re.sub(r"[^\w.]+", "-", name)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = "Choose a folder that you may write to."
            raise OutputError("save", str(place), expected="a folder", got=str(error), fix=fix) from error
        write_whole(place / f"events.out.tfevents.{time.time_ns()}.minikd", *map(_record, records), durable=False)


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    """What there is of one epoch, by tag."""
    figures = {figure: row[figure] for figure in FIGURES if row.get(figure) is not None}
    for term in row["terms"]:
        figures |= {f"{term['term']}/{figure}": term[figure] for figure in ("value", "gradient_share")}
    return figures


# --- messages ---


def _varint(value: int) -> bytes:
    """A whole number from 0, seven bits in each byte, the lowest first."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _field(number: int, data: bytes) -> bytes:
    """A field of text, or of another message."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _event(
    wall_time: float, step: int = 0, figures: Mapping[str, float] | None = None, file_version: bytes = b""
) -> bytes:
    message = struct.pack("<Bd", 1 << 3 | 1, wall_time) + _varint(2 << 3) + _varint(step)
    if file_version:
        return message + _field(3, file_version)
    values = (_field(1, tag.encode()) + struct.pack("<Bf", 2 << 3 | 5, value) for tag, value in (figures or {}).items())
    return message + _field(5, b"".join(_field(1, value) for value in values))


# --- records ---


@cache
def _table() -> tuple[int, ...]:
    """What each byte does to a CRC-32C."""
    found = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (CASTAGNOLI if value & 1 else 0)
        found.append(value)
    return tuple(found)


def masked_checksum(data: bytes) -> bytes:
    """The CRC-32C of these bytes, turned by 15 bits and moved by `MASK`."""
    crc, table = 0xFFFFFFFF, _table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF)


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked_checksum(length) + data + masked_checksum(data)
