"""Runs a TensorRT plan without torch: pinned buffers, two streams, one CUDA graph a profile, no allocation a call.

The device's primary context is retained, the one that torch and the CUDA runtime use too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.cuda_graph import CudaGraph
from fastfundus.engines.runtime import Engine
from fastfundus.engines.tensorrt_build import message_logger
from fastfundus.errors import BundleError, require

__all__ = ["SLOTS", "TensorRtEngine"]

SLOTS = 2
"""Batches on their way at once: one is copied while the other is computed."""
_INPUT, _OUTPUT = "photos", "probabilities"


class TensorRtEngine(Engine):
    """A plan on the first GPU.

    A batch of up to the largest profile is one launch; larger ones are dealt out, the next copied while one computes.

    Args:
        trt: the module `tensorrt`.
        plan: of `tensorrt_build.build_plan`.
        size: side of the photos in pixels.
        name: of the bundle, for messages.
        portable: the plan brings code of its own that must be run.
        weights: ONNX that a plan without weights gets them from.

    Raises:
        MissingDependency: pycuda is not installed.
        BundleError: TensorRT refuses the plan, or the GPU has too little memory.
    """

    def __init__(
        self, trt: Any, plan: bytes, size: int, name: str, *, portable: bool = False, weights: bytes | None = None
    ) -> None:
        require("pycuda", extra="tensorrt")
        import pycuda.driver as cuda

        self._cuda, self._logger = cuda, message_logger(trt)
        cuda.init()
        self._context = cuda.Device(0).retain_primary_context()
        self._slots: list[_Slot] = []
        try:
            with self._current():
                self._open_plan(trt, plan, size, name, portable, weights)
        except cuda.MemoryError as error:
            self._release()
            raise BundleError(
                f"{name}: the GPU has too little memory for it ({error}); build it with a smaller --max-batch, or free "
                "the GPU"
            ) from None
        except BaseException:
            self._release()
            raise
        super().__init__(size, name)

    def _open_plan(self, trt: Any, plan: bytes, size: int, name: str, portable: bool, weights: bytes | None) -> None:
        runtime = trt.Runtime(self._logger)
        runtime.engine_host_code_allowed = portable
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(
                f"{name}: TensorRT {trt.__version__} cannot load the engine ({self._logger.last()}); build it here "
                "again from its run, or run the graph inside it in float32: --backend openvino or onnxruntime"
            )
        if weights is not None:
            refitter = trt.Refitter(engine, self._logger)
            parsed = trt.OnnxParserRefitter(refitter, self._logger).refit_from_bytes(weights)
            if not parsed or not refitter.refit_cuda_engine():
                raise BundleError(f"{name}: its weights do not fit the engine ({self._logger.last()}); build it again")
        # Kept alive: contexts use them.
        self._runtime, self._engine = runtime, engine
        shapes = [engine.get_tensor_profile_shape(_INPUT, p) for p in range(engine.num_optimization_profiles)]
        ranges = [(int(smallest[0]), int(largest[0])) for smallest, _, largest in shapes]
        self._batch = max(largest for _, largest in ranges)
        answer = tuple(engine.get_tensor_shape(_OUTPUT))[1:]
        memory = max(int(engine.get_device_memory_size_for_profile_v2(p)) for p in range(len(ranges)))
        photo = (size, size, 3)
        self._slots = [_Slot(trt, self._cuda, engine, ranges, self._batch, photo, answer, memory) for _ in range(SLOTS)]
        for slot in self._slots:
            if not slot.record():
                raise BundleError(f"{name}: TensorRT cannot run the engine ({self._logger.last()}); build it again")

    def _run(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        result = np.full((len(photos), *self._slots[0].answer), np.nan, np.float32)
        with self._current():
            waiting: list[tuple[_Slot, slice]] = []
            for number, start in enumerate(range(0, len(photos), self._batch)):
                slot, rows = self._slots[number % SLOTS], slice(start, min(start + self._batch, len(photos)))
                if len(waiting) == SLOTS:
                    done, where = waiting.pop(0)
                    done.collect(result[where])
                if not slot.start(photos[rows]):
                    raise BundleError(
                        f"{self.name}: TensorRT could not run the engine ({self._logger.last()}); load it again"
                    )
                waiting.append((slot, rows))
            for slot, rows in waiting:
                slot.collect(result[rows])
        return result

    def _free(self) -> None:
        self._release()

    def _release(self) -> None:
        with self._current():
            for slot in self._slots:
                slot.free()
            self._slots = []
            self._engine = self._runtime = None
        self._context.detach()

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make the context this thread's, and put back what was there."""
        self._context.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()


class _Slot:
    """Buffers, a stream, and for each profile an execution context and a recorded graph of its largest batch."""

    def __init__(
        self,
        trt: Any,
        cuda: Any,
        engine: Any,
        ranges: list[tuple[int, int]],
        batch: int,
        photo: tuple[int, ...],
        answer: tuple[int, ...],
        memory: int,
    ) -> None:
        self._cuda, self._ranges, self._photo, self.answer = cuda, ranges, photo, answer
        self._photos = cuda.pagelocked_empty((batch, *photo), np.uint8)
        self._answers = cuda.pagelocked_empty((batch, *answer), np.float32)
        self._graphs: dict[int, CudaGraph] = {}
        self._contexts: list[Any] = []
        self._device_photos = cuda.mem_alloc(self._photos.nbytes)
        self._device_answers = cuda.mem_alloc(self._answers.nbytes)
        # Profiles of one slot never run at once: they share what the layers work in.
        self._memory = cuda.mem_alloc(max(1, memory))
        self._stream = cuda.Stream()
        for number in range(len(ranges)):
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            context.set_device_memory(int(self._memory), memory)
            context.set_optimization_profile_async(number, self._stream.handle)
            context.set_tensor_address(_INPUT, int(self._device_photos))
            context.set_tensor_address(_OUTPUT, int(self._device_answers))
            self._contexts.append(context)
        self._stream.synchronize()

    def record(self) -> bool:
        """Record the largest batch of each profile, so that it is launched as one; whether all of them run."""
        self._photos[:] = 0
        for number, (_, largest) in enumerate(self._ranges):
            # Once as it is: the first run of a shape does work that must not be recorded.
            if not self._enqueue(number, largest):
                return False
            self._stream.synchronize()
            graph = CudaGraph()
            with graph.recorded(self._stream.handle):
                self._enqueue(number, largest)
            self._graphs[largest] = graph
        return True

    def start(self, photos: NDArray[np.uint8]) -> bool:
        """Begin a batch; returns before it is done, False where TensorRT refuses."""
        count = len(photos)
        self._photos[:count] = photos
        if count in self._graphs:
            self._graphs[count].launch(self._stream.handle)
            return True
        number = next(n for n, (smallest, largest) in enumerate(self._ranges) if smallest <= count <= largest)
        return self._enqueue(number, count)

    def collect(self, into: NDArray[np.float32]) -> None:
        """Wait for the batch that was begun."""
        self._stream.synchronize()
        into[:] = self._answers[: len(into)]

    def _enqueue(self, profile: int, count: int) -> bool:
        context, stream = self._contexts[profile], self._stream
        context.set_input_shape(_INPUT, (count, *self._photo))
        self._cuda.memcpy_htod_async(self._device_photos, self._photos[:count], stream)
        done = bool(context.execute_async_v3(stream.handle))
        self._cuda.memcpy_dtoh_async(self._answers[:count], self._device_answers, stream)
        return done

    def free(self) -> None:
        """Free everything on the device; the context must be current."""
        self._stream.synchronize()
        for graph in self._graphs.values():
            graph.free()
        self._graphs, self._contexts = {}, []
        for memory in (self._device_photos, self._device_answers, self._memory):
            memory.free()
        self._photos = self._answers = np.empty(0)
