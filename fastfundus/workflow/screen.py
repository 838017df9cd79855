"""Screen photos with a bundle: one result row per photo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from fastfundus.data.source import SourceList, list_photos, mark_missing
from fastfundus.engines.bundle import Bundle
from fastfundus.errors import ConfigError, DataError, require
from fastfundus.screening.output import has_inputs
from fastfundus.screening.pipeline import Timing
from fastfundus.screening.policy import ScreenPolicy
from fastfundus.screening.run import BlockMaker, Progress, ScreeningRun, rows_of, screen_to_folder

__all__ = ["screen", "screen_sources"]


def screen(
    paths: str | Path | Iterable[str | Path],
    bundle: str | Path | Bundle,
    *,
    policy: ScreenPolicy | None = None,
    timing: Timing | None = None,
) -> Iterator[dict[str, Any]]:
    """Screen photos, in the order of their names.

    Args:
        paths: a folder, a photo or a CSV file with a column `file`; or several of them.
        bundle: the bundle to screen with, or its path.
        policy: the decision policy; None uses the default policy.
        timing: receives the time of each stage while records are taken.

    Yields:
        The columns of results.csv by name, for every input exactly once: path, sha256, status, reason, patient, eye,
        camera, quality, p_<label> (None without a score), decision, bundle. Masks are only written by the command line.

    Raises:
        DataError: a source does not exist, contains nothing, or cannot be listed.
        BundleError: the bundle cannot be used on this machine, or its engine fails on every photo.

    Example:
        >>> for record in fastfundus.screen("photos/", "bundle/"):
        ...     print(record["path"], record["decision"])
    """
    sources = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    listing = list_photos(sources, adapter="folder")
    if listing.lost:
        raise DataError("; ".join(["some inputs could not be listed", *listing.lost]))
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    return rows_of(mark_missing(listing.photos), opened, policy or ScreenPolicy(), timing or Timing())


def screen_sources(
    sources: Sequence[Path],
    bundle: str | Path | Bundle,
    output: str | Path,
    *,
    policy: ScreenPolicy | None = None,
    resume: bool = False,
    overwrite: bool = False,
    accept_failed: bool = False,
    backend: str | None = None,
    decode: Literal["cpu", "dali"] = "cpu",
    ray: str | None = None,
    audit_mirror: str | Path | None = None,
    on_listed: Callable[[SourceList], None] = lambda listing: None,
    on_progress: Progress = lambda done, total, timing: None,
) -> tuple[ScreeningRun, SourceList]:
    """Screen every photo of some sources into a results folder; see `screening.run.screen_to_folder`.

    Args:
        sources: folders, photos, or CSV files with a column `file`.
        bundle: the bundle to screen with, or its path.
        output: the results folder.
        policy: the decision policy; None uses the default policy.
        resume: continue an interrupted run.
        overwrite: replace existing results.
        accept_failed: finish although inputs failed for reasons that are not their own.
        backend: run the bundle's graph in float32 on this runtime, instead of the verified engine.
        decode: decoder; "dali" decodes on the GPU.
        ray: address of a Ray cluster to run on.
        audit_mirror: second file for the audit log, on other storage.
        on_listed: called with the inputs before they are screened.
        on_progress: see `screening.run.Progress`.

    Returns:
        The outcome, and the inputs with those that could not be listed.

    Raises:
        ConfigError: options exclude each other, or `output` contains other results.
        DataError: a source does not exist, `output` cannot be written to, or another process is using it.
        BundleError: the bundle cannot be used on this machine, or its engine fails on every photo.
        MissingDependency: DALI or Ray is not installed.
        FastFundusError: inputs failed for reasons that are not their own, and `accept_failed` is not set.
    """
    if ray and decode == "dali":
        raise ConfigError("--ray and --decode dali cannot be combined; give only one of them")
    if resume and overwrite:
        raise ConfigError("--resume continues existing results, --overwrite deletes them; give only one of them")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    if backend:
        opened = opened.using(backend)
    # Every picture is an input here, including the masks and additional pictures of a public data set.
    try:
        listing = list_photos(list(sources), adapter="folder")
    except DataError as error:
        if not (resume and has_inputs(Path(output))):
            raise
        # A resumed run knows its inputs: those not screened yet fail one by one, and can be accepted as failed.
        listing = SourceList(Path.cwd(), [], lost=[str(error)])
    on_listed(listing)
    run = screen_to_folder(
        listing,
        opened,
        Path(output),
        sources=sources,
        policy=policy,
        resume=resume,
        overwrite=overwrite,
        accept_failed=accept_failed,
        make_blocks=_block_maker(decode, ray),
        decode=decode,
        audit_mirror=Path(audit_mirror) if audit_mirror else None,
        on_progress=on_progress,
    )
    return run, listing


def _block_maker(decode: str, ray: str | None) -> BlockMaker | None:
    """Return what screens the blocks of a run; None screens them on this machine."""
    if ray:
        from fastfundus.screening.ray_runner import ray_blocks

        return ray_blocks(ray)
    if decode != "dali":
        return None
    torch = require("torch", extra="train")
    require("nvidia.dali", extra="dali")
    from fastfundus.dali.screen import dali_blocks

    return dali_blocks(0 if torch.cuda.is_available() else None)
