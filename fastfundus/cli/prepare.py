"""``fastfundus prepare``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The cache, a folder to be made.")
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    help="CSV with a column 'file', and labels; 'patient', 'eye' and 'split' are understood.",
)
@click.option(
    "--adapter",
    type=click.Choice(["auto", "folder", "classes", "csv"]),
    default="auto",
    show_default=True,
    help="How SOURCE is read; auto finds out.",
)
@click.option("--size", type=int, default=512, show_default=True, help="Side of the prepared photos in pixels.")
@click.option("--workers", type=click.IntRange(1, 1024), help="Decoding threads  [default: one a core]")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def prepare(
    source: Path, output: Path, labels: Path | None, adapter: str, size: int, workers: int | None, as_json: bool
) -> None:
    r"""Decode every photo of SOURCE once into a cache to train from.

    SOURCE is a folder (searched through), a folder with one sub-folder a class, or a CSV that names photos. Every photo
    gets a row with a status in the cache's manifest, the unusable ones too. Run it again to add new photos.

    \b
    Example:
      fastfundus prepare photos/ --labels labels.csv --output cache/
    """
    from fastfundus.cli.console import progress_bar, remark, remarks
    from fastfundus.data import build_cache, list_photos
    from fastfundus.records import Status
    from fastfundus.spec import PreprocessSpec

    listing = list_photos(source, labels=labels, adapter=adapter)
    remarks(listing.notes)
    with progress_bar() as progress:
        task = progress.add_task("preparing", total=len(listing.photos))
        try:
            cache = build_cache(
                listing.photos,
                output,
                PreprocessSpec(size=size),
                source=listing.root,
                workers=workers,
                on_photo=lambda status: progress.advance(task),
            )
        except KeyboardInterrupt:
            progress.stop()
            raise click.ClickException("interrupted; run the same command again to go on where it stopped") from None
    counts = {status.value: int((cache.manifest["status"] == status.value).sum()) for status in Status}
    for row in cache.manifest.filter(cache.manifest["status"] != "ok").head(20).iter_rows(named=True):
        remark(f"{row['status']}: {row['path']}: {row['reason']}")
    unknown = int((~cache.manifest["patient_known"]).sum())
    if unknown:
        remark(f"note: the patient of {unknown} photos is unknown; each counts as a patient of its own when splitting")
    if as_json:
        click.echo(
            json.dumps({"cache": str(output), "photos": len(listing.photos), "status": counts, "lost": listing.lost})
        )
    else:
        told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        click.echo(f"{output}: {len(listing.photos)} photos at {size} px: {told}")
    if listing.lost:
        raise click.ClickException("\n".join(["some inputs could not be listed:", *listing.lost]))
