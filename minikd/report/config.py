"""Settings as a TOML file: written with their help as comments, read with every key and type checked."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import minikd
from minikd.errors import ArgumentError, DataError
from minikd.settings import Settings


class Kind(NamedTuple):
    """How one type of setting stands in a TOML file: its name in messages, what is accepted, how it is written."""

    words: str
    accepts: Callable[[Any], bool]
    read: Callable[[Any], Any]
    write: Callable[[Any], str]


def _quoted(text: str) -> str:
    """A TOML basic string; whatever it may not hold as it is stands as its code."""
    codes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    unsafe = (c for c in text if (ord(c) < 32 or ord(c) == 127) and c not in codes)
    codes |= {c: f"\\u{ord(c):04x}" for c in unsafe}
    return '"' + "".join(codes.get(c, c) for c in text) + '"'


def _whole(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    """Whether a float can hold it, which no whole number of 400 digits is."""
    return isinstance(value, float) or (_whole(value) and abs(value) <= sys.float_info.max)


LAYERS = tuple[int, ...]
TEACHER = tuple[int, ...] | str
OUT = "out"  # the one key that is no setting: the folder for the results
KINDS: dict[Any, Kind] = {
    str: Kind("a text in quotes", lambda v: isinstance(v, str), str, _quoted),
    bool: Kind("true or false", lambda v: isinstance(v, bool), bool, lambda v: str(v).lower()),
    int: Kind("a whole number", _whole, int, str),
    float: Kind("a number", _number, float, lambda v: repr(float(v))),
    LAYERS: Kind(
        "a list of whole numbers, such as [256, 256]",
        lambda v: isinstance(v, list) and all(_whole(n) for n in v),
        tuple,
        lambda v: f"[{', '.join(str(n) for n in v)}]",
    ),
}
KINDS[TEACHER] = Kind(
    f"{KINDS[LAYERS].words}, or the name of a teacher in quotes",
    lambda v: isinstance(v, str) or KINDS[LAYERS].accepts(v),
    lambda v: v if isinstance(v, str) else tuple(v),
    lambda v: KINDS[str if isinstance(v, str) else LAYERS].write(v),
)


def setting_types() -> dict[str, Any]:
    """Each setting's type: one of KINDS."""
    hints = typing.get_type_hints(Settings)
    return {field.name: hints[field.name] for field in dataclasses.fields(Settings)}


def to_toml(settings: Settings) -> str:
    """The file that repeats a run: every setting, above it what it means.

    Raises
    ------
    ArgumentError : a text cannot be written in UTF-8, as TOML demands (a path whose name is not text).
    """
    kinds = setting_types()
    lines = [f"# Settings of a run of minikd {minikd.__version__}; to repeat it: minikd distill --config THIS_FILE"]
    for field in dataclasses.fields(Settings):
        value = KINDS[kinds[field.name]].write(getattr(settings, field.name))
        lines += ["", f"# {field.metadata['help']}", f"{field.name} = {value}"]
        if any("\ud800" <= character <= "\udfff" for character in value):
            expected = "text that UTF-8 can hold"
            raise ArgumentError("settings", field.name, expected=expected, got=ascii(value), fix="Rename the file.")
    return "\n".join(lines) + "\n"


def from_toml(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file, and `out`, by name; those that it leaves out are left out.

    Raises
    ------
    DataError : the file cannot be read, is not TOML, or has an unknown key or a value of the wrong type.
    """
    try:
        table = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        got = error.strerror or str(error)
        raise DataError("config", str(path), expected="a TOML file that can be read", got=got) from error
    except (ValueError, RecursionError) as error:  # tomllib's own error, and that of text that is not UTF-8
        fix = 'A line is, for example: temperature = 4.0, or: data = "digits".'
        raise DataError("config", str(path), expected="a file in TOML", got=f"an error: {error}", fix=fix) from error
    kinds = {**setting_types(), OUT: str}
    return {name: _read(path, name, value, kinds) for name, value in table.items()}


def _read(path: str | Path, name: str, value: Any, kinds: dict[str, Any]) -> Any:
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        fix = f"Did you mean {near[0]}?" if near else f"The settings are {', '.join(kinds)}."
        raise DataError("config", f"{path}: the key {name!r}", expected="the name of a setting", got=name, fix=fix)
    kind = KINDS[kinds[name]]
    if not kind.accepts(value):
        raise DataError("config", f"{path}: {name}", expected=kind.words, got=repr(value))
    return kind.read(value)
