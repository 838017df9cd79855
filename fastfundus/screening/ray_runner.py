"""Screening on many machines: Ray Data distributes the blocks of a run to workers, which process them as one would."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl

from fastfundus.cluster import cores_of_machines, join_cluster
from fastfundus.engines.archive import pack
from fastfundus.engines.bundle import Bundle
from fastfundus.errors import BundleError, ConfigError, require
from fastfundus.screening.output import Store, parquet_bytes
from fastfundus.screening.pipeline import Timing
from fastfundus.screening.policy import ScreenPolicy
from fastfundus.screening.results import makes_maps, results_table
from fastfundus.screening.run import BlockMaker, rows_of

__all__ = ["ray_blocks"]

_SUMS = ("read", "decode", "engine", "cpu", "photos")


def ray_blocks(address: str) -> BlockMaker:
    """Return a `run.BlockMaker` that screens blocks on a Ray cluster.

    Photos must be on storage that every machine mounts under the same path. The bundle is sent to the workers, each of
    which loads it once; rows are returned to this process, which alone writes to the output. A worker that dies is
    replaced, and its block is screened again.

    Args:
        address: see `join_cluster`.
    """

    def make(
        store: Store, missing: Sequence[int], timing: Timing, on_rows: Callable[[int], None]
    ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        if makes_maps(store.bundle):
            raise ConfigError(
                f"{store.bundle.path}: makes maps, whose masks the worker itself writes; run it without --ray"
            )
        with join_cluster(address) as ray:
            data: Any = require("ray.data", extra="fleet")
            context = data.DataContext.get_current()
            context.enable_progress_bars = False
            context.print_on_execution_start = False
            cores = cores_of_machines(ray)
            each = min(cores)
            workers = min(len(missing), sum(count // each for count in cores))
            packed = ray.put(_packed(store.bundle))
            items = [{"block": block, "photos": pickle.dumps(store.inputs_of(block))} for block in missing]
            began = time.perf_counter()
            done = data.from_items(items, override_num_blocks=len(items)).map(
                _Worker,
                # Wrapped in a list; as a direct argument, every worker start would wait for it.
                fn_constructor_args=([packed], store.identity),
                num_cpus=each,
                compute=data.ActorPoolStrategy(size=workers),
            )
            timing.engines = workers
            for row in done.iter_rows():
                totals = row["timing"]
                for name in _SUMS:
                    setattr(timing, name, getattr(timing, name) + totals[name])
                timing.workers, timing.readers = workers * totals["workers"], workers * totals["readers"]
                timing.wall = time.perf_counter() - began
                rows = pl.read_parquet(io.BytesIO(row["rows"])).to_dicts()
                on_rows(len(rows))
                yield int(row["block"]), rows

    return make


class _Worker:
    """A worker that holds the engine and screens blocks with all cores of its machine."""

    def __init__(self, packed: list[Any], identity: dict[str, Any]) -> None:
        import ray

        self._folder = TemporaryDirectory(prefix="fastfundus-")
        path = Path(self._folder.name) / "bundle.zip"
        path.write_bytes(ray.get(packed[0]))
        # The machine that sent the bundle has decided whether its native code may run.
        self.bundle = Bundle.open(path, allow_native_code=True)
        if self.bundle.fingerprint != identity["bundle"]:
            raise BundleError(
                f"the worker received bundle {self.bundle.fingerprint[:12]}, expected {identity['bundle'][:12]}"
            )
        # If they differ, the run uses the bundle's graph in float32, whose backend may equal that of the engine.
        if (self.bundle.backend, self.bundle.precision) != (identity["backend"], identity["precision"]):
            self.bundle = self.bundle.using(identity["backend"])
        self.policy = ScreenPolicy(**identity["policy"])
        self.engine = self.bundle.load()

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Screen one block."""
        timing = Timing()
        photos = pickle.loads(item["photos"])
        rows = list(rows_of(photos, self.bundle, self.policy, timing, engine=self.engine))
        totals = {name: getattr(timing, name) for name in (*_SUMS, "workers", "readers")}
        return {"block": item["block"], "rows": parquet_bytes(results_table(rows, self.bundle)), "timing": totals}


def _packed(bundle: Bundle) -> bytes:
    with TemporaryDirectory(prefix="fastfundus-") as folder:
        file = Path(folder) / "bundle.zip"
        pack(bundle.folder, file)
        return file.read_bytes()
