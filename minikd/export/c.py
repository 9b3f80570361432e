"""A network as C: a header and a source that need no library, an example program, a sketch, and a CMake file.

The code itself stands in the folder `templates`, as C that is written for a network called "student". What is filled
in here are the tables, the steps of this network's layers, and figures; the numbers in the short formulas for exp and
its kin are those of `minikd.export.reference`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

import minikd
from minikd.errors import ArgumentError, OutputError
from minikd.export import reference
from minikd.export.layout import buffers, tables
from minikd.export.network import Layer, Network
from minikd.export.quantise import Quantised, QuantisedLayer
from minikd.export.reference import has_scale
from minikd.export.size import as_utf8, form, sizes
from minikd.safetensors import write_together

__all__ = ["contraction_bound", "driver", "to_c"]

LONGEST_CLASS_NAME = 1000  # bytes; C99 promises string literals of 4095
C_TYPES = {"float32": "float", "int8": "int8_t", "int32": "int32_t", "uint8": "uint8_t"}
IN_A_LINE = {"float32": 6, "int8": 18, "int32": 9, "uint8": 24}  # numbers of a table
POLYNOMIALS = {"EXP": reference.EXP, "TANH": reference.TANH, "NORMAL_TAIL": reference.NORMAL_TAIL}
IN_C = {"relu": "relu", "sigmoid": "sigmoid", "tanh": "tangent", "gelu": "gelu"}  # the functions' names there

SEAL = "@seal@"  # where the seal of the header and of the source will stand
REACH = 10  # the size of scaled features up to which the bound for fused multiply-adds holds
SLOPES = {"": 1.0, "relu": 1.0, "tanh": 1.0, "sigmoid": 0.25, "gelu": 1.13}  # an activation's largest
LARGEST_RESULTS = {"tanh": 1.0, "sigmoid": 1.0}
ERRORS = {"exp": "1.0", "tanh": "1.5", "sigmoid": "2.4", "gelu": "4.9"}  # in ulp, as `reference` says
FORMULA_ULP = 16  # between an activation's formula with fused multiply-adds and without


def to_c(
    network: Network, folder: str | os.PathLike[str], *, name: str = "student", quantised: Quantised | None = None
) -> list[Path]:
    """Write a network as C: NAME.h, NAME.c, main.c, NAME.ino and CMakeLists.txt; the same network gives the same bytes.

    Parameters
    ----------
    network : in float32; its scale of the features goes with it.
    folder : made if it is not there; files of these names are replaced.
    name : what the files, and all names in C, begin with; letters, digits and underscores, at most 31.
    quantised : the same network in int8, which is written instead.

    Raises
    ------
    ArgumentError : a name that C does not allow; a class name of more than 1000 bytes; numbers that are not finite.
    OutputError : the folder cannot be written to.
    """
    _check_name(name)
    model = network if quantised is None else quantised
    _check(model)
    figures = {figure: str(value) for figure, value in sizes(network, quantised).items()}
    fields = {
        **figures,
        "seal": SEAL,
        "header": f"{name}.h",
        "source": f"{name}.c",
        "version": minikd.__version__,
        "features": str(model.sizes[0]),
        "classes": str(model.sizes[-1]),
    }
    files = {
        f"{name}.h": _header(model, name, fields),
        f"{name}.c": _source(model, name, fields),
        "main.c": _filled("main.c", name, fields),
        f"{name}.ino": _filled("sketch.ino", name, fields),
        "CMakeLists.txt": _filled("CMakeLists.txt", name, fields),
    }
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = "Choose a folder that you may write to."
        raise OutputError("export", str(folder), expected="a folder", got=str(error), fix=fix) from error
    _seal(files, f"{name}.h", f"{name}.c")
    write_together({folder / file: [text.encode()] for file, text in files.items()})
    return [folder / file for file in files]


def _seal(files: dict[str, str], *sealed: str) -> None:
    """Put a number made of all the sealed files into each, by which they know one another.

    Where a write was ended between two files, or one was copied alone, the compiler says so.
    """
    digest = hashlib.sha256("".join(files[file] for file in sealed).encode()).hexdigest()
    for file in sealed:  # only in the first place, for what follows is a user's: the names of the classes
        files[file] = files[file].replace(SEAL, f"0x{digest[:8]}UL", 1)


def driver(name: str) -> str:
    """A C program that runs rows of float32 from its standard input through the code of this name."""
    return _filled("driver.c", name, {"header": f"{name}.h"})


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,30}", name) or name.lower() == "main":
        expected = "a letter and then letters, digits or underscores, 31 at most, and not main"
        raise ArgumentError("export", "name", expected=expected, got=repr(name))


def _check(model: Network | Quantised) -> None:
    scale = {"the features' mean": model.mean, "the features' deviation": model.deviation}
    for name, values in {**tables(model), **scale}.items():
        if not np.isfinite(values).all():
            raise ArgumentError("export", name, expected="finite numbers", got="NaN or infinity")
    if (model.deviation == 0).any():
        raise ArgumentError("export", "the features' deviation", expected="not 0", got="0")
    longest = max(map(as_utf8, model.class_names), key=len)
    if len(longest) > LONGEST_CLASS_NAME:
        expected = f"at most {LONGEST_CLASS_NAME} bytes long"
        raise ArgumentError("export", "every class name", expected=expected, got=f"one of {len(longest)} bytes")


# --- templates ---


@cache
def _template(file: str) -> str:
    return resources.files("minikd.export").joinpath("templates", file).read_text("utf-8")


def _filled(file: str, name: str, fields: dict[str, str]) -> str:
    """A template under this network's name, with its fields; what is filled in is not read again."""
    text = _template(file).replace("student", name).replace("STUDENT", name.upper())
    text = re.sub(r"^( *)@horner (\w+) (\w+) (\w+)@\n", _horner, text, flags=re.MULTILINE)
    known = {number: literal(value) for number, value in reference.NUMBERS.items()} | fields
    return re.sub(r"@(\w+)@", lambda found: known[found[1]], text)


def _horner(found: re.Match[str]) -> str:
    """Statements that set y to a polynomial in x, in the order of `reference.horner`."""
    indent, y, x, polynomial = found.groups()
    *lower, highest = map(literal, POLYNOMIALS[polynomial])
    return "".join(f"{indent}{y} = {term};\n" for term in [highest, *(f"{y} * {x} + {c}" for c in reversed(lower))])


# --- numbers and texts in C ---


def literal(value: float) -> str:
    """A number in float32 as C reads it back with the same bits."""
    text = f"{float(np.float32(value)):.9g}"
    return f"{text}f" if re.search(r"[.e]", text) else f"{text}.0f"


def c_string(text: str) -> str:
    """Any text as a string in C: what is not plain ASCII, and all that could end it or begin a trigraph, in octal."""
    plain = set(range(32, 127)) - set(b'"\\?')
    return '"' + "".join(chr(b) if b in plain else f"\\{b:03o}" for b in as_utf8(text)) + '"'


def _array(name: str, values: np.ndarray) -> str:
    kind = str(values.dtype)
    numbers = map(literal if kind == "float32" else str, values.ravel().tolist())
    lines = "".join(f"    {', '.join(line)},\n" for line in batched(numbers, IN_A_LINE[kind]))
    return f"static const {C_TYPES[kind]} {name}[{values.size}] = {{\n{lines}}};\n\n"


def batched(items: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    """The items in tuples of this size, the last perhaps smaller."""
    left = iter(items)
    return iter(lambda: tuple(itertools.islice(left, size)), ())


def _class_names(model: Network | Quantised, name: str) -> str:
    lines = "".join(f"    {c_string(text)},\n" for text in model.class_names)
    return f"static const char *const class_names[{name.upper()}_CLASSES] = {{\n{lines}}};\n\n"


# --- the header ---


def _header(model: Network | Quantised, name: str, fields: dict[str, str]) -> str:
    kind = form(model)
    formulas = ["exp", *(f for f in _activations(model) if f in ERRORS and kind == "float32")]
    about = {
        "errors": ", ".join(f"{formula} {ERRORS[formula]}" for formula in formulas),
        "network": _described(model, fields["parameters"]),
        "reach": str(REACH),
    }
    if isinstance(model, Network):
        about["contraction"] = f"{_rounded_up(contraction_bound(model)):.1e}"
    scales = more = ""
    if isinstance(model, Quantised):
        for place, affine in (("input", model.input), ("output", model.output)):
            about |= {f"{place}_scale": literal(affine.scale), f"{place}_zero": str(affine.zero)}
        scales = _filled("int8_scales.h", name, about)
        more = _filled("int8_functions.h", name, about)
    lines = textwrap.wrap(_filled(f"{kind}_about.txt", name, about), 116, break_on_hyphens=False)
    comment = "\n".join(f" * {line}" for line in lines)
    return _filled("student.h", name, {**fields, **about, "about": comment, "scales": scales, "more": more})


def _activations(model: Network | Quantised) -> list[str]:
    """Those in use, each once, in the order of their first layer."""
    return [kind for kind in dict.fromkeys(layer.activation for layer in model.layers) if kind]


def _described(model: Network | Quantised, parameters: str) -> str:
    kinds = [", ".join(_activations(model))] if _activations(model) else []
    return ", ".join(["-".join(map(str, model.sizes)), *kinds, form(model), f"{int(parameters):,} parameters"])


def contraction_bound(network: Network) -> float:
    """How far a logit may be from `reference.predict_c_order` in C that fuses multiply-adds, at most.

    Holds while no scaled feature is larger than 10 in size. A sum of k products and a bias, in either way, is within
    γ·(|bias| + Σ|weight·input|) of the exact one, with γ = (k + 1)·u / (1 - (k + 1)·u) and u = 2^-24.

    Source: Higham 2002, "Accuracy and stability of numerical algorithms", sec. 3.1.
    """
    size = np.full(network.sizes[0], float(REACH))  # of each input, at most
    gap = np.zeros(network.sizes[0])  # between the two ways, of each input
    for layer in network.layers:
        weight, steps = abs(layer.weight.astype(np.float64)), (layer.weight.shape[1] + 1) * 2.0**-24
        if steps >= 0.5:
            return float("inf")
        reached = abs(layer.bias.astype(np.float64)) + weight @ (size + gap)
        gap = weight @ gap + 2 * steps / (1 - steps) * reached
        size = np.minimum(reached + gap, LARGEST_RESULTS.get(layer.activation, np.inf))
        formula = FORMULA_ULP * 2.0**-23 * size if layer.activation in ERRORS else 0.0
        gap = SLOPES[layer.activation] * gap + formula
    return float(gap.max())


def _rounded_up(value: float) -> float:
    """To two digits, never downwards."""
    return float(np.nextafter(value * 1.05, np.inf))


# --- the source ---


def _source(model: Network | Quantised, name: str, fields: dict[str, str]) -> str:
    arrays = "".join(_array(*item) for item in tables(model).items()) + _class_names(model, name)
    filled = {
        **fields,
        "tables": arrays,
        "buffers": _declared_buffers(model),
        "steps": "".join(_steps(model)),
        "scaled": _scaled(model),
    }
    if isinstance(model, Quantised):
        filled["layers"] = "".join(_layer_record(layer, n, name) for n, layer in enumerate(model.layers, 1))
        parts = ["head.c", "exp.c", "int8.c", "tail.c"]
    else:
        used = [f"{kind}.c" for kind in _activations(model)]
        parts = ["head.c", "exp.c", "product.c", *used, "float32.c", "tail.c"]
    return "".join(_filled(part, name, filled) for part in parts)


def _declared_buffers(model: Network | Quantised) -> str:
    arrays = ", ".join(f"{name}[{length}]" for name, length in buffers(model).items())
    index = "    size_t i;\n" if isinstance(model, Network) and has_scale(model) else ""
    return (f"    {C_TYPES[form(model)]} {arrays};\n" if arrays else "") + index


def _scaled(model: Network | Quantised) -> str:
    """Feature i on the scale of the training: from arrays, or from numbers where all features have the same."""
    if not has_scale(model):
        return "features[i]"
    arrays = tables(model)
    mean = "mean[i]" if "mean" in arrays else literal(model.mean[0])
    deviation = "deviation[i]" if "deviation" in arrays else literal(model.deviation[0])
    return f"(features[i] - {mean}) / {deviation}"


def _steps(model: Network | Quantised) -> Iterator[str]:
    """The calls that lead from the features to the logits, by way of the buffers in turn."""
    source, free = "features", ["a", "b"]
    if isinstance(model, Network) and has_scale(model):
        yield f"    for (i = 0; i < {model.sizes[0]}; i++) {{\n        a[i] = {_scaled(model)};\n    }}\n"
        source, free = "a", ["b", "a"]
    layers: tuple[Layer | QuantisedLayer, ...] = model.layers
    for number, layer in enumerate(layers, 1):
        target = "logits" if number == len(model.layers) else free[0]
        if isinstance(layer, Layer):
            m, k = layer.weight.shape
            yield f"    product(weight_{number}, bias_{number}, {source}, {k}, {m}, {target});\n"
            if layer.activation:
                yield f"    {IN_C[layer.activation]}({target}, {m});\n"
        else:
            yield f"    run(&layer_{number}, {source}, {target});\n"
        source, free = target, free[::-1]


def _layer_record(layer: QuantisedLayer, number: int, name: str) -> str:
    m, k = layer.weight.shape
    arrays = ", ".join(f"{kind}_{number}" for kind in ("weight", "bias", "multiplier", "shift"))
    table = "NULL" if layer.table is None else f"table_{number}"
    numbers = f"{k}, {m}, {layer.product.zero}, {layer.lowest}"
    return f"static const {name}_layer layer_{number} = {{{arrays}, {table}, {numbers}}};\n"
