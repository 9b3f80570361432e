"""Models out of Python and back: `save` and `load` write and read a safetensors file that holds all a student needs."""

from minikd.model_file import load, save
from minikd.safetensors import read_tensors, write_tensors

__all__ = ["load", "read_tensors", "save", "write_tensors"]
