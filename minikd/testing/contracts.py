"""The table of contracts: what a kernel of each operation promises, or why there is none for it."""

from __future__ import annotations

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
