"""Verification of a screening run against its audit log, by recomputing everything that can be recomputed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from fastfundus.csv_cells import csv_text
from fastfundus.errors import DataError, PhotoError
from fastfundus.files import hash_file, read_small
from fastfundus.photo.file import read_photo
from fastfundus.records import Status, bytes_of_name
from fastfundus.screening.audit_log import START, chain_link, log_lines
from fastfundus.screening.policy import RETAKE, ScreenPolicy
from fastfundus.screening.results import eye_table, hash_masks, patient_table

__all__ = ["Verification", "verify"]


_NEEDED = {"path", "sha256", "bundle", "patient", "eye", "status", "decision", "quality"}
"""Columns from which the other tables follow."""


@dataclass(slots=True)
class Verification:
    """Result of a verification: counts and discrepancies."""

    rows: int = 0
    files: int = 0
    """Number of input files that were read again and match their recorded hash."""
    absent: int = 0
    """Number of input files that no longer exist."""
    head: str = START
    """Chain value of the last line: kept elsewhere, it proves that nobody has made a new chain."""
    faults: list[str] = field(default_factory=list)
    more_faults: int = 0
    """Number of further faults, which are not listed."""

    def note(self, fault: str) -> None:
        """Add a fault; only the first 100 are kept."""
        if len(self.faults) < 100:
            self.faults.append(fault)
        else:
            self.more_faults += 1


def verify(output: Path, *, files: bool = False, head: str | None = None, mirror: Path | None = None) -> Verification:
    """Verify a results folder by recomputing its contents.

    Checks the hash chain of the log; every decision, from the recorded probabilities and thresholds; the results, eye
    and patient tables, the report and the masks against the log; that as many photos have a row as there were inputs;
    and, with `files`, the hash of every input file.

    Args:
        output: a finished results folder.
        files: read every input file again and check its hash.
        head: chain value that the last line must have, as the screening printed it.
        mirror: the second file of the log, which must have the same content.

    Raises:
        DataError: the folder has no log or no finished results, or they cannot be read.
    """
    try:
        found = _verified(output, files, head)
        if mirror is not None and mirror.exists() and mirror.samefile(output / "audit.jsonl"):
            found.note(f"{mirror}: is audit.jsonl itself, and proves nothing")
        elif mirror is not None and hash_file(mirror) != hash_file(output / "audit.jsonl"):
            sizes = f"{mirror.stat().st_size} and {(output / 'audit.jsonl').stat().st_size} bytes"
            found.note(f"{mirror}: is not a copy of audit.jsonl ({sizes})")
        return found
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, pl.exceptions.PolarsError) as error:
        # Anything may have been written there, with a chain that fits.
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"has a missing or wrong value ({reason}); it was modified", path=output) from None


def _verified(output: Path, files: bool, head: str | None) -> Verification:
    log = output / "audit.jsonl"
    for needed in (log, output / "results.parquet"):
        if not needed.is_file():
            raise DataError("does not exist; is this the folder of a finished screening?", path=needed)
    found = Verification()
    try:
        results = pl.read_parquet(output / "results.parquet")
    except (OSError, pl.exceptions.PolarsError) as error:
        message = f"cannot be read ({str(error).splitlines()[0]}); it was modified"
        raise DataError(message, path=output / "results.parquet") from None
    if missing := _NEEDED - set(results.columns):
        raise DataError(f"has no column {min(missing)!r}; it was modified", path=output / "results.parquet")
    rows = results.iter_rows(named=True)
    start: dict[str, Any] | None = None
    inputs, end = 0, None
    policy = ScreenPolicy()
    for number, line in enumerate(log_lines(log), 1):
        recorded = line.pop("chain")
        if chain_link(found.head, line) != recorded:
            found.note(f"audit.jsonl, line {number}: the chain breaks; this line or an earlier one was modified")
        found.head = recorded
        try:
            if line["event"] == "start":
                start, policy, inputs = line, ScreenPolicy(**line["policy"]), line["inputs"]
            elif line["event"] == "resume":
                # After a crash between the end of the log and that of the run, there are two ends.
                inputs, end = line.get("inputs", inputs), None
            elif end is not None:
                found.note(f"audit.jsonl, line {number}: follows the end of the run")
            elif line["event"] == "photo":
                found.rows += 1
                if start is None:
                    raise DataError("has a photo before its start; the log was modified", path=log, row=number)
                _check_photo(line, next(rows, None), start, policy, found, number)
            elif line["event"] == "end":
                end = line
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"lacks a value or has a wrong one ({error}); the log was modified", path=log, row=number
            ) from None
    _check_counts(output, found, len(results), inputs, end)
    _check_identity(output, start or {}, end or {}, found)
    if head is not None and head != found.head:
        found.note(f"audit.jsonl: its head is {found.head}, not {head}; the log is another one, or not complete")
    _check_tables(output, results, policy, found)
    if files and start is not None:
        _check_files(results, Path(start["root"]), found)
    return found


def _check_counts(output: Path, found: Verification, results: int, inputs: int, end: dict[str, Any] | None) -> None:
    """Check that nothing is missing, and the files that the end of the log covers."""
    if end is None:
        found.note("audit.jsonl: has no end event; the run did not finish")
        return
    if found.rows != results:
        found.note(f"results.parquet has {results} rows, audit.jsonl {found.rows}")
    for what, count in (("inputs at the start", inputs), ("rows at the end", end.get("rows"))):
        if count != found.rows:
            found.note(f"audit.jsonl: has {found.rows} photos, but {count} {what}")
    # Logs of earlier versions do not cover these files.
    if "report_sha256" in end:
        report = output / "report.html"
        if not report.is_file() or hash_file(report) != end["report_sha256"]:
            found.note("report.html is missing or was modified")
        if hash_masks(output) != end["masks_sha256"]:
            found.note("masks: some are missing, were added or modified")


_IDENTITY = {"fastfundus", "bundle", "backend", "precision", "spec", "decode", "policy", "sources"}
"""What `run.json` repeats of the start of every log."""
_FINISH_S = 60
"""Largest difference in seconds between the ends in log and `run.json`; earlier versions wrote it a moment later."""


def _check_identity(output: Path, start: dict[str, Any], end: dict[str, Any], found: Verification) -> None:
    """Check that the state of the folder is that of the run in the log."""
    try:
        state = json.loads(read_small(output / "run.json"))
        identity = dict(state["identity"])
        apart = datetime.fromisoformat(state["finished"]) - datetime.fromisoformat(end.get("time", state["finished"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        found.note("run.json: is damaged, or does not say that the run has finished")
        return
    if not 0 <= apart.total_seconds() <= _FINISH_S:
        found.note("run.json: says another time of the end than the log")
    names = sorted({*identity, *_IDENTITY})
    if differing := [name for name in names if name not in identity or start.get(name) != identity[name]]:
        found.note(f"run.json: differs from the start of the log in {', '.join(map(str, differing))}")


def _check_photo(
    line: dict[str, Any],
    row: dict[str, Any] | None,
    start: dict[str, Any],
    policy: ScreenPolicy,
    found: Verification,
    number: int,
) -> None:
    place = f"audit.jsonl, line {number} ({line.get('path')})"
    noted = {name: value for name, value in line.items() if name not in ("event", "time")}
    if row is not None:
        shown = {name: value for name, value in row.items() if name != "bundle"}
        differing = [name for name in shown if not _same(shown[name], noted.get(name))]
        differing += [name for name in noted if name not in shown]
        if differing or row["bundle"] != start["bundle"]:
            found.note(f"{place}: differs from results.parquet in {', '.join(differing or ['bundle'])}")
    expected = RETAKE if noted["status"] == Status.UNGRADABLE.value else None
    if noted["status"] == Status.OK.value:
        probabilities = {name: noted.get(f"p_{name}") for name in start["findings"]}
        if any(value is None for value in probabilities.values()):
            found.note(f"{place}: the status is ok, but a probability is missing")
            return
        expected = policy.decide(
            {name: float(value or 0) for name, value in probabilities.items()}, start["thresholds"]
        )
    if noted["decision"] != expected:
        found.note(f"{place}: the decision is {noted['decision']}, its probabilities and thresholds give {expected}")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


def _check_tables(output: Path, results: pl.DataFrame, policy: ScreenPolicy, found: Verification) -> None:
    eyes = eye_table(results, policy)
    tables = {"results.csv": results, "eyes.csv": eyes, "patients.csv": patient_table(eyes, policy)}
    for name, table in tables.items():
        path = output / name
        if not path.is_file():
            found.note(f"{name} is missing")
        elif path.read_bytes() != csv_text(table).encode():
            found.note(f"{name}: does not match results.parquet; it was modified")


def _check_files(results: pl.DataFrame, root: Path, found: Verification) -> None:
    for name, sha in _hashed(results.select("path", "sha256").iter_rows()):
        path = root / os.fsdecode(bytes_of_name(name))
        if not path.is_file():
            found.absent += 1
            continue
        try:
            same = hashlib.sha256(read_photo(path)).hexdigest() == sha
        except PhotoError as error:
            found.note(f"{name}: can no longer be read ({error.reason})")
            continue
        found.files += same
        if not same:
            found.note(f"{name}: was modified after it was screened")


def _hashed(rows: Iterable[tuple[str, str | None]]) -> Iterator[tuple[str, str]]:
    return ((name, sha) for name, sha in rows if sha is not None)
