"""Self-contained HTML pages in a common style: one file each, which needs no network and no other files."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import jinja2

from fastfundus.files import atomic_write

__all__ = ["write_page"]


def _template(name: str) -> str:
    return resources.files("fastfundus").joinpath(name).read_text(encoding="utf-8")


def write_page(path: Path, template: str, **facts: object) -> None:
    """Render a template and write the page atomically.

    All values are escaped, because file names and reasons come from outside.

    Args:
        path: the HTML file to write.
        template: path of the template in the package, such as "screening/report.html"; it may include "page.css".
        facts: the variables of the template; all variables that it uses must be given.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FunctionLoader(_template)
    )
    page = environment.get_template(template).render(**facts)
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")
