"""Pages that stand alone: one HTML file each, of one look, that needs neither network nor folder."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import jinja2

from fastfundus.files import replaced

__all__ = ["write_page"]


def _template(name: str) -> str:
    return resources.files("fastfundus").joinpath(name).read_text(encoding="utf-8")


def write_page(path: Path, template: str, **facts: object) -> None:
    """Write a page, which appears when it is complete.

    Names of files and reasons come from outside: what is put into a template is escaped.

    Args:
        path: the HTML file.
        template: its place in the package, such as "screen/report.html"; it may include "page.css".
        facts: what the template names; every name that it uses must be there.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FunctionLoader(_template)
    )
    page = environment.get_template(template).render(**facts)
    with replaced(path) as partial:
        partial.write_text(page, encoding="utf-8")
