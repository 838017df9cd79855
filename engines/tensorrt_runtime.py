"""Runs a TensorRT plan without torch: pinned buffers, two streams, one CUDA graph a profile, no allocation a call.

The device's primary context is retained, the one that torch and the CUDA runtime use too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.cuda_graph import CudaGraph
from fastfundus.engines.cuda_sample import CudaSampler
from fastfundus.engines.runtime import INPUT, OUTPUT, Engine
from fastfundus.engines.tensorrt_build import message_logger
from fastfundus.errors import BundleError, require
from fastfundus.kernels.jobs import pack_jobs

__all__ = ["SLOTS", "TensorRtEngine"]

SLOTS = 2
"""Batches on their way at once: one is copied while the other is computed."""


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
        self._sampler: CudaSampler | None = None
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
        shapes = [engine.get_tensor_profile_shape(INPUT, p) for p in range(engine.num_optimization_profiles)]
        ranges = [(int(smallest[0]), int(largest[0])) for smallest, _, largest in shapes]
        self._batch = max(largest for _, largest in ranges)
        answer = tuple(engine.get_tensor_shape(OUTPUT))[1:]
        memory = max(int(engine.get_device_memory_size_for_profile_v2(p)) for p in range(len(ranges)))
        photo = (size, size, 3)
        for _ in range(SLOTS):
            slot = _Slot(trt, self._cuda, engine, ranges, self._batch, photo, answer, memory)
            self._slots.append(slot)
            if not slot.record():
                raise BundleError(f"{name}: TensorRT cannot run the engine ({self._logger.last()}); build it again")

    def _run(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        rows = [slice(start, start + self._batch) for start in range(0, len(photos), self._batch)]
        return self._dealt(len(photos), rows, lambda slot, part: slot.start(photos[part]))

    def infer_frames(self, frames: Sequence[NDArray[np.uint8]], geometry: NDArray[np.float32]) -> NDArray[np.float32]:
        """Score decoded photos, which csrc's kernel cuts and resizes on the GPU, area-exact.

        Args:
            frames: N of them, at least 1, uint8 [H, W, 3] RGB, each of its own size.
            geometry: float32 [N, 2, 3], positions of the engine's photos to positions of the frames, in pixels.

        Returns:
            As `infer`. The kernel differs from the CPU's way by half a grey level (docs/kernels.md).

        Raises:
            ValueError: frames or matrices are not allowed; the message names them.
            BundleError: as `infer`.
            FastFundusError: there is no nvcc to compile the kernel, and it is not in the cache folder.
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

        def start(slot: _Slot, part: slice) -> bool:
            lengths = np.array([frame.nbytes for frame in frames[part]], np.int64)
            ends = lengths.cumsum()
            jobs, mode = pack_jobs(
                ends - lengths, sizes[part], geometry[part], colour[part], out_size=self._size, available=int(ends[-1])
            )
            assert self._sampler is not None
            return slot.start_frames(self._sampler, frames[part], jobs, mode, self._size)

        if self._sampler is None:
            self._sampler = CudaSampler()
        return self._checked(self._dealt(len(frames), rows, start))

    def _dealt(self, count: int, rows: list[slice], start: Callable[[_Slot, slice], bool]) -> NDArray[np.float32]:
        """Start batch after batch on the slots in turn, and collect each before its slot is needed again."""
        result = np.full((count, *self._slots[0].answer), np.nan, np.float32)
        with self._current():
            waiting: list[tuple[_Slot, slice]] = []
            for number, part in enumerate(rows):
                if len(waiting) == SLOTS:
                    slot, where = waiting.pop(0)
                    slot.collect(result[where])
                slot = self._slots[number % SLOTS]
                if not start(slot, part):
                    raise BundleError(
                        f"{self.name}: TensorRT could not run the engine ({self._logger.last()}); load it again"
                    )
                waiting.append((slot, part))
            for slot, where in waiting:
                slot.collect(result[where])
        return result

    def _free(self) -> None:
        self._release()

    def _release(self) -> None:
        with self._current():
            for slot in self._slots:
                slot.free()
            self._slots = []
            if self._sampler is not None:
                self._sampler.close()
                self._sampler = None
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
        self._frames = self._jobs = np.empty(0, np.uint8)
        self._device_frames: Any = None
        self._device_jobs: Any = None
        for number in range(len(ranges)):
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            context.set_device_memory(int(self._memory), memory)
            context.set_optimization_profile_async(number, self._stream.handle)
            context.set_tensor_address(INPUT, int(self._device_photos))
            context.set_tensor_address(OUTPUT, int(self._device_answers))
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
        return self._enqueue(self._profile_of(count), count)

    def start_frames(
        self, sampler: CudaSampler, frames: Sequence[NDArray[np.uint8]], jobs: NDArray[Any], mode: int, size: int
    ) -> bool:
        """Begin a batch of frames, which the kernel turns into the engine's photos; as `start`."""
        used = sum(frame.nbytes for frame in frames)
        if used > len(self._frames):
            # Grows to the largest batch that was ever met, and stays.
            self._free_frames()
            self._frames = self._cuda.pagelocked_empty(used, np.uint8)
            self._jobs = self._cuda.pagelocked_empty(len(self._photos) * jobs.itemsize, np.uint8)
            self._device_frames = self._cuda.mem_alloc(used)
            self._device_jobs = self._cuda.mem_alloc(self._jobs.nbytes)
        np.concatenate([frame.reshape(-1) for frame in frames], out=self._frames[:used])
        packed = self._jobs[: jobs.nbytes]
        packed[:] = jobs.view(np.uint8)
        self._cuda.memcpy_htod_async(self._device_frames, self._frames[:used], self._stream)
        self._cuda.memcpy_htod_async(self._device_jobs, packed, self._stream)
        sampler.launch(
            int(self._device_frames), int(self._device_jobs), len(jobs), int(self._device_photos), size, "u8", mode,
            self._stream,
        )  # fmt: skip
        return self._enqueue(self._profile_of(len(jobs)), len(jobs), copy=False)

    def _profile_of(self, count: int) -> int:
        return next(n for n, (smallest, largest) in enumerate(self._ranges) if smallest <= count <= largest)

    def collect(self, into: NDArray[np.float32]) -> None:
        """Wait for the batch that was begun."""
        self._stream.synchronize()
        into[:] = self._answers[: len(into)]

    def _enqueue(self, profile: int, count: int, *, copy: bool = True) -> bool:
        context, stream = self._contexts[profile], self._stream
        context.set_input_shape(INPUT, (count, *self._photo))
        if copy:
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
        self._free_frames()
        for memory in (self._device_photos, self._device_answers, self._memory):
            memory.free()
        self._photos = self._answers = np.empty(0)

    def _free_frames(self) -> None:
        for memory in (self._device_frames, self._device_jobs):
            if memory is not None:
                memory.free()
        self._device_frames = self._device_jobs = None
        self._frames = self._jobs = np.empty(0, np.uint8)
