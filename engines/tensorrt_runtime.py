"""Torch-free runtime for TensorRT plans.

It uses pinned buffers, two streams and CUDA graphs of usual batch sizes, and allocates nothing per call. It retains the
device's primary context, which torch and the CUDA runtime also use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.cuda_sample import CudaSampler, current
from fastfundus.engines.runtime import INPUT, OUTPUT, Engine
from fastfundus.engines.tensorrt_build import message_logger
from fastfundus.engines.tensorrt_context import ExecutionContext
from fastfundus.errors import BundleError, require
from fastfundus.kernels.jobs import pack_jobs

__all__ = ["CONTEXTS", "TensorRtEngine"]

CONTEXTS = 2
"""Number of batches in flight: one is copied while the other is computed."""


class TensorRtEngine(Engine):
    """Engine that runs a plan on the first GPU.

    A batch up to the size of the largest profile is a single launch. Larger batches are split, and each part is copied
    while the previous one is computed.

    Args:
        trt: the module `tensorrt`.
        plan: plan built by `tensorrt_build.build_plan`.
        size: side of the photos in pixels.
        name: name of the bundle, for messages.
        portable: allow the plan to run the host code that it contains.
        weights: serialised ONNX graph that supplies the weights of a plan without weights.

    Raises:
        MissingDependency: if pycuda is not installed.
        BundleError: if TensorRT cannot load the plan, or the GPU has too little memory.
    """

    def __init__(
        self, trt: Any, plan: bytes, size: int, name: str, *, portable: bool = False, weights: bytes | None = None
    ) -> None:
        require("pycuda", extra="tensorrt")
        import pycuda.driver as cuda

        self._cuda, self._logger = cuda, self._new_logger(trt)
        cuda.init()
        self._context = cuda.Device(0).retain_primary_context()
        self._contexts: list[ExecutionContext] = []
        self._sampler: CudaSampler | None = None
        try:
            with current(self._context, cuda=self._cuda):
                self._open_plan(trt, plan, size, name, portable, weights)
        except cuda.MemoryError as error:
            self._free()
            raise BundleError(
                f"{name}: the GPU has too little memory for the engine ({error}); build it with a smaller --max-batch, "
                "or free GPU memory"
            ) from None
        except BaseException:
            self._free()
            raise
        super().__init__(size, name)

    def _open_plan(self, trt: Any, plan: bytes, size: int, name: str, portable: bool, weights: bytes | None) -> None:
        runtime = trt.Runtime(self._logger)
        runtime.engine_host_code_allowed = portable
        self._check(trt, runtime, plan, name)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(
                f"{name}: TensorRT {trt.__version__} cannot load the engine ({self._logger.last()}); rebuild it here "
                "from its run, or run the float32 graph in the bundle: --backend openvino or onnxruntime"
            )
        if weights is not None:
            refitter = trt.Refitter(engine, self._logger)
            parsed = trt.OnnxParserRefitter(refitter, self._logger).refit_from_bytes(weights)
            if not parsed or not refitter.refit_cuda_engine():
                raise BundleError(f"{name}: its weights do not fit the engine ({self._logger.last()}); rebuild it")
        # Keep references because the execution contexts use them.
        self._runtime, self._engine = runtime, engine
        shapes = [engine.get_tensor_profile_shape(INPUT, p) for p in range(engine.num_optimization_profiles)]
        ranges = [(int(smallest[0]), int(largest[0])) for smallest, _, largest in shapes]
        self._batch = max(largest for _, largest in ranges)
        answer = tuple(engine.get_tensor_shape(OUTPUT))[1:]
        memory = max(int(engine.get_device_memory_size_for_profile_v2(p)) for p in range(len(ranges)))
        photo = (size, size, 3)
        for _ in range(CONTEXTS):
            context = ExecutionContext(
                lambda: self._new_context(trt, engine), self._cuda, ranges, self._batch, photo, answer, memory
            )
            self._contexts.append(context)
            if not context.warm_up(record=self._records):
                raise BundleError(f"{name}: TensorRT cannot run the engine ({self._logger.last()}); rebuild it")

    _records = True
    """Whether usual batch sizes are recorded as CUDA graphs here."""

    def _new_logger(self, trt: Any) -> Any:
        return message_logger(trt)

    def _check(self, trt: Any, runtime: Any, plan: bytes, name: str) -> None:
        """Raise if the plan cannot run on this machine, before it is loaded; overridden where TensorRT can tell."""

    def _new_context(self, trt: Any, engine: Any) -> Any:
        """Return an execution context that uses working memory of the caller."""
        return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def _run(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        rows = [slice(start, start + self._batch) for start in range(0, len(photos), self._batch)]
        return self._run_batches(len(photos), rows, lambda context, part: context.start(photos[part]))

    def _run_on_device(self, photos: Any) -> NDArray[np.float32]:
        start = int(photos.__cuda_array_interface__["data"][0])
        rows = [slice(first, min(first + self._batch, len(photos))) for first in range(0, len(photos), self._batch)]
        photo = 3 * self._size**2

        def begin(context: ExecutionContext, part: slice) -> bool:
            return context.start_device(start + part.start * photo, part.stop - part.start)

        return self._run_batches(len(photos), rows, begin)

    def infer_frames(self, frames: Sequence[NDArray[np.uint8]], geometry: NDArray[np.float32]) -> NDArray[np.float32]:
        """Score decoded photos, which the csrc kernel crops and resizes on the GPU with exact area averaging.

        Args:
            frames: N decoded photos, N at least 1, uint8 [H, W, 3] RGB of any sizes.
            geometry: float32 [N, 2, 3], matrices from pixel positions in the engine's photos to pixel positions in the
                frames.

        Returns:
            See `infer`. The kernel differs from preprocessing on the CPU by half a grey level (docs/kernels.md).

        Raises:
            ValueError: if frames or matrices are invalid; the message names them.
            BundleError: see `infer`.
            FastFundusError: if the kernel is not in the cache folder and there is no nvcc to compile it.
        """
        for number, frame in enumerate(frames):
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise ValueError(f"frames[{number}] must be uint8 [H, W, 3], got {frame.dtype} {frame.shape}")
        if not len(frames) or geometry.shape != (len(frames), 2, 3):
            raise ValueError(f"geometry must be [N, 2, 3] of N >= 1 frames, got {geometry.shape} for {len(frames)}")
        self._require_usable()
        sizes = np.array([frame.shape[:2] for frame in frames], np.int32)
        colour = np.tile(np.eye(4, dtype=np.float32)[:3], (len(frames), 1, 1))
        rows = [slice(start, start + self._batch) for start in range(0, len(frames), self._batch)]

        def start(context: ExecutionContext, part: slice) -> bool:
            lengths = np.array([frame.nbytes for frame in frames[part]], np.int64)
            ends = lengths.cumsum()
            jobs, mode = pack_jobs(
                ends - lengths, sizes[part], geometry[part], colour[part], out_size=self._size, available=int(ends[-1])
            )
            assert self._sampler is not None
            return context.start_frames(self._sampler, frames[part], jobs, mode, self._size)

        if self._sampler is None:
            self._sampler = CudaSampler()
        return self._checked(self._run_batches(len(frames), rows, start))

    def _run_batches(
        self, count: int, rows: list[slice], start: Callable[[ExecutionContext, slice], bool]
    ) -> NDArray[np.float32]:
        """Run the batches on the contexts in turn, and collect each result before its context is reused."""
        result = np.full((count, *self._contexts[0].answer), np.nan, np.float32)
        with current(self._context, cuda=self._cuda):
            waiting: list[tuple[ExecutionContext, slice]] = []
            for number, part in enumerate(rows):
                if len(waiting) == CONTEXTS:
                    context, where = waiting.pop(0)
                    context.collect(result[where])
                context = self._contexts[number % CONTEXTS]
                if not start(context, part):
                    raise BundleError(
                        f"{self.name}: TensorRT could not run the engine ({self._logger.last()}); load it again"
                    )
                waiting.append((context, part))
            for context, where in waiting:
                context.collect(result[where])
        return result

    def _free(self) -> None:
        with current(self._context, cuda=self._cuda):
            for context in self._contexts:
                context.free()
            self._contexts = []
            if self._sampler is not None:
                self._sampler.close()
                self._sampler = None
            self._engine = self._runtime = None
        self._context.detach()
