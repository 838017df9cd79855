"""The append-only audit log of a screening run, and its verification.

`audit.jsonl` contains one JSON object per line: what happened, when, and with which model. Every line ends with
`chain`, the SHA-256 of the previous chain value and the line's other fields, so changing, adding or removing a line
breaks the chain.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from fastfundus.data.journal import mend_lines
from fastfundus.errors import DataError, PhotoError
from fastfundus.photo.file import read_photo
from fastfundus.records import Status
from fastfundus.screening.policy import RETAKE, ScreenPolicy
from fastfundus.screening.results import eye_table, patient_table

__all__ = ["AuditLog", "Verification", "verify"]

_START = "0" * 64


def _link(chain: str, facts: dict[str, Any]) -> str:
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(f"{chain}{text}".encode()).hexdigest()


class AuditLog:
    """An append-only event log. An existing log is continued after its last complete line."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        """Number of photos in the log."""
        self._chain = _START
        if path.is_file():
            mend_lines(path)
            for line in _lines(path):
                self._chain = line["chain"]
                self.rows += line["event"] == "photo"
        self._file = path.open("a", encoding="utf-8")

    @property
    def empty(self) -> bool:
        """True if no event has ever been written."""
        return self._chain == _START

    def write(self, event: str, **facts: Any) -> None:
        """Append one event with the current time. It may stay in memory until `flush`."""
        whole = {"event": event, "time": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
        self._chain = _link(self._chain, whole)
        self.rows += event == "photo"
        self._file.write(json.dumps({**whole, "chain": self._chain}, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Write all buffered events to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Unflushed events that a full disk cannot hold are dropped; they were never guaranteed."""
        with contextlib.suppress(OSError):
            self._file.close()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                yield {"event": line["event"], "chain": line["chain"], **line}
            except (ValueError, KeyError, TypeError):
                raise DataError("is not a valid audit log line; the log was modified", path=path, row=number) from None


@dataclass(slots=True)
class Verification:
    """Result of a verification: counts and discrepancies."""

    rows: int = 0
    files: int = 0
    """Number of input files that were read again and match their recorded hash."""
    absent: int = 0
    """Number of input files that no longer exist."""
    faults: list[str] = field(default_factory=list)

    def note(self, fault: str) -> None:
        """Add a fault; only the first 100 are kept."""
        if len(self.faults) < 100:
            self.faults.append(fault)


def verify(output: Path, *, files: bool = False) -> Verification:
    """Verify a results folder by recomputing its contents.

    Checks the hash chain of the log; every decision, from the recorded probabilities and thresholds; the results, eye
    and patient tables against the log; and, with `files`, the hash of every input file.

    Args:
        output: a finished results folder.
        files: read every input file again and check its hash.

    Raises:
        DataError: the folder has no log or no finished results, or the log cannot be read.
    """
    log = output / "audit.jsonl"
    for needed in (log, output / "results.parquet"):
        if not needed.is_file():
            raise DataError("does not exist; is this the folder of a finished screening?", path=needed)
    found = Verification()
    results = pl.read_parquet(output / "results.parquet")
    rows = results.iter_rows(named=True)
    chain, start, ended = _START, None, False
    policy = ScreenPolicy()
    for number, line in enumerate(_lines(log), 1):
        recorded = line.pop("chain")
        chain_here = _link(chain, line)
        if chain_here != recorded:
            found.note(f"audit.jsonl, line {number}: the chain breaks; this line or an earlier one was modified")
        chain = recorded
        if line["event"] == "start":
            start, policy = line, ScreenPolicy(**line["policy"])
        elif line["event"] == "photo":
            found.rows += 1
            if start is None:
                raise DataError("has a photo event before the start event; the log was modified", path=log, row=number)
            _check_photo(line, next(rows, None), start, policy, found, number)
        elif line["event"] == "end":
            ended = True
    if not ended:
        found.note("audit.jsonl: has no end event; the run did not finish")
    if found.rows != len(results):
        found.note(f"results.parquet has {len(results)} rows, audit.jsonl {found.rows}")
    _check_tables(output, results, policy, found)
    if files and start is not None:
        _check_files(results, Path(start["root"]), found)
    return found


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
        elif path.read_text(encoding="utf-8") != table.write_csv():
            found.note(f"{name}: does not match results.parquet; it was modified")


def _check_files(results: pl.DataFrame, root: Path, found: Verification) -> None:
    for name, sha in _hashed(results.select("path", "sha256").iter_rows()):
        path = root / name
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
