"""NVIDIA Triton Inference Server's first step: bytes of a picture to what the engine takes.

Copied into model repositories as it is, and run there by the server's Python backend, whose environment must have
FastFundus installed: photos are prepared by the code that prepared those the model learned from.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from fastfundus.photo.prepare import prepare_bytes
from fastfundus.spec import PreprocessSpec


class TritonPythonModel:
    """Pictures BYTES [N, 1] in any format that `fastfundus screen` reads, to photos uint8 [N, S, S, 3].

    A picture that cannot be scored fails its request, with its status and reason: the engine never sees it.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Read the spec beside this file, and refuse one that means something else in this installation."""
        config = json.loads(args["model_config"])
        stored = json.loads((Path(__file__).parent / "spec.json").read_text())
        self.spec = PreprocessSpec.from_dict(stored)
        wanted = config["parameters"]["spec_fingerprint"]["string_value"]
        if self.spec.fingerprint != wanted:
            raise pb_utils.TritonModelException(
                f"the spec's fingerprint is {self.spec.fingerprint}, the engine was built for {wanted}; install the "
                "FastFundus that exported this repository"
            )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request by itself."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        photos = []
        for data in pb_utils.get_input_tensor_by_name(request, "picture").as_numpy().reshape(-1):
            prepared = prepare_bytes(data, self.spec)
            # Ungradable photos have an image too, but no score that anyone should act on.
            if prepared.status != "ok" or prepared.image is None:
                error = pb_utils.TritonError(f"{prepared.status}: {prepared.reason}")
                return pb_utils.InferenceResponse(error=error)
            photos.append(prepared.image)
        return pb_utils.InferenceResponse([pb_utils.Tensor("photos", np.stack(photos))])
