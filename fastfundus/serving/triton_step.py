"""Preprocessing step for NVIDIA Triton Inference Server: converts image files to the input of the engine.

This file is copied unchanged into model repositories, where the server's Python backend runs it. FastFundus must be
installed in the backend's environment, so that photos are prepared by the same code as those the model was trained on.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from fastfundus.photo.prepare import prepare_bytes
from fastfundus.serving import triton_tensors
from fastfundus.spec import PreprocessSpec


class TritonPythonModel:
    """Converts image files in any format that `fastfundus screen` reads to photos uint8 [N, S, S, 3].

    The files are uint8 [N, L], usually one a request, or BYTES [N, 1], as the configuration says.

    A photo that cannot be scored fails its request with its status and reason and is never passed to the engine.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Read `spec.json` next to this file, and reject it if this installation interprets it differently."""
        config = json.loads(args["model_config"])
        stored = json.loads((Path(__file__).parent / "spec.json").read_text())
        self.spec = PreprocessSpec.from_dict(stored)
        self.as_strings = config["input"][0]["data_type"] == "TYPE_STRING"
        wanted = config["parameters"]["spec_fingerprint"]["string_value"]
        if self.spec.fingerprint != wanted:
            raise pb_utils.TritonModelException(
                f"the spec's fingerprint is {self.spec.fingerprint}, the engine was built for {wanted}; install the "
                "FastFundus version that exported this repository"
            )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request independently."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        photos = []
        for data in self._files(request):
            prepared = prepare_bytes(data, self.spec)
            # Ungradable photos have an image too, but their score would not be reliable.
            if prepared.status != "ok" or prepared.image is None:
                error = pb_utils.TritonError(f"{prepared.status}: {prepared.reason}")
                return pb_utils.InferenceResponse(error=error)
            photos.append(prepared.image)
        return pb_utils.InferenceResponse([triton_tensors.write("photos", np.stack(photos))])

    def _files(self, request: Any) -> list[bytes]:
        if self.as_strings:
            return list(pb_utils.get_input_tensor_by_name(request, "picture").as_numpy().reshape(-1))
        return [row.tobytes() for row in triton_tensors.read(request, "picture")]
