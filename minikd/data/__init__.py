"""Data sets in: one `load` for every source, splits that never leak, and the order of the batches."""

from minikd.data.batches import batches
from minikd.data.dataset import Dataset, Normalisation
from minikd.data.raw import sha256_of
from minikd.data.sources import load

__all__ = ["Dataset", "Normalisation", "batches", "load", "sha256_of"]
