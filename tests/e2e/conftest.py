"""The recorded models, written once for all end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded_models import ARCHITECTURES, write_recorded_model


@pytest.fixture(scope="session")
def recorded_models(tmp_path_factory) -> dict[str, Path]:
    """Give the files of the recorded models by architecture."""
    folder = tmp_path_factory.mktemp("models")
    return {arch: write_recorded_model(arch, folder / f"{arch}.gguf") for arch in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def model(request, recorded_models) -> tuple[str, Path]:
    """Give each recorded model: its architecture and file."""
    return request.param, recorded_models[request.param]


@pytest.fixture
def llama(recorded_models) -> Path:
    """Give the recorded llama model."""
    return recorded_models["llama"]
