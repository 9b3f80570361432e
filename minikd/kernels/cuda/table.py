"""Which functions of which CUDA source each kernel is made of, and what they are given.

A kernel is a few steps, each the launch of one function. The arguments of a step are names: of the operation's buffers,
sizes and attributes, or of what `launches` works out (`DERIVED` there). A buffer of the kind `scalar` or `counter` is
two arguments, its address or null and its value. `null` is no array.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

THREADS = 256
ROWS_OF_WARPS = 4  # rows in a block where each warp has one


class Variant(NamedTuple):
    """One of several functions for rows of different lengths: its suffix, and the most classes that it takes (0: any).

    `threads` are those of a block, which has one row, or ROWS_OF_WARPS where the row is a warp's. `kept` is how many
    rows of c numbers it keeps in dynamic shared memory, but for `beside` numbers of them that are in registers.
    """

    suffix: str
    most: int
    threads: int
    rows: int = 1
    kept: int = 0
    beside: int = 0

    def shared(self, c: int, itemsize: int) -> int:
        """Bytes of dynamic shared memory for a row of c numbers."""
        return (self.kept * c - min(c, self.beside)) * itemsize


def _warp(items: int) -> Variant:
    return Variant(f"warp_{items}", 32 * items, 32 * ROWS_OF_WARPS, ROWS_OF_WARPS)


_OF_ONE_ROW = (_warp(1), _warp(4), _warp(32), Variant("block", 0, THREADS))
_BOTH_KEPT = Variant("shared", 0, 512, kept=2)
_LAST = (Variant("held", 0, 512, kept=1), Variant("again", 0, 512))

# The functions for rows of every length, shortest first, for float (4 bytes) and double (8 bytes).
VARIANTS: dict[str, dict[int, tuple[Variant, ...]]] = {
    **{
        name: {4: _OF_ONE_ROW, 8: _OF_ONE_ROW}
        for name in (
            "softmax",
            "softmax_vjp",
            "log_softmax",
            "log_softmax_vjp",
            "cross_entropy",
            "soft_cross_entropy",
        )
    },
    "distillation": {
        4: (
            *(_warp(items) for items in (1, 4, 16, 32)),
            Variant("block_8", 8 * 512, 512, kept=1),
            Variant("block_24", 24 * 512, 512, kept=1),
            _BOTH_KEPT,
            Variant("both", 0, 512, kept=2, beside=24 * 512),
            *_LAST,
        ),
        8: (
            *(_warp(items) for items in (1, 4, 16)),
            Variant("block_8", 8 * 512, 512, kept=1),
            Variant("block_16", 16 * 512, 512, kept=1),
            _BOTH_KEPT,
            Variant("both", 0, 512, kept=2, beside=12 * 512),
            *_LAST,
        ),
    },
}


class Step(NamedTuple):
    """The launch of one function.

    `grid` says how many blocks: one; rows (a block for each); classes (what the variant of VARIANTS says); vectors
    (16 bytes a thread); elements; fours (4 elements a thread); parts (the partial sums); columns (128 a block); forward
    and backward (those of bias.cu); arena (vectors, but no more than 1024 blocks).
    `only` names buffers without which the step is left out, `unless` one with which it is.
    """

    source: str
    function: str
    grid: str
    args: str
    threads: tuple[int, ...] = (THREADS,)
    only: str = ""
    unless: str = ""


_ROWS, _LOSSES, _DISTILLATION, _BIAS, _ELEMENTS = (
    name + ".cu" for name in ("rows", "losses", "distillation", "bias", "elements")
)
_TILE = (32, 8)  # columns and rows of a block of bias.cu


def _softmax(name: str) -> dict[str, tuple[Step, ...]]:
    return {
        name: (Step(_ROWS, name, "classes", "y x temperature n c"),),
        name + "_vjp": (Step(_ROWS, name + "_vjp", "classes", "dx dy y temperature n c", only="dx"),),
    }


def _row_loss_vjp(name: str, logits: str) -> dict[str, tuple[Step, ...]]:
    args = f"{logits} dloss gradient c each_row"
    return {name + "_vjp": (Step(_LOSSES, "scale_rows", "rows", args, only=logits),)}


def _bias(activation: str, v: str, b: str) -> dict[str, tuple[Step, ...]]:
    name = "bias" + activation
    return {
        name: (Step(_BIAS, name, "forward", "y x b n m", _TILE),),
        name + "_vjp": (
            Step(_BIAS, name + "_vjp", "backward", f"dx bands_part dy {v} {b} n m band", _TILE),
            Step(_BIAS, "bias_sum", "columns", "db bands_part bands m", (128,), only="db"),
        ),
    }


def _activation(name: str, v: str) -> dict[str, tuple[Step, ...]]:
    return {
        name: (Step(_ELEMENTS, "apply_" + name, "vectors", "y u size"),),
        name + "_vjp": (Step(_ELEMENTS, f"apply_{name}_vjp", "vectors", f"du dy {v} size", only="du"),),
    }


_SUM_OF_ROWS = Step(_LOSSES, "sum_rows", "one", "loss row_loss n one null", only="row_loss")
_CHECKED_ROWS = Step(_ELEMENTS, "rows_before", "one", "refused call rows k n")

KERNELS: dict[str, tuple[Step, ...]] = {
    **_softmax("softmax"),
    **_softmax("log_softmax"),
    "cross_entropy": (
        Step(
            _LOSSES,
            "cross_entropy_before",
            "one",
            "common refused call target weight n c reduction ignore_index",
        ),
        Step(
            _LOSSES,
            "cross_entropy",
            "classes",
            "loss row_loss gradient logits target weight common n c ignore_index label_smoothing",
        ),
        _SUM_OF_ROWS._replace(args="loss row_loss n one common"),
    ),
    **_row_loss_vjp("cross_entropy", "dlogits"),
    "soft_cross_entropy": (
        Step(
            _LOSSES,
            "soft_cross_entropy",
            "classes",
            "loss row_loss gradient logits target weight n c loss_scale label_smoothing",
        ),
        _SUM_OF_ROWS._replace(args="loss row_loss n loss_scale null"),
    ),
    **_row_loss_vjp("soft_cross_entropy", "dlogits"),
    "kl_div": (
        Step(_LOSSES, "kl_div", "parts", "loss loss_part gradient input target size loss_scale log_target"),
        _SUM_OF_ROWS._replace(args="loss loss_part parts loss_scale null", only="loss_part"),
    ),
    "kl_div_vjp": (
        Step(_LOSSES, "scale_all", "vectors", "dinput dloss gradient size", only="dinput", unless="each_element"),
        Step(_ELEMENTS, "multiply", "vectors", "dinput dloss gradient size", only="dinput each_element"),
    ),
    "distillation_loss": (
        Step(
            _DISTILLATION,
            "distillation_before",
            "one",
            "common refused call target temperature hard_weight soft_weight n c "
            "reduction scale_t2 log_target ignore_index",
        ),
        Step(
            _DISTILLATION,
            "distillation",
            "classes",
            "loss row_loss gradient student_logits teacher_logits target common n c ignore_index label_smoothing",
        ),
        _SUM_OF_ROWS,
    ),
    **_row_loss_vjp("distillation_loss", "dstudent_logits"),
    **_bias("", "null", "null"),
    **_bias("_relu", "y", "null"),
    **_bias("_tanh", "y", "null"),
    **_bias("_sigmoid", "y", "null"),
    **_bias("_gelu", "x", "b"),
    **_activation("relu", "y"),
    **_activation("tanh", "y"),
    **_activation("sigmoid", "y"),
    **_activation("gelu", "u"),
    "dropout": (Step(_ELEMENTS, "dropout", "fours", "y mask x step size p seed stream"),),
    "dropout_vjp": (Step(_ELEMENTS, "multiply", "vectors", "dx dy mask size", only="dx"),),
    "sgd_step": (Step(_ELEMENTS, "sgd_step", "vectors", "w v g lr size momentum weight_decay nesterov"),),
    "adam_step": (
        Step(_ELEMENTS, "adam_step", "arena", "w m v g lr step size beta1 beta2 eps weight_decay decoupled"),
    ),
    "clip_norm": (
        Step(_ELEMENTS, "squares", "parts", "part g size"),
        Step(_ELEMENTS, "clipping", "one", "factor part parts limit"),
        Step(_ELEMENTS, "scale", "vectors", "g g factor zero size"),
    ),
    "take": (_CHECKED_ROWS, Step(_ELEMENTS, "take", "places", "y x rows n m")),
    "take_vjp": (Step(_ELEMENTS, "take_vjp", "rows", "dx dy rows k m", only="dx"),),
    "take_scaled": (_CHECKED_ROWS, Step(_ELEMENTS, "take_scaled", "places", "y x rows scale shift n m")),
    "take_index": (_CHECKED_ROWS, Step(_ELEMENTS, "take_index", "elements", "y x rows k n")),
    "add_into": (Step(_ELEMENTS, "add_into", "vectors", "y x size"),),
    "copy": (Step(_ELEMENTS, "copy", "vectors", "y x size"),),
    "mul": (Step(_ELEMENTS, "multiply", "vectors", "y a b size"),),
    "mul_vjp": (
        Step(_ELEMENTS, "multiply", "vectors", "da dy b size", only="da"),
        Step(_ELEMENTS, "multiply", "vectors", "db dy a size", only="db"),
    ),
    "scale": (Step(_ELEMENTS, "scale", "vectors", "y x factor size"),),
    "scale_vjp": (Step(_ELEMENTS, "scale", "vectors", "dx dy factor size", only="dx"),),
    "standardise": (Step(_ELEMENTS, "standardise", "rows", "y x mean deviation m"),),
    "shift_images": (Step(_ELEMENTS, "shift_images", "rows", "y x fill step m width most seed stream"),),
}

# What an attribute is in CUDA.
ATTRIBUTES: dict[str, type[np.generic]] = {
    **dict.fromkeys(("reduction", "scale_t2", "log_target", "nesterov", "decoupled"), np.int32),
    **dict.fromkeys(("ignore_index", "width", "most"), np.int64),
    **dict.fromkeys(("seed", "stream"), np.uint64),
    **dict.fromkeys(("label_smoothing", "p", "momentum", "weight_decay", "beta1", "beta2", "eps", "limit"), np.float64),
}
REDUCTIONS = ("mean", "sum", "none", "batchmean")  # in the order of groups.h
