"""Execution of a study's runs in separate processes, so that one crash spares the others: locally or on Ray."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from fastfundus.cluster import cores_of_machines, join_cluster
from fastfundus.config import TrainConfig
from fastfundus.data.joined_cache import open_caches
from fastfundus.errors import ConfigError, FastFundusError
from fastfundus.evaluation.operating_point import fit_operating_point
from fastfundus.machine import usable_cores
from fastfundus.photo.memory import keep_memory
from fastfundus.training.interrupt import Interrupted, stop_requested
from fastfundus.training.run import Run
from fastfundus.training.trainer import Trainer

__all__ = ["Job", "Runner", "local_runner", "ray_runner"]

_STOPPED = "stopped"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Job:
    """A run to be trained, fitted and measured; plain data that can be sent between processes."""

    folder: Path
    caches: tuple[Path, ...]
    config: dict[str, Any] = field(compare=False)


Runner = Callable[[Sequence[Job], Callable[[Job], None]], Iterator[tuple[Job, str]]]
"""Runs jobs, calling the callback when one begins; yields each finished job with its error, empty on success.

Raises `Interrupted` on SIGINT or SIGTERM; unfinished jobs can be resumed."""


def _do(job: Job) -> str:
    """Run or resume a job; return its error, empty on success."""
    note = job.folder / "error.txt"
    try:
        cache = open_caches(*job.caches)
        config = TrainConfig.from_dict(job.config)
        Trainer(cache, job.folder, config, resume=(job.folder / "last.ckpt").is_file()).fit()
        fit_operating_point(Run.open(job.folder), cache)
    except Interrupted:
        return _STOPPED
    except Exception as error:
        # One failed run must not stop the others; keep the full traceback of unexpected errors.
        job.folder.mkdir(parents=True, exist_ok=True)
        known = isinstance(error, FastFundusError)
        note.write_text(f"{error}\n" if known else traceback.format_exc(), encoding="utf-8")
        return str(error) if known else f"{type(error).__name__}: {error}"
    note.unlink(missing_ok=True)
    return ""


def _serve(pipe: Connection, parent: int, threads: int, number: int) -> None:
    """Run jobs from the pipe until it is closed or the parent process is gone."""
    _take_gpu(number)
    # Ctrl-C reaches all processes of a terminal: training handles it, and everything else is up to the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # If the parent is killed, no run may continue writing.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    torch.set_num_threads(threads)
    keep_memory()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            pipe.send(_do(pipe.recv()))


def _take_gpu(number: int) -> None:
    """Let this process see one GPU only, before it uses any: every run takes the first that it sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(gpu) for gpu in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]


class _Worker:
    """A worker process and the parent's end of its pipe."""

    def __init__(self, threads: int, number: int) -> None:
        # A forked process would lack torch's threads.
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, os.getpid(), threads, number))
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def begin(self, job: Job) -> None:
        self.job = job
        self.pipe.send(job)

    def take(self) -> tuple[Job, str]:
        """Return the job and its error; call it only when the pipe is ready."""
        job = self.job
        assert job is not None
        self.job = None
        try:
            return job, self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
            return job, f"its process ended {how}; if memory ran out, lower loop.batch_size or the number of --jobs"

    def close(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


@contextlib.contextmanager
def local_runner(count: int) -> Iterator[Runner]:
    """Provide a runner for this machine with a fixed number of concurrent jobs.

    Args:
        count: number of concurrent jobs, which share the cores equally and are dealt to the GPUs. A machine with one
            GPU is fastest with one job.

    Raises:
        ConfigError: `count` is less than 1 or exceeds the number of cores.
    """
    cores = usable_cores()
    if not 1 <= count <= cores:
        raise ConfigError(f"--jobs must be 1 to {cores}, the number of cores, got {count}")
    threads = torch.get_num_threads() if count == 1 else cores // count
    workers: list[_Worker] = []

    def run(jobs: Sequence[Job], begins: Callable[[Job], None]) -> Iterator[tuple[Job, str]]:
        left = deque(jobs)
        with stop_requested() as stop:
            while len(workers) < min(count, len(jobs)):
                workers.append(_Worker(threads, len(workers)))
            while left or any(worker.job for worker in workers):
                for place, worker in enumerate(workers):
                    if left and worker.job is None and not stop.is_set():
                        if not worker.process.is_alive():
                            worker.close()
                            worker = workers[place] = _Worker(threads, place)
                        worker.begin(left.popleft())
                        begins(worker.job)  # type: ignore[arg-type]
                busy = {worker.pipe: worker for worker in workers if worker.job}
                ready = wait(list(busy), timeout=0.5)
                if stop.is_set():
                    for worker in busy.values():
                        worker.process.terminate()
                    for worker in busy.values():
                        worker.process.join()
                    raise Interrupted("stopped")
                for pipe in ready:
                    yield busy[pipe].take()  # type: ignore[index]

    try:
        yield run
    finally:
        for worker in workers:
            worker.close()


@contextlib.contextmanager
def ray_runner(address: str) -> Iterator[Runner]:
    """Provide a runner for a Ray cluster: one job per GPU, or one job per machine if there are no GPUs.

    Caches and the study must be on storage that every machine can access under the same path.

    Args:
        address: see `join_cluster`.
    """
    with join_cluster(address) as ray:
        gpus = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
        each = max(1, min(cores_of_machines(ray)) // max(1, *gpus))
        remote = ray.remote(num_cpus=each, num_gpus=1 if any(gpus) else 0, max_retries=0)(_do_there)

        def run(jobs: Sequence[Job], begins: Callable[[Job], None]) -> Iterator[tuple[Job, str]]:
            with stop_requested() as stop:
                running = {}
                for job in jobs:
                    running[remote.remote(job, each)] = job
                    begins(job)
                while running:
                    ready, _ = ray.wait(list(running), timeout=0.5)
                    if stop.is_set():
                        raise Interrupted("stopped")
                    for reference in ready:
                        try:
                            outcome = ray.get(reference)
                        except ray.exceptions.RayError as error:
                            outcome = f"its process ended ({str(error).splitlines()[0]})"
                        yield running.pop(reference), outcome

        yield run


def _do_there(job: Job, threads: int) -> str:
    torch.set_num_threads(threads)
    keep_memory()
    return _do(job)
