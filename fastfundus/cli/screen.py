"""``fastfundus screen``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option(
    "--backend",
    type=click.Choice(["openvino", "onnxruntime"]),
    help="Run the graph inside the bundle in float32, instead of the engine that was built and proven.",
)
@click.option("--overwrite", is_flag=True, help="Replace results that are there already.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def screen(
    bundle: Path, sources: tuple[Path, ...], output: Path, backend: str | None, overwrite: bool, as_json: bool
) -> None:
    r"""Screen photos with BUNDLE: exactly one row per input, and a report.

    SOURCES are folders, photos, or CSV files with a column 'file'. What cannot be screened gets a row that says why.
    Exits 0 only if every input got a row. For research use only.

    \b
    Example:
      fastfundus screen bundle/ photos/ --output results/
    """
    from fastfundus.cli.console import progress_bar, quiet_decoders, remarks
    from fastfundus.data.source import list_photos
    from fastfundus.engines.bundle import Bundle
    from fastfundus.screen.pipeline import ScreenedPhoto, Timing
    from fastfundus.screen.run import screen_to_folder

    quiet_decoders()
    opened = Bundle.open(bundle)
    if backend:
        opened = opened.using(backend)
    # Every picture is an input here, also the masks and spare pictures of a public data set.
    listing = list_photos(sources, adapter="folder")
    remarks(listing.notes)
    with progress_bar("rate") as progress:
        task = progress.add_task("screening", total=len(listing.photos), rate="")

        def advance(photo: ScreenedPhoto, timing: Timing) -> None:
            progress.update(task, advance=1, rate=f"{timing.images_per_s:.1f} photos/s")

        try:
            run = screen_to_folder(listing, opened, output, sources=sources, overwrite=overwrite, on_photo=advance)
        except KeyboardInterrupt:
            progress.stop()
            raise click.ClickException(
                f"interrupted; rows so far are in {output / 'audit.jsonl'}; start again with --overwrite"
            ) from None
    statuses = dict(run.results["status"].value_counts(sort=True).iter_rows())
    decisions = {key: count for key, count in run.results["decision"].value_counts(sort=True).iter_rows() if key}
    if as_json:
        summary = {"inputs": len(listing.photos), "status": statuses, "decision": decisions, "lost": listing.lost}
        speed = {"images_per_s": run.timing.images_per_s, "cores_busy": run.timing.cores_busy}
        click.echo(json.dumps({**summary, **speed, "report": str(run.report)}))
    else:
        click.echo(f"{len(run.results)} inputs: " + ", ".join(f"{count} {name}" for name, count in statuses.items()))
        click.echo(", ".join(f"{count} {name}" for name, count in decisions.items()) or "nothing could be scored")
        speed_line = (
            f"{run.timing.images_per_s:.1f} photos/s, {run.timing.cores_busy:.1f} of {run.timing.workers} cores busy"
        )
        click.echo(f"{speed_line}\nreport: {run.report}")
    if listing.lost:
        raise click.ClickException("\n".join(["some inputs could not be listed:", *listing.lost]))
