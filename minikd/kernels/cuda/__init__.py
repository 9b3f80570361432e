"""Kernels for NVIDIA's graphics cards, in CUDA C++: sources that CuPy compiles with NVRTC when one is first needed.

`sources` puts the text of a source together, `table` says which of its functions an operation is made of, and
`launches` binds them to arrays. Nothing here imports CuPy before a kernel is launched.
"""
