"""The benchmark of whole steps: training, distillation and prediction of small networks, beside what else there is."""

from minikd.bench.steps.command import add_arguments, run

__all__ = ["add_arguments", "run"]
