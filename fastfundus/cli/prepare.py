"""The ``fastfundus prepare`` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fastfundus.data.cache import PhotoCache

_MAX_SHOWN = 20


def _list_adapters(context: click.Context) -> None:
    from fastfundus.data.adapters import ADAPTERS

    for name, adapter in ADAPTERS.items():
        click.echo(f"{name:16} {adapter.title}")
    context.exit()


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Cache folder to create or extend.")
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="CSV file or Excel workbook with a column that names the photos, and labels; columns of patient, eye, "
    "camera and split are recognised under their usual names.",
)
@click.option(
    "--eye-codes",
    metavar="CODES",
    help="Meaning of numbers in the column of eyes of the label file, such as 1=R,2=L.",
)
@click.option(
    "--adapter",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Layout of SOURCE: folder, classes, csv, or a public data set (see --list-adapters); auto detects it.",
)
@click.option(
    "--list-adapters",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda context, parameter, value: _list_adapters(context) if value else None,
    help="List the supported public data sets and exit.",
)
@click.option("--size", type=int, default=512, show_default=True, help="Side of the prepared photos in pixels.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "cpu", "dali"]),
    default="auto",
    show_default=True,
    help="Decoder; auto uses dali if there is a GPU and nvidia-dali is installed.",
)
@click.option("--workers", type=click.IntRange(1, 1024), help="Decoding threads  [default: one per core]")
@click.option(
    "--patient-salt",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Replace patient identifiers by hashes, salted with the secret content of this file. Paths stay as they are.",
)
@click.option(
    "--preview", is_flag=True, help="Write preview.html into the cache, with detected fields and crops to check."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def prepare(
    source: Path,
    output: Path,
    labels: Path | None,
    eye_codes: str | None,
    adapter: str,
    size: int,
    backend: str,
    workers: int | None,
    patient_salt: Path | None,
    preview: bool,
    as_json: bool,
) -> None:
    r"""Decode every photo of SOURCE once, into a cache for training.

    SOURCE is a folder (searched recursively), a folder with one subfolder per class, an unpacked public data set, or a
    CSV file that lists photos. Every photo gets a row with a status in the cache's manifest, including unusable ones.
    Run the command again to add new photos.

    \b
    Example:
      fastfundus prepare photos/ --labels labels.csv --output cache/ --preview
    """
    from fastfundus.cli.console import progress_bar, quiet_decoders, read_salt, remark, remarks
    from fastfundus.data.preview import write_preview
    from fastfundus.data.source import list_photos
    from fastfundus.identifiers import parse_eye_codes
    from fastfundus.workflow.prepare import prepare_listing

    quiet_decoders()
    try:
        codes = None if eye_codes is None else parse_eye_codes(eye_codes)
    except ValueError as error:
        raise click.UsageError(f"--eye-codes: {error}") from None
    listing = list_photos(source, labels=labels, adapter=adapter, eye_codes=codes)
    remarks(listing.notes)
    with progress_bar() as progress:
        task = progress.add_task("preparing", total=len(listing.photos))
        try:
            cache = prepare_listing(
                listing,
                output,
                size=size,
                backend=backend,  # type: ignore[arg-type]
                workers=workers,
                patient_salt=read_salt(patient_salt),
                on_photo=lambda status: progress.advance(task),
            )
        except KeyboardInterrupt:
            progress.stop()
            raise click.ClickException("interrupted; run the same command again to continue where it stopped") from None
    counts, pairs = _report(cache, output, hashed=patient_salt is not None)
    if preview:
        shown = write_preview(cache, output / "preview.html")
        remark(f"{output / 'preview.html'}: preview of {shown} photos")
    if as_json:
        summary = {"cache": str(output), "photos": len(listing.photos), "status": counts, "duplicate_pairs": pairs}
        click.echo(json.dumps({**summary, "lost": listing.lost}))
    else:
        text = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        click.echo(f"{output}: {len(listing.photos)} photos at {size} px: {text}")
    if listing.lost:
        raise click.ClickException("\n".join(["some inputs could not be listed:", *listing.lost]))


def _report(cache: PhotoCache, output: Path, *, hashed: bool) -> tuple[dict[str, int], int]:
    """Say which photos are not usable and what was understood; return photos by status, and pairs of duplicates."""
    from fastfundus.cli.cache import understood
    from fastfundus.cli.console import remark
    from fastfundus.records import Status
    from fastfundus.workflow.cache import summarise_cache

    counts = {status.value: int((cache.manifest["status"] == status.value).sum()) for status in Status}
    for status in (Status.FAILED, Status.UNFAMILIAR):
        del counts[status.value]  # occur only when screening
    unusable = cache.manifest.filter(cache.manifest["status"] != "ok")
    for row in unusable.head(_MAX_SHOWN).iter_rows(named=True):
        remark(f"{row['status']}: {row['path']}: {row['reason']}")
    if len(unusable) > _MAX_SHOWN:
        remark(f"and {len(unusable) - _MAX_SHOWN} more that are not ok; all of them are in {output}/manifest.parquet")
    for line in understood(summarise_cache(output)):
        remark(line)
    if hashed and "names of files" in cache.origins.get("patient", ""):
        remark("note: patients were read from paths, which the manifest still contains: rename the files to hide them")
    unknown = int((~cache.manifest["patient_known"]).sum())
    if unknown:
        remark(f"note: the patient of {unknown} photos is unknown; splits treat each of them as a separate patient")
    pairs = len(cache.duplicates())
    if pairs:
        remark(
            f"note: pairs of duplicates or near duplicates across patients: {pairs}; splits keep each pair on one "
            f"side; list them with: fastfundus cache audit {output}"
        )
    return counts, pairs
