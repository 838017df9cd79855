"""AOTInductor: the model compiled ahead of time into one package, for this CPU or GPU. Needs torch, also to run.

The package holds machine code for the processor and the torch it was built with; `bundle.json` says which, and another
machine refuses it.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.runtime import Blueprint, Engine, require_needs
from fastfundus.errors import BundleError, require

__all__ = ["PACKAGE", "AotiEngine", "build", "load", "needs", "precisions"]

PACKAGE = "torch"
_FILE = "engine.pt2"


def needs() -> dict[str, str]:
    """What a machine must have to run what is built here: this torch, and this GPU or set of instructions."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"device": device, "torch": torch.__version__}


def precisions() -> tuple[str, ...]:
    """Precisions that this machine computes in, fastest first."""
    import torch

    fast = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return ("bf16", "fp32") if fast else ("fp32",)


def build(blueprint: Blueprint, folder: Path, precision: str) -> dict[str, Any]:
    """Compile for the device of this machine.

    Args:
        blueprint: its model.
        folder: where the package goes.
        precision: what the classifier computes in; preprocessing and probabilities stay float32.

    Returns:
        What `bundle.json` says of the engine: its file, and what a machine needs to run it.
    """
    import copy

    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, size = copy.deepcopy(blueprint.model).to(device).eval(), blueprint.size
    model.compute_in(getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[precision]))
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8, device=device)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / _FILE))
    return {"engine": _FILE, "needs": needs()}


def load(folder: Path, about: dict[str, Any]) -> AotiEngine:
    """Load the engine of a bundle.

    Raises:
        BundleError: it was built for another device or torch.
    """
    require("torch", extra="train")
    require_needs(folder, about["needs"], needs())
    return AotiEngine(folder / about["engine"], about["spec"]["size"])


class AotiEngine(Engine):
    """A compiled package.

    Args:
        file: the package.
        size: side of the photos in pixels.

    Raises:
        BundleError: it cannot be loaded.
    """

    def __init__(self, file: Path, size: int) -> None:
        import torch

        self._torch = torch
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._model: Any = torch._inductor.aoti_load_package(str(file))
        except Exception as error:
            # A damaged archive, a library that does not load: torch has no type of error of its own for them.
            raise BundleError(f"{file}: torch cannot load it ({str(error).splitlines()[0]}); build it again") from None
        super().__init__(size, str(file.parent))

    def run_on_device(self, photos: Any) -> Any:
        """Score photos that are a tensor on the engine's device, uint8 [N, S, S, 3]; nothing is checked.

        Returns:
            The probabilities, a tensor on that device.
        """
        with self._torch.inference_mode():
            return self._model(photos)

    def _run(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._run_on_device(self._torch.from_numpy(np.ascontiguousarray(photos)).to(self._device))

    def _run_on_device(self, photos: Any) -> NDArray[np.float32]:
        return np.asarray(self.run_on_device(photos).float().cpu().numpy())

    def _free(self) -> None:
        self._model = None
