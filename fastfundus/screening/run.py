"""A screening run: takes sources and a bundle, writes a results folder, and can be resumed after a crash."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from fastfundus.data.journal import locked
from fastfundus.data.source import SourceList, list_photos
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.runtime import Engine
from fastfundus.errors import ConfigError, DataError, FastFundusError
from fastfundus.files import hash_file
from fastfundus.records import SourcePhoto, Status, utf8_name
from fastfundus.screening.audit_log import AuditLog, check_mirror
from fastfundus.screening.masks import write_masks
from fastfundus.screening.output import Store, input_stamp
from fastfundus.screening.pipeline import ScreenedPhoto, Timing, screen_photos
from fastfundus.screening.policy import ScreenPolicy
from fastfundus.screening.report import write_report
from fastfundus.screening.results import hash_masks, makes_maps, result_row

_MAX_NAMED = 5

__all__ = ["BlockMaker", "Progress", "ScreeningRun", "local_blocks", "row_of", "rows_of", "screen_to_folder"]

Progress = Callable[[int, int, Timing], None]
"""Called with the number of finished rows, including those of earlier sessions, the total number and the timing."""
BlockMaker = Callable[[Store, Sequence[int], Timing, Callable[[int], None]], Iterator[tuple[int, list[dict[str, Any]]]]]
"""Makes the rows of the blocks with the given numbers, in any order. It updates the timing and calls its last argument
with the number of newly finished rows."""


@dataclass(frozen=True, slots=True)
class ScreeningRun:
    """Outcome of a screening run."""

    results: pl.DataFrame
    """One row per input."""
    timing: Timing
    """Timing of this session."""
    report: Path
    resumed: int = 0
    """Number of rows from earlier sessions."""
    notes: list[str] = field(default_factory=list)
    """Inputs that appeared, vanished or changed during the run."""
    head: str = ""
    """Chain value of the last line of the audit log; empty if this session wrote none."""


def screen_to_folder(
    listing: SourceList,
    bundle: Bundle,
    output: Path,
    *,
    sources: Sequence[Path],
    policy: ScreenPolicy | None = None,
    resume: bool = False,
    overwrite: bool = False,
    accept_failed: bool = False,
    make_blocks: BlockMaker | None = None,
    decode: str = "cpu",
    audit_mirror: Path | None = None,
    on_progress: Progress = lambda done, total, timing: None,
) -> ScreeningRun:
    """Screen every photo of a listing and write results, report and audit log.

    Args:
        listing: the inputs; a resumed run keeps its original inputs.
        bundle: the bundle to screen them with; one that produces maps also writes masks.
        output: results folder; created if it does not exist.
        sources: the paths given by the user.
        policy: the decision policy; None uses the default policy.
        resume: resume a run of the same sources, bundle and policy; start one if there is none.
        overwrite: replace the results of an earlier run in `output`.
        accept_failed: finish the run although inputs failed for reasons that are not their own.
        make_blocks: screens the blocks; None screens them on this machine.
        decode: the decoder, if it affects the results: "cpu" or "dali".
        audit_mirror: second file for the audit log, on other storage.
        on_progress: see `Progress`.

    Raises:
        ConfigError: `output` contains other results or a run with other settings, or masks would be written among the
            photos.
        DataError: `output` cannot be written to, or another process is using it.
        BundleError: the engine fails on every photo.
        FastFundusError: inputs failed for reasons that are not their own; all other rows are stored.
    """
    policy = policy or ScreenPolicy()
    if makes_maps(bundle) and any(output.resolve().is_relative_to(source.resolve()) for source in sources):
        raise ConfigError(
            f"{output}: is inside the folder of the photos, so its masks would be taken for photos; choose another"
        )
    began = False
    if audit_mirror is not None:
        if audit_mirror.resolve().is_relative_to(bundle.path.resolve()):
            raise DataError("is in the bundle, which must not change; give another --audit-mirror", path=audit_mirror)
        # Before --overwrite deletes anything.
        check_mirror(output / "audit.jsonl", audit_mirror, fresh=overwrite)
    try:
        with locked(output, output / ".lock", "screened into"):
            store = Store(
                output, listing, sources=sources, bundle=bundle, policy=policy, decode=decode,
                resume=resume, overwrite=overwrite, mirror=audit_mirror,
            )  # fmt: skip
            if store.finished:
                results, head = store.results(), ""
                if audit_mirror is not None:
                    # It may be new, or lack the last lines.
                    log = AuditLog(output / "audit.jsonl", audit_mirror)
                    head = log.head
                    log.flush()
                    log.close()
                return ScreeningRun(results, Timing(), output / "report.html", resumed=len(results), head=head)
            began = True
            return _run(store, listing, sources, make_blocks or local_blocks, on_progress, accept_failed, audit_mirror)
    except OSError as error:
        # Photos that cannot be read are reported in rows, so the error comes from the output.
        step = "finished rows are kept: fix the cause, then add --resume" if began else "choose another --output"
        raise DataError(
            f"cannot be written to ({error.strerror or error}); {step}", path=_place(error, output)
        ) from error


def _place(error: OSError, output: Path) -> Path:
    """Return what could not be written to: the results, or a mirror elsewhere."""
    return Path(error.filename) if isinstance(error.filename, str) and error.filename else output


def local_blocks(
    store: Store, missing: Sequence[int], timing: Timing, on_rows: Callable[[int], None]
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Screen blocks on this machine. See `BlockMaker`."""
    for part in store.listings_of(missing):
        rows, blocks = [], iter(part)
        number = next(blocks)
        photos = [photo for block in part for photo in store.inputs_of(block)]
        for row in rows_of(photos, store.bundle, store.policy, timing, output=store.output):
            rows.append(row)
            on_rows(1)
            if len(rows) == len(store.inputs_of(number)):
                yield number, rows
                rows, number = [], next(blocks, -1)


def rows_of(
    photos: Sequence[SourcePhoto],
    bundle: Bundle,
    policy: ScreenPolicy,
    timing: Timing,
    *,
    engine: Engine | None = None,
    output: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Screen photos and yield rows of the results, in order. See `screen_photos`.

    Args:
        photos: the inputs.
        bundle: the bundle to screen them with.
        policy: the decision policy.
        timing: updated as the rows are consumed.
        engine: the bundle's engine, already loaded; it is left open. None loads it.
        output: folder for the masks of a bundle that produces maps; None writes no masks.
    """
    for photo in screen_photos(photos, bundle, timing, policy=policy, engine=engine):
        yield row_of(photo, bundle, output)


def row_of(photo: ScreenedPhoto, bundle: Bundle, output: Path | None) -> dict[str, Any]:
    """Return a row of the results, and write the masks of a bundle that produces maps to `output`."""
    masks = write_masks(photo, bundle, output) if output is not None and makes_maps(bundle) else None
    return result_row(photo, bundle, masks)


def _run(
    store: Store,
    listing: SourceList,
    sources: Sequence[Path],
    make_blocks: BlockMaker,
    on_progress: Progress,
    accept_failed: bool,
    mirror: Path | None,
) -> ScreeningRun:
    timing, total = Timing(), len(store.photos)
    missing = [block for block in range(store.blocks) if not store.has(block)]
    resumed = done = total - sum(len(store.inputs_of(block)) for block in missing)
    audit = AuditLog(store.output / "audit.jsonl", mirror)

    def on_rows(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total, timing)

    try:
        if audit.empty:
            audit.write("start", **_start_event(store, listing))
        else:
            audit.write("resume", done=resumed, inputs=total)
        _catch_up(audit, store)
        failed: list[dict[str, Any]] = []
        if missing:
            for block, rows in make_blocks(store, missing, timing, on_rows):
                without_verdict = [row for row in rows if row["status"] == Status.FAILED]
                failed += without_verdict
                if not without_verdict or accept_failed:
                    store.add(block, rows)
                    _catch_up(audit, store)
                elif len(without_verdict) == len(rows):
                    break  # whatever it is, it concerns the following blocks as well
        _log_failures(audit, failed, listing.lost, accept_failed)
        if not all(store.has(block) for block in range(store.blocks)):
            raise _unfinished(store, failed, listing.lost)
        results = store.merge()
        assert len(results) == total
        notes = _changes(store, sources)
        write_report(
            store.output / "report.html", results, store.bundle, store.policy, timing,
            paths={photo.name: photo.path for photo in store.photos}, notes=[*listing.notes, *listing.lost, *notes],
            source=", ".join(str(source) for source in sources[:3]) + (" ..." if len(sources) > 3 else ""),
            finished=datetime.fromtimestamp(time.time()).astimezone(),
        )  # fmt: skip
        if listing.lost and not accept_failed:
            raise _unfinished(store, failed, listing.lost)
        covered = {"report_sha256": hash_file(store.output / "report.html"), "masks_sha256": hash_masks(store.output)}
        when = audit.write("end", rows=len(results), seconds=round(timing.wall, 3), notes=notes, **covered)
        audit.flush()
        store.finish(when)
    finally:
        audit.close()
    return ScreeningRun(results, timing, store.output / "report.html", resumed, notes, audit.head)


def _log_failures(audit: AuditLog, failed: Sequence[dict[str, Any]], lost: Sequence[str], accepted: bool) -> None:
    """Log the inputs that have no verdict."""
    if failed or lost:
        inputs, folders = [utf8_name(row["path"]) for row in failed], [utf8_name(text) for text in lost]
        audit.write("failed", accepted=accepted, inputs=inputs, lost=folders)
        audit.flush()


def _unfinished(store: Store, failed: Sequence[dict[str, Any]], lost: Sequence[str]) -> FastFundusError:
    """Return the error of a run that ended with inputs without a verdict."""
    lines = [f"{row['path']}: {row['reason']}" for row in failed[:_MAX_NAMED]] + list(lost[:_MAX_NAMED])
    more = len(failed) + len(lost) - len(lines)
    counts = [
        *([f"{len(failed)} inputs failed"] if failed else []),
        *([f"{len(lost)} folders could not be listed"] if lost else []),
    ]
    kept = "finished rows are kept" if failed else "the results have all other rows"
    return FastFundusError(
        "\n".join(
            [
                f"{store.output}: not finished, because {' and '.join(counts)}, which is not the photos' fault:",
                *lines,
                *([f"... and {more} more"] if more else []),
                f"{kept}: mend the cause and add --resume; or add --resume --accept-failed to finish without them",
            ]
        )
    )


def _start_event(store: Store, listing: SourceList) -> dict[str, Any]:
    """Return what the log must contain for its decisions to be reproducible."""
    bundle = store.bundle
    return {
        **store.identity,
        "thresholds": dict(zip(bundle.labels, bundle.thresholds, strict=True)),
        "findings": list(bundle.findings),
        "guard": bundle.metadata.get("guard"),
        "root": str(listing.root),
        "inputs": len(store.photos),
    }


def _catch_up(audit: AuditLog, store: Store) -> None:
    """Log stored rows in input order, including those that an interrupted session stored but did not log."""
    while audit.rows < len(store.photos) and store.has(block := store.block_at(audit.rows)):
        for row in store.rows_of(block)[audit.rows - store.start_of(block) :]:
            audit.write("photo", **{name: value for name, value in row.items() if name != "bundle"})
    audit.flush()


def _changes(store: Store, sources: Sequence[Path]) -> list[str]:
    """Return notes on the inputs that vanished, changed or appeared since the run began."""
    vanished: list[str] = []
    changed: list[str] = []
    for photo, before in zip(store.photos, store.stamps(), strict=True):
        now = input_stamp(photo.path)
        if now != before:
            (vanished if now[0] < 0 else changed).append(photo.name)
    known = {os.path.abspath(photo.path) for photo in store.photos}
    try:
        appeared = [
            photo.name
            for photo in list_photos(sources, adapter="folder").photos
            if os.path.abspath(photo.path) not in known
        ]
    except FastFundusError:
        appeared = []  # the sources themselves are gone: their photos are counted as vanished
    kinds = [
        (vanished, "vanished during the run: those not read before have a row with the reason"),
        (changed, "changed during the run: the hash in a row is that of the screened file"),
        (appeared, "appeared during the run and were not screened: screen them into another folder"),
    ]
    return [
        f"{len(names)} input{'s' if names[1:] else ''} {words} ({', '.join(names[:3])}{' ...' if names[3:] else ''})"
        for names, words in kinds
        if names
    ]
