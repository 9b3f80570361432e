"""The table of contracts: what a kernel of each operation promises, or why there is no contract for it."""

from __future__ import annotations

from minikd.errors import ArgumentError
from minikd.kernels import kernel_names
from minikd.testing import (
    divergence_contracts,
    layer_contracts,
    linear_loss_contracts,
    loss_contracts,
    softmax_contracts,
)
from minikd.testing.contract import Contract

# Kernel → contract.
CONTRACTS: dict[str, Contract] = {
    contract.kernel: contract
    for contract in (
        *softmax_contracts.CONTRACTS,
        *loss_contracts.CONTRACTS,
        *divergence_contracts.CONTRACTS,
        *linear_loss_contracts.CONTRACTS,
        *layer_contracts.CONTRACTS,
    )
}

_MOVES = "it only moves numbers, so that nothing is left to judgement"
_RANDOM = "what it draws is a matter of its seed, and must be the same in every bit"
_ONE_STEP = "it is one step of arithmetic for each number, without a case to be decided"
_PART = "it is a part of linear and its likes, which have one"
_COUNTS = "it gives classes or counts, which are right or wrong"
_OWN = "it is a rule of minikd's own, which nobody else writes a kernel for"
_SUMS = "how far a sum may be off depends on the numbers that are added up"

# Operation → why it has no contract.
WITHOUT: dict[str, str] = {
    **dict.fromkeys(("reshape", "transpose", "take", "take_scaled", "take_index", "concatenate", "copy"), _MOVES),
    **dict.fromkeys(("broadcast_to", "set_scalar", "advance", "corrected_logits"), _MOVES),
    **dict.fromkeys(("dropout", "shift_images"), _RANDOM),
    **dict.fromkeys(("add", "sub", "mul", "scale", "div", "pow", "maximum", "neg", "exp", "log", "abs"), _ONE_STEP),
    **dict.fromkeys(("add_into", "standardise"), _ONE_STEP),
    **dict.fromkeys(("matmul", "bias", "bias_relu", "bias_tanh", "bias_sigmoid", "bias_gelu"), _PART),
    **dict.fromkeys(("argmax", "correct_count"), _COUNTS),
    **dict.fromkeys(("fake_quantise", "fake_quantise_rows", "teacher_confidence"), _OWN),
    **dict.fromkeys(("max_norm", "clip_norm"), _OWN),
    **dict.fromkeys(("sum", "mean", "max", "sum_to"), _SUMS),
}


def contract_of(kernel: str) -> Contract:
    """The contract of a kernel.

    Raises
    ------
    ArgumentError : there is no such kernel, or no contract for it; the message says why, and what to do instead.
    """
    if kernel in CONTRACTS:
        return CONTRACTS[kernel]
    where, name = "check_kernel", kernel.removesuffix("_vjp")
    if kernel not in kernel_names():
        raise ArgumentError(where, "op", expected="one of " + ", ".join(CONTRACTS), got=repr(kernel))
    fix = f"Compare it with reference({kernel!r}), which gives what it should."
    reason = WITHOUT.get(name, "")
    if kernel != name:
        fix = f"Compare it with reference({kernel!r}), or the function that it is of with check_gradients."
        reason = reason or "only softmax and the activations have one for their gradients"
        if name in CONTRACTS and CONTRACTS[name].gives[0] == "loss":
            fix, reason = (
                f"Check {name} with a function that gives both.",
                "the gradient is what the loss gives beside it",
            )
    raise ArgumentError(where, "op", expected="an operation with a contract", got=f"{kernel!r}: {reason}", fix=fix)
