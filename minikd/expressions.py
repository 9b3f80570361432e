"""Small expressions in text, for command lines and TOML files: names, numbers and their sums and products.

"HardLabels(0.3) + SoftLabels(0.7, temperature=4)" is built from a table of names; nothing else of Python is there, so
that a configuration file from a stranger runs no code.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from minikd.errors import ArgumentError

LONGEST = 10_000  # characters; far more than anybody writes by hand, far less than what exhausts the parser


def parse(where: str, argument: str, text: str, names: Mapping[str, Callable[..., Any]], example: str) -> Any:
    """What the text says, built from the callables in `names`.

    Allowed: calls of these names, with numbers, texts in quotes, True, False, None, tuples, lists and other such calls
    as arguments; `+`, `*` and a minus sign.

    Raises
    ------
    ArgumentError : the text is no such expression, or a name in it is unknown (the nearest one is suggested).
    """

    def refuse(got: str, fix: str = f"Write, for example: {example}") -> ArgumentError:
        return ArgumentError(where, argument, expected="an expression of " + ", ".join(names), got=got, fix=fix)

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int() | float() | str() | bool() | None):
                return node.value
            case ast.Tuple(elts=items):
                return tuple(value(item) for item in items)
            case ast.List(elts=items):
                return [value(item) for item in items]
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return _product(value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in names:
                given = {str(k.arg): value(k.value) for k in keywords if k.arg}
                return names[name](*(value(arg) for arg in args), **given)
            case ast.Call(func=ast.Name(id=name)) | ast.Name(id=name):
                near = difflib.get_close_matches(name, names, n=1)
                unknown = f"{name} without its brackets" if name in names else f"the unknown name {name}"
                raise refuse(unknown, f"Did you mean {near[0]}()?" if near else f"Write, for example: {example}")
        raise refuse(repr(ast.unparse(node)))

    if len(text) > LONGEST:
        raise refuse(f"{len(text):,} characters")
    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise refuse(repr(text)) from error
    except (TypeError, OverflowError) as error:  # arguments that the callable does not take, things that do not add
        raise refuse(f"{text!r}: {error}") from error


def _product(left: Any, right: Any) -> Any:
    """left·right; TypeError for texts and lists, of which a short expression could make gigabytes."""
    for factor in (left, right):
        if isinstance(factor, str | list | tuple):
            raise TypeError(f"{type(factor).__name__} is no factor")
    return left * right


def spelled(thing: Any) -> str:
    """The text that `parse` reads, of a dataclass: its name, and those values that differ from their defaults."""
    values = []
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        if not field.init or value == field.default:
            continue
        text = f"{value:g}" if isinstance(value, float) else str(value)
        written = (
            text if isinstance(value, float) and float(text) == value else repr(text if callable(value) else value)
        )
        first = field is dataclasses.fields(thing)[0]
        values.append(written if first else f"{field.name}={written}")
    return f"{type(thing).__name__}({', '.join(values)})"
