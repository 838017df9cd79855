"""Resources for one batch in flight in a TensorRT engine: buffers, stream, recorded graphs. Does not need torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastfundus.engines.cuda_graph import CudaGraph
from fastfundus.engines.cuda_sample import CudaSampler
from fastfundus.engines.runtime import INPUT, OUTPUT

__all__ = ["RECORDED", "ExecutionContext"]

RECORDED = (1, 8, 16, 32, 64)
"""Batch sizes that are recorded besides the largest of each profile: `screen` sends 16, DALI 32, the server to 32."""
_REPLAY = 1e-4
"""Largest difference of a replayed answer: layers that add by atomics add in another order each time."""


class ExecutionContext:
    """Buffers and a stream, and for each profile an execution context and recorded graphs of usual batch sizes.

    The device's context must be current in every call.

    Args:
        create: returns an execution context of the engine that uses working memory of the caller.
        cuda: the module `pycuda.driver`.
        ranges: smallest and largest batch size of each profile.
        batch: largest batch size of all profiles.
        photo: shape of one photo.
        answer: shape of the output for one photo.
        memory: bytes of working memory that the layers need, the maximum over all profiles.
    """

    def __init__(
        self,
        create: Callable[[], Any],
        cuda: Any,
        ranges: list[tuple[int, int]],
        batch: int,
        photo: tuple[int, ...],
        answer: tuple[int, ...],
        memory: int,
    ) -> None:
        self._cuda, self._ranges, self._photo, self.answer = cuda, ranges, photo, answer
        self._create, self._needed = create, memory
        self._photos = cuda.pagelocked_empty((batch, *photo), np.uint8)
        self._answers = cuda.pagelocked_empty((batch, *answer), np.float32)
        self._graphs: dict[int, CudaGraph] = {}
        self._recorded: list[Any] = []
        self._device_photos = cuda.mem_alloc(self._photos.nbytes)
        self._device_answers = cuda.mem_alloc(self._answers.nbytes)
        # Profiles of one context never run concurrently, so they share working memory.
        self._memory = cuda.mem_alloc(max(1, memory))
        self._stream = cuda.Stream()
        self._frames = self._jobs = np.empty(0, np.uint8)
        self._device_frames: Any = None
        self._device_jobs: Any = None
        self._contexts = [self._new(number) for number in range(len(ranges))]

    def _new(self, profile: int) -> Any:
        """Return an execution context for a profile."""
        context = self._create()
        context.set_device_memory(int(self._memory), self._needed)
        context.set_optimization_profile_async(profile, self._stream.handle)
        context.set_tensor_address(INPUT, int(self._device_photos))
        context.set_tensor_address(OUTPUT, int(self._device_answers))
        self._stream.synchronize()
        return context

    def warm_up(self, *, record: bool) -> bool:
        """Run the largest batch of each profile, and record usual ones as graphs; return whether all profiles run."""
        self._photos[:] = np.random.default_rng(0).integers(0, 256, self._photos.shape, np.uint8)
        for number, (smallest, largest) in enumerate(self._ranges):
            if not self._enqueue(self._contexts[number], largest):
                return False
            self._stream.synchronize()
            for count in sorted({largest, *RECORDED}) if record else ():
                if smallest <= count <= largest:
                    self._record(number, count)
        return True

    def _record(self, profile: int, count: int) -> None:
        """Record a batch as one graph, if replaying it gives the answers of the same photos without it.

        A graph keeps what its execution context had set: it has one of its own, which no other batch uses.
        """
        context, graph = self._new(profile), CudaGraph()
        # Run once without recording: the first run of a shape does work that must not be recorded.
        if not self._enqueue(context, count):
            return
        self._stream.synchronize()
        expected = self._answers[:count].copy()
        with graph.recorded(self._stream.handle):
            recorded = self._enqueue(context, count)
        if recorded:
            self._answers[:count] = np.nan
            graph.launch(self._stream.handle)
            self._stream.synchronize()
            if np.allclose(self._answers[:count], expected, rtol=0, atol=_REPLAY):
                self._graphs[count] = graph
                self._recorded.append(context)
                return
        # Such a batch is enqueued like any other size.
        graph.free()

    def start(self, photos: NDArray[np.uint8]) -> bool:
        """Start a batch asynchronously; return False if TensorRT cannot run it."""
        count = len(photos)
        self._photos[:count] = photos
        if count in self._graphs:
            self._graphs[count].launch(self._stream.handle)
            return True
        return self._enqueue(self._context_of(count), count)

    def start_frames(
        self, sampler: CudaSampler, frames: Sequence[NDArray[np.uint8]], jobs: NDArray[Any], mode: int, size: int
    ) -> bool:
        """Start a batch of frames, which the kernel converts to the engine's photos; see `start`."""
        used = sum(frame.nbytes for frame in frames)
        if used > len(self._frames):
            # Grows to the largest batch seen so far and never shrinks.
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
        return self._enqueue(self._context_of(len(jobs)), len(jobs), copy=False)

    def start_device(self, photos: int, count: int) -> bool:
        """Start a batch of photos at a device address; see `start`."""
        size = count * self._photos[0].nbytes
        self._cuda.memcpy_dtod_async(int(self._device_photos), photos, size, self._stream)
        return self._enqueue(self._context_of(count), count, copy=False)

    def _context_of(self, count: int) -> Any:
        pairs = zip(self._contexts, self._ranges, strict=True)
        return next(context for context, (smallest, largest) in pairs if smallest <= count <= largest)

    def collect(self, into: NDArray[np.float32]) -> None:
        """Wait for the current batch and copy its outputs."""
        self._stream.synchronize()
        into[:] = self._answers[: len(into)]

    def _enqueue(self, context: Any, count: int, *, copy: bool = True) -> bool:
        stream = self._stream
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
        self._graphs, self._contexts, self._recorded = {}, [], []
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
