"""The ``fastfundus explain`` command."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the heatmaps.")
@click.option("--label", metavar="NAME", help="Output to explain  [default: the first finding]")
@click.option(
    "--method", type=click.Choice(["gradcam", "occlusion"]), default="gradcam", show_default=True,
    help="Explanation method; occlusion works with every network but is over 100 times slower.",
)  # fmt: skip
@click.option(
    "--max-photos",
    "--most",
    "max_photos",
    type=click.IntRange(1),
    default=12,
    show_default=True,
    help="Maximum number of photos per outcome of a cache.",
)
def explain(
    run: Path, sources: tuple[Path, ...], output: Path, label: str | None, method: str, max_photos: int
) -> None:
    r"""Draw heatmaps of the image regions that RUN relies on.

    SOURCES are photos, folders or CSV files: each photo gets a heatmap overlay in its original frame, a row in
    explain.csv, and an entry in explain.html. Alternatively, SOURCES is one cache: explain.html then shows its test
    patients by outcome, with a faithfulness test of the heatmaps.

    \b
    Example:
      fastfundus explain run/ photo.jpg --output heatmaps/
      fastfundus explain run/ cache/ --output sheets/
    """
    from fastfundus.errors import require

    require("torch", extra="train")
    from fastfundus.cli.console import progress_bar, quiet_decoders, remark
    from fastfundus.workflow.explain import explain as explain_sources

    quiet_decoders()
    with progress_bar() as bar:
        task = bar.add_task("explaining", total=None)
        page = explain_sources(
            run,
            sources,
            output,
            label=label,
            method=method,  # type: ignore[arg-type]
            max_photos=max_photos,
            on_photo=lambda done, total: bar.update(task, completed=done, total=total),
            say=lambda note: remark(f"note: {note}"),
        )
    click.echo(page)
