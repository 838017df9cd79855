"""The ``fastfundus study`` command."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for runs and results.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Parallel runs on this machine.")
@click.option(
    "--ray", metavar="ADDRESS", help="Run on a Ray cluster: HOST:6379, auto or local; one run per GPU or machine."
)
def study(file: Path, output: Path, jobs: int, ray: str | None) -> None:
    r"""Run the study that FILE declares, and tabulate its results.

    FILE declares a grid of inits, tasks, label fractions, seeds and folds. Upstream runs are trained once and shared.
    Completed runs are kept, so that the same command continues after an interruption. If a run fails, the others still
    complete, and the command names it and exits with 1. Writes table.csv, table.md, table.tex and study.html.

    \b
    Example:
      fastfundus study study.toml --output study/
    """
    from fastfundus.errors import ConfigError, require

    require("torch", extra="train")
    from fastfundus.cli.console import remark
    from fastfundus.study.run import run_study
    from fastfundus.study.tables import write_tables
    from fastfundus.study.workers import local_runner, ray_runner
    from fastfundus.training.interrupt import Interrupted

    if ray and jobs != 1:
        raise ConfigError("--jobs applies to this machine only; with --ray, the cluster decides; give only one of them")
    try:
        declared, results = run_study(file, output, say=remark, runner=ray_runner(ray) if ray else local_runner(jobs))
    except Interrupted:
        raise click.ClickException(f"interrupted; continue with: fastfundus study {file} --output {output}") from None
    write_tables(declared, results, output)
    click.echo((output / "table.md").read_text(encoding="utf-8").rstrip())
    remark(f"page: {output / 'study.html'}")
    failed = [result for result in results if result.error]
    if failed:
        raise click.ClickException(
            f"{len(failed)} of {len(results)} runs failed; the first error is: {failed[0].error}"
        )
