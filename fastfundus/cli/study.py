"""``fastfundus study``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for runs and results.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at a time on this machine.")
@click.option(
    "--ray", metavar="ADDRESS", help="Deal the runs to a Ray cluster: HOST:6379, auto, or local; one a GPU or machine."
)
def study(file: Path, output: Path, jobs: int, ray: str | None) -> None:
    r"""Run the grid of inits, tasks, label fractions, seeds and folds that FILE declares.

    Upstream runs are trained once and shared. Runs that are done are kept: the same command goes on after a stop. A run
    that cannot be done is named, and the rest completes; exits 1 then. Results: table.csv, .md and .tex, study.html.

    \b
    Example:
      fastfundus study study.toml --output study/
    """
    from fastfundus.errors import ConfigError, require

    require("torch", extra="train")
    from fastfundus.cli.console import remark
    from fastfundus.evaluate.study import run_study
    from fastfundus.evaluate.study_tables import write_tables
    from fastfundus.evaluate.study_workers import local_runner, ray_runner
    from fastfundus.train.interrupt import Interrupted

    if ray and jobs != 1:
        raise ConfigError("--jobs is for this machine; a cluster knows how many runs it has room for")
    try:
        declared, results = run_study(file, output, say=remark, runner=ray_runner(ray) if ray else local_runner(jobs))
    except Interrupted:
        raise click.ClickException(f"interrupted; go on with: fastfundus study {file} --output {output}") from None
    write_tables(declared, results, output)
    click.echo((output / "table.md").read_text(encoding="utf-8").rstrip())
    remark(f"page: {output / 'study.html'}")
    failed = [result for result in results if result.error]
    if failed:
        raise click.ClickException(
            f"{len(failed)} of {len(results)} runs could not be done, the first because: {failed[0].error}"
        )
