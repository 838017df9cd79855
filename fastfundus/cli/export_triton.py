"""``fastfundus export-triton``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export-triton")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The model repository; made if absent.")
@click.option("--name", default="fundus", show_default=True, help="Of the ensemble that clients ask.")
def export_triton(bundle: Path, output: Path, name: str) -> None:
    r"""Write BUNDLE into a model repository of NVIDIA Triton Inference Server.

    Three models: preparing (by this library, in the server's Python backend), the engine, and both as an ensemble that
    takes pictures as bytes and gives probabilities. A picture that cannot be scored is answered with its status and
    reason as an error.

    \b
    Example:
      fastfundus export-triton bundle.zip --output model_repository/
      tritonserver --model-repository model_repository/
    """
    from fastfundus.engines.bundle import Bundle
    from fastfundus.screen.triton_repository import export_repository

    for folder in export_repository(Bundle.open(bundle), output, name=name):
        click.echo(f"{folder}/config.pbtxt")
