"""The ``fastfundus audit`` commands, which check the results of a screening."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.group()
def audit() -> None:
    r"""Check the results of a screening against its audit log.

    \b
    Example:
      fastfundus audit verify results/
    """


@audit.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--files", is_flag=True, help="Also read every input file and compare its hash.")
@click.option(
    "--head", metavar="HASH", help="The head of the log that the screening printed; it must still be the head."
)
@click.option(
    "--audit-mirror", type=click.Path(path_type=Path), metavar="FILE", help="Also compare the mirror of the log."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(output: Path, files: bool, head: str | None, audit_mirror: Path | None, as_json: bool) -> None:
    r"""Verify the results in OUTPUT by recomputing them.

    Checks the hash chain of audit.jsonl, every decision from the recorded probabilities and thresholds, the tables of
    eyes and patients, the report and the masks, the number of photos, and with --files the hash of every photo. Exits
    with 1 if anything differs. Only --head or --audit-mirror reveals a log that was rewritten as a whole.

    \b
    Example:
      fastfundus audit verify results/ --files
    """
    from fastfundus.cli.console import quiet_decoders
    from fastfundus.screening.audit import verify as recompute

    quiet_decoders()
    found = recompute(output, files=files, head=head, mirror=audit_mirror)
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        click.echo(f"{found.rows} rows recomputed")
        click.echo(f"head of the audit log: {found.head}")
        if files:
            click.echo(f"{found.files} files match their recorded hash; {found.absent} no longer exist")
    if found.faults:
        more = [f"... and {found.more_faults} more"] if found.more_faults else []
        raise click.ClickException("\n".join([f"{output} differs from what the run wrote:", *found.faults, *more]))
    if not as_json:
        click.echo("no differences found")
