"""The ``fastfundus export-triton`` command."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export-triton")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Model repository; created if absent.")
@click.option("--name", default="fundus", show_default=True, help="Name of the ensemble that clients call.")
@click.option(
    "--pictures",
    type=click.Choice(["uint8", "bytes"]),
    default="uint8",
    show_default=True,
    help="Input of the ensemble: the bytes of one file as UINT8 [1, L], or files as BYTES [N, 1].",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "native", "python"]),
    default="auto",
    show_default=True,
    help="Backend of the server for the engine: its own, or this library in its Python backend; auto prefers its own.",
)
def export_triton(bundle: Path, output: Path, name: str, pictures: str, engine: str) -> None:
    r"""Export BUNDLE to a model repository of NVIDIA Triton Inference Server.

    Writes three models: preprocessing (by this library, in the server's Python backend), the engine, and an ensemble of
    both that takes the bytes of image files and returns probabilities. For a photo that cannot be scored, the server
    returns an error with its status and reason.

    \b
    Example:
      fastfundus export-triton bundle.zip --output model_repository/
      tritonserver --model-repository model_repository/
    """
    from fastfundus.engines.bundle import Bundle
    from fastfundus.serving.triton_repository import export_repository

    for folder in export_repository(Bundle.open(bundle), output, name=name, pictures=pictures, engine=engine):
        click.echo(f"{folder}/config.pbtxt")
