"""Tensors of NVIDIA Triton's Python backend by DLPack, which works whatever NumPy the server was built for.

Only the server's Python backend can import this module.
"""

import ctypes
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

_USED = ctypes.c_char_p(b"used_dltensor")
_SET_NAME = ctypes.pythonapi.PyCapsule_SetName
_SET_NAME.argtypes = [ctypes.py_object, ctypes.c_char_p]


def read(request: Any, name: str) -> np.ndarray:
    """Return an input of numbers without copying it."""
    return np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name))


def write(name: str, values: np.ndarray) -> Any:
    """Return an output."""
    capsule = np.ascontiguousarray(values).__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    # The server gives the capsule a name of its own, about which NumPy would complain in the log.
    _SET_NAME(capsule, _USED)
    return tensor
