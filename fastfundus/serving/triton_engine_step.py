"""Engine step for NVIDIA Triton Inference Server, for bundles that the server has no backend for.

This file is copied unchanged into model repositories, with the bundle, where the server's Python backend runs it.
FastFundus and the library of the bundle's backend must be installed in the backend's environment.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from fastfundus.engines.bundle import Bundle
from fastfundus.serving import triton_tensors


class TritonPythonModel:
    """Computes the output of the engine, float32 [N, ...], of photos uint8 [N, S, S, 3]."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle, and reject it if it is not the one that was exported."""
        config = json.loads(args["model_config"])
        parameters = config["parameters"]
        bundle = Bundle.open(Path(__file__).parent / "bundle", allow_native_code="allow_native_code" in parameters)
        wanted = parameters["bundle_fingerprint"]["string_value"]
        if bundle.fingerprint != wanted:
            raise pb_utils.TritonModelException(
                f"the bundle's fingerprint is {bundle.fingerprint}, that of the repository {wanted}; export it again"
            )
        self.engine = bundle.load()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Compute all requests that the server has batched at once, and answer each of them."""
        photos = [triton_tensors.read(request, "photos") for request in requests]
        outputs = self.engine.infer(np.concatenate(photos), guard=True)
        ends = np.cumsum([len(each) for each in photos])
        return [
            pb_utils.InferenceResponse([triton_tensors.write("probabilities", output)])
            for output in np.split(outputs, ends[:-1])
        ]

    def finalize(self) -> None:
        """Release the engine."""
        self.engine.close()
