"""The ``fastfundus doctor`` command."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, for a bug report.")
def doctor(as_json: bool) -> None:
    r"""Report what this machine and installation can do, and how to install what is missing.

    \b
    Example:
      fastfundus doctor
    """
    from fastfundus.workflow.doctor import examine

    found = examine()
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(f"fastfundus {found['fastfundus']}, Python {found['python']}, {found['platform']}")
    features = ", ".join(found["cpu_features"]) or "no known vector instructions"
    click.echo(f"{found['cores']} cores ({features}), GPU: {found['gpu'] or 'none'}")
    if found["engine"]["precision"]:
        click.echo(f"engines run in {found['engine']['precision']} here")
    if found["training_precision"]:
        click.echo(f"training: {found['training_precision']}")
    if found["sampling_on_cpu"]:
        click.echo(f"sampling of photos on the CPU: {found['sampling_on_cpu']}")
    for name, part in found["parts"].items():
        versions = ", ".join(f"{package} {version or 'missing'}" for package, version in part["versions"].items())
        click.echo(f"{'ok     ' if part['ready'] else 'missing'}  {name}: {versions}")
        if not part["ready"]:
            click.echo(f"         {part['install']}")
