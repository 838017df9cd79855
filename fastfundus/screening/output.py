"""The results folder of a screening run: crash-safe, resumable with identical bytes, protected against mixing runs.

run.json                  identity of the run; "finished" is set once everything below is complete
results.parquet, .csv     one row per input, in the order of the listing; one row group per block
eyes.csv, patients.csv    results aggregated by eye and by patient
audit.jsonl               see `audit`
masks/                    masks of bundles that produce maps
progress/                 during the run: the list of inputs, and one file of finished rows per block
"""

from __future__ import annotations

import io
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from fastfundus import __version__
from fastfundus.csv_cells import csv_text
from fastfundus.data.source import SourceList
from fastfundus.engines.bundle import Bundle
from fastfundus.errors import ConfigError, DataError
from fastfundus.files import atomic_write, read_small
from fastfundus.photo.file import missing_reason
from fastfundus.records import SourcePhoto
from fastfundus.screening.pipeline import BLOCK
from fastfundus.screening.policy import ScreenPolicy
from fastfundus.screening.results import eye_table, patient_table, results_table

__all__ = ["FILES", "Store", "has_inputs", "input_stamp", "parquet_bytes"]

FILES = ("results.csv", "results.parquet", "eyes.csv", "patients.csv", "report.html", "audit.jsonl", "run.json")
"""Files of a finished results folder, besides masks."""
_FOLDERS = ("progress", "masks")
_SOURCE: dict[str, Any] = {
    "name": pl.String, "patient": pl.String, "patient_known": pl.Boolean, "eye": pl.String, "camera": pl.String,
    "issue": pl.String, "patient_by_name": pl.Boolean, "eye_by_name": pl.Boolean,
}  # fmt: skip
_INPUTS = {**_SOURCE, "path": pl.Binary, "bytes": pl.Int64, "mtime_ns": pl.Int64}


def has_inputs(output: Path) -> bool:
    """Return whether a results folder has the inputs of a run that is not finished."""
    return (output / "progress" / "listing.json").is_file()


def input_stamp(path: Path) -> tuple[int, int]:
    """Return the size in bytes and the modification time in ns of a file, or (-1, -1) if it does not exist."""
    try:
        facts = path.stat()
    except OSError:
        return -1, -1
    return facts.st_size, facts.st_mtime_ns


def _put(path: Path, data: bytes) -> None:
    with atomic_write(path) as partial:
        partial.write_bytes(data)


_OPTIONS = {"signed_by": "--require-signature"}


class Store:
    """A new or resumed output folder. The caller must hold its lock.

    Args:
        output: the folder; created if it does not exist.
        listing: the current inputs.
        sources: the paths given by the user.
        bundle: the bundle that screens them.
        policy: the policy that makes the decisions.
        mirror: second file for the audit log; None writes none.
        decode: the decoder: "cpu" or "dali", whose grey levels differ slightly.
        resume: resume an unfinished run.
        overwrite: delete the output of an earlier run.

    Raises:
        ConfigError: the folder contains a different run, or one that needs `resume` or `overwrite`.
        DataError: the files of an earlier run cannot be read.
        OSError: the folder cannot be written to.
    """

    def __init__(
        self,
        output: Path,
        listing: SourceList,
        *,
        sources: Iterable[Path],
        bundle: Bundle,
        policy: ScreenPolicy,
        decode: str = "cpu",
        resume: bool = False,
        overwrite: bool = False,
        mirror: Path | None = None,
    ) -> None:
        self.output, self.bundle, self.policy = output, bundle, policy
        self._mirror = None if mirror is None else str(mirror.absolute())
        self.identity = {
            "fastfundus": __version__,
            "bundle": bundle.fingerprint,
            "backend": bundle.backend,
            "precision": bundle.precision,
            "spec": bundle.spec.fingerprint,
            "decode": decode,
            "policy": policy.to_dict(),
            "sources": [str(source.absolute()) for source in sources],
            "signed_by": bundle.signed_by,
        }
        output.mkdir(parents=True, exist_ok=True)
        self.finished = False
        earlier = self._earlier()
        if earlier is not None and resume and not overwrite:
            self._same_as(earlier["identity"])
            if earlier["mirror"] is not None and mirror is None:
                raise ConfigError(
                    f"{output}: its audit log is mirrored to {earlier['mirror']}; add --audit-mirror with that file"
                )
            self.finished = earlier["finished"] is not None
        else:
            self._make_room(earlier, overwrite)
        self._blocks = output / "progress" / "blocks"
        if self.finished:
            return
        self.photos = listing.photos
        """The inputs, in the order of the results: photos of folders that only a resumed run could list come last."""
        if earlier is None or not resume or overwrite or earlier["mirror"] != self._mirror:
            self._note(None)
        self._list_inputs(listing)

    def _list_inputs(self, listing: SourceList) -> None:
        """Store the inputs, or take those that an earlier session stored and add what it could not list."""
        folder = self.output / "progress"
        self._blocks.mkdir(parents=True, exist_ok=True)
        inputs, state = folder / "inputs.parquet", folder / "listing.json"
        lost = listing.lost
        if not has_inputs(self.output):
            table = _pack(listing.photos)
            _put(inputs, parquet_bytes(table))
            self.photos = [
                photo if photo.issue == issue else replace(photo, issue=issue)
                for photo, issue in zip(listing.photos, table["issue"], strict=True)
            ]
            self._segments = [len(listing.photos)]
        else:
            try:
                noted = json.loads(state.read_text(encoding="utf-8"))
                table = pl.read_parquet(inputs)
                # After a crash between the two files, `state` does not know the last photos of the table yet.
                rest = len(table) - sum(noted["segments"])
                self._segments = [*noted["segments"], *([rest] if rest else [])]
                self.photos = _unpack(table)
            except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
                raise DataError(
                    f"is damaged ({str(error).splitlines()[0]}); start the run again with --overwrite", path=folder
                ) from None
            known = {photo.path for photo in self.photos}
            new = (photo for photo in listing.photos if Path(os.path.abspath(photo.path)) not in known)
            found = list(new) if noted["lost"] else []
            if found:
                more = _pack(found)
                _put(inputs, parquet_bytes(pl.concat([table, more], how="diagonal")))
                self.photos += _unpack(more)
                self._segments.append(len(found))
            if not listing.photos:
                # The sources themselves are gone: that makes nothing that appears in them later an input.
                lost = noted["lost"]
        text = json.dumps({"segments": self._segments, "lost": lost})
        _put(state, text.encode())
        self._number_blocks()
        for block in range(self.blocks):
            # A damaged block is screened again; its rows will be the same.
            if self.has(block) and not self._is_sound(block):
                self._file(block).unlink()

    def _number_blocks(self) -> None:
        ends = list(accumulate(self._segments, initial=0))
        self._starts = [
            start for first, end in pairwise(ends) for start in range(first, end, BLOCK)
        ]  # fmt: skip

    def _earlier(self) -> dict[str, Any] | None:
        path = self.output / "run.json"
        if not path.is_file():
            return None
        try:
            state = json.loads(read_small(path))
            identity, mirror = dict(state["identity"]), state.get("mirror")
            if not isinstance(mirror, str | None):
                raise TypeError(mirror)
            return {"identity": identity, "finished": state["finished"], "mirror": mirror}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise DataError("was not written by a screening run; choose another --output", path=path) from None

    def _same_as(self, earlier: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if earlier.get(name) != value:
                raise ConfigError(
                    f"{self.output}: was started with another {_OPTIONS.get(name, name)} ({earlier.get(name)}, now "
                    f"{value}); resume with the original settings, or choose another --output"
                )

    def _make_room(self, earlier: dict[str, Any] | None, overwrite: bool) -> None:
        kept = [name for name in (*FILES, *_FOLDERS) if (self.output / name).exists()]
        if not kept:
            return
        if not overwrite:
            if earlier is not None and earlier["finished"] is None:
                raise ConfigError(
                    f"{self.output} contains an unfinished run; add --resume to continue it, or --overwrite to restart"
                )
            raise ConfigError(f"{self.output} already contains {kept[0]}; add --overwrite, or choose another --output")
        # Remove run.json last: until then it identifies the files as those of a run.
        for name in sorted(kept, key="run.json".__eq__):
            path = self.output / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _note(self, finished: str | None) -> None:
        state = {"identity": self.identity, "mirror": self._mirror, "finished": finished}
        _put(self.output / "run.json", (json.dumps(state, indent=1, ensure_ascii=False) + "\n").encode())

    @property
    def blocks(self) -> int:
        """Number of blocks of inputs."""
        return len(self._starts)

    def start_of(self, block: int) -> int:
        """Return the position of the first input of a block."""
        return self._starts[block]

    def block_at(self, position: int) -> int:
        """Return the block that contains the input at a position."""
        return bisect_right(self._starts, position) - 1

    def listings_of(self, blocks: Iterable[int]) -> list[list[int]]:
        """Divide blocks, in order, by the listing that their inputs come from: only its last block may be short."""
        ends = list(accumulate(self._segments))
        return [list(group) for _, group in groupby(blocks, lambda block: bisect_right(ends, self._starts[block]))]

    def inputs_of(self, block: int) -> list[SourcePhoto]:
        """Return the inputs of a block."""
        end = self._starts[block + 1] if block + 1 < len(self._starts) else len(self.photos)
        return self.photos[self._starts[block] : end]

    def has(self, block: int) -> bool:
        """Return whether the rows of a block are stored."""
        return self._file(block).is_file()

    def add(self, block: int, rows: list[dict[str, Any]]) -> None:
        """Store the rows of a block durably."""
        assert [row["path"] for row in rows] == [photo.name for photo in self.inputs_of(block)]
        _put(self._file(block), parquet_bytes(results_table(rows, self.bundle)))

    def _is_sound(self, block: int) -> bool:
        try:
            names = pl.read_parquet(self._file(block))["path"].to_list()
        except (OSError, pl.exceptions.PolarsError):
            return False
        return names == [photo.name for photo in self.inputs_of(block)]

    def rows_of(self, block: int) -> list[dict[str, Any]]:
        """Return the rows of a stored block."""
        return pl.read_parquet(self._file(block)).to_dicts()

    def _file(self, block: int) -> Path:
        return self._blocks / f"{block:08d}.parquet"

    def stamps(self) -> Iterator[tuple[int, int]]:
        """Yield the `input_stamp` of each input, recorded before the first one was read."""
        columns = ["bytes", "mtime_ns"]
        yield from pl.read_parquet(self.output / "progress" / "inputs.parquet", columns=columns).iter_rows()

    def merge(self) -> pl.DataFrame:
        """Write the results of all blocks and the eye and patient tables, and return the results."""
        files = [self._file(block) for block in range(self.blocks)]
        schema = pq.read_schema(files[0])
        with (
            atomic_write(self.output / "results.parquet") as partial,
            pq.ParquetWriter(partial, schema, compression="zstd") as writer,
        ):
            for file in files:
                # `read_table` would import pandas, which takes a third of a second.
                writer.write_table(pq.ParquetFile(file).read(), row_group_size=BLOCK)
        with atomic_write(self.output / "results.csv") as partial, partial.open("wb") as csv:
            for number, file in enumerate(files):
                csv.write(csv_text(pl.read_parquet(file), header=number == 0).encode())
        results = pl.read_parquet(self.output / "results.parquet")
        eyes = eye_table(results, self.policy)
        for name, table in (("eyes.csv", eyes), ("patients.csv", patient_table(eyes, self.policy))):
            with atomic_write(self.output / name) as partial:
                partial.write_text(csv_text(table), encoding="utf-8", newline="")
        return results

    def finish(self, when: str) -> None:
        """Mark the run as finished at the time of the last event of its log, and remove its progress folder."""
        self._note(when)
        shutil.rmtree(self.output / "progress", ignore_errors=True)

    def results(self) -> pl.DataFrame:
        """Return the results of a finished run."""
        return pl.read_parquet(self.output / "results.parquet")


def parquet_bytes(table: pl.DataFrame) -> bytes:
    """Return a table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    return buffer.getvalue()


def _pack(photos: list[SourcePhoto]) -> pl.DataFrame:
    # Build columns: row dictionaries of a million inputs would temporarily take a gigabyte.
    columns: dict[str, list[Any]] = {name: [getattr(photo, name) for photo in photos] for name in _SOURCE}
    # File names are bytes and not necessarily UTF-8.
    # Absolute, because the run may be resumed in another folder.
    columns["path"] = [os.fsencode(os.path.abspath(photo.path)) for photo in photos]
    stamps = [input_stamp(photo.path) for photo in photos]
    # What was never there has a row that says so; what vanishes later has none.
    columns["issue"] = [
        photo.issue or (missing_reason(photo.path) if size < 0 else None)
        for photo, (size, _) in zip(photos, stamps, strict=True)
    ]
    columns["bytes"], columns["mtime_ns"] = [size for size, _ in stamps], [changed for _, changed in stamps]
    return pl.DataFrame(columns, schema=_INPUTS)


def _unpack(table: pl.DataFrame) -> list[SourcePhoto]:
    # Runs that an earlier version began have no columns on what only names say.
    rows = table.select(*(name for name in _SOURCE if name in table.columns), "path").iter_rows(named=True)
    return [SourcePhoto(**row | {"path": Path(os.fsdecode(row["path"]))}) for row in rows]
