"""Fixtures shared by the engine tests."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fastfundus.engines.export import ScreeningModel


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Export each distinct model only once, since torch's exporter takes seconds and is deterministic."""
    # Imported here because some tests in this folder run where only torch and pycuda are installed.
    from fastfundus.engines import build, export

    folder = tmp_path_factory.mktemp("exported")
    real = export.export_onnx

    def export_onnx(model: ScreeningModel, path: Path, labels: list[str], **settings: Any) -> None:
        key = hashlib.sha256(repr((labels, settings, model.size, model.added, model.activation)).encode())
        for name, value in model.state_dict().items():
            key.update(name.encode() + value.numpy().tobytes())
        kept = folder / key.hexdigest()
        if not kept.exists():
            real(model, kept, labels, **settings)
        shutil.copy(kept, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "export_onnx", export_onnx)
        patch.setattr(export, "export_onnx", export_onnx)
        yield
