"""Models out of Python and back: `save` and `load` write and read a safetensors file that holds all a student needs.

`to_onnx` writes a file for other programs; `from_onnx`, `from_scikit_learn` and `from_pytorch` bring networks in.
"""

from minikd.export.imports import from_pytorch, from_scikit_learn
from minikd.export.onnx import to_onnx
from minikd.export.onnx_check import check_onnx
from minikd.export.onnx_reader import from_onnx
from minikd.model_file import load, save
from minikd.safetensors import read_tensors, write_tensors

__all__ = [
    "check_onnx",
    "from_onnx",
    "from_pytorch",
    "from_scikit_learn",
    "load",
    "read_tensors",
    "save",
    "to_onnx",
    "write_tensors",
]
