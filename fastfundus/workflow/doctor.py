"""Examine what this machine and installation can do."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from fastfundus.machine import cpu_features, usable_cores

__all__ = ["examine"]

# This module runs on incomplete installations: it imports a part only after finding its packages.
_PARTS = {
    "screening": (["numpy", "opencv-python-headless", "simplejpeg", "polars", "openvino"], "pip install fastfundus"),
    "training": (["torch", "torchvision", "timm", "scikit-learn"], "pip install 'fastfundus[train]'"),
    "building engines": (["onnx", "onnxruntime", "nncf"], "pip install 'fastfundus[train]'"),
    "Triton kernels": (["triton"], "pip install 'fastfundus[train]' on Linux x86-64"),
    "HEIC photos of phones": (["pillow-heif"], "pip install 'fastfundus[phone]'"),
    "server": (["fastapi", "uvicorn"], "pip install 'fastfundus[serve]'"),
    "DALI": (["nvidia-dali-cuda130"], "pip install 'fastfundus[dali]'"),
    "TensorRT": (["tensorrt", "pycuda"], "pip install 'fastfundus[tensorrt]'"),
    "building for TensorRT-RTX": (["tensorrt-rtx-cu13-bindings"], "pip install 'fastfundus[tensorrt-rtx]'"),
    "signatures": (["cryptography"], "pip install 'fastfundus[sign]'"),
    "fleet": (["ray"], "pip install 'fastfundus[fleet]'"),
}
"""Packages of each part, and the command that installs them."""
_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""Vector and matrix instructions that matter for speed."""


def examine() -> dict[str, Any]:
    """Examine what this machine and installation can do.

    Returns:
        Plain data: versions, platform, cores, cpu_features, the GPU, the precision of engines and of training, how the
        CPU samples photos, and for each part whether it is ready and how to install it. None means unknown or absent.
    """
    parts = {name: _examine_part(packages, how) for name, (packages, how) in _PARTS.items()}
    engine: dict[str, Any] = {"precision": None}
    if parts["screening"]["ready"]:
        from fastfundus.engines.openvino_backend import precisions

        engine["precision"] = precisions()[0]
    gpu = sampling = precision = None
    if parts["training"]["ready"]:
        try:
            import torch

            from fastfundus.config import LoopConfig
            from fastfundus.kernels import host
            from fastfundus.training.distributed import World
            from fastfundus.training.precision import resolve_precision

            loaded = host.load()
            sampling = "compiled C++" if loaded.library else f"plain PyTorch, thirty times slower ({loaded.reason})"
            gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
            precision = resolve_precision(LoopConfig(), World().device())[1]
        except (ImportError, OSError, RuntimeError) as error:
            # Installed but broken, for example by a missing system library or driver.
            parts["training"] |= {"ready": False, "install": f"torch is installed but fails: {error}"}
    return {
        "fastfundus": _version("fastfundus"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": usable_cores(),
        "cpu_features": [name for name in _FEATURES if name in cpu_features()],
        "gpu": gpu,
        "engine": engine,
        "training_precision": precision,
        "sampling_on_cpu": sampling,
        "parts": parts,
    }


def _examine_part(packages: list[str], how: str) -> dict[str, Any]:
    versions = {package: _version(package) for package in packages}
    return {"versions": versions, "ready": all(versions.values()), "install": how}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
