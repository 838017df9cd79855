"""Rules of style that a machine can check."""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("fastfundus", "kernels", "engines", "bench")
    for path in (ROOT / folder).rglob("*.py")
    if not {"kernels", "engines"} & set(path.relative_to(ROOT).parts[1:-1])
)
MAX_FUNCTION_LINES = 80
RETIRED = {
    "Crew", "Grading", "LossWatch", "Overlap", "PhotoFeed", "Problem", "Slot", "Trials", "VesselMaps", "ancestry",
    "cell_sums", "chances", "crew", "dealt", "field_profile", "judged", "one_ahead", "optimiser", "points_at",
    "room_for_photos", "told", "wording",
}  # fmt: skip
"""Names that gave way to the field's terms."""


def test_functions_are_short() -> None:
    found = []
    for path in SOURCES:
        if path.parent.name == "tables":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    found.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not found


def test_files_are_short() -> None:
    assert statistics.median(len(path.read_text().splitlines()) for path in SOURCES) < 150


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_retired_names_are_not_used(path: Path) -> None:
    names = {
        token.string
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        if token.type == tokenize.NAME
    }
    assert not names & RETIRED


def test_every_export_exists() -> None:
    """Names in `__all__` are defined, and the lazy ones of the package can be loaded."""
    import fastfundus

    for name in fastfundus.__all__:
        assert getattr(fastfundus, name) is not None
    assert set(fastfundus.__all__) <= set(dir(fastfundus))
    with pytest.raises(AttributeError, match="no attribute 'shcreen'"):
        fastfundus.shcreen  # noqa: B018
