"""The kernel benchmark: minikd's kernels beside what a user would otherwise run, under what the machine allows."""

from minikd.bench.command import add_arguments, run

__all__ = ["add_arguments", "run"]
