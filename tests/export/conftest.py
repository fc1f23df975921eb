"""The small official-layout checkpoint of the parity data, and settings without weights."""

from pathlib import Path

import pytest

from export.checkpoint.write_config import write_config
from tests.geometries import official
from tests.paths import OFFICIAL

WEIGHTS = OFFICIAL / "weights"


@pytest.fixture
def weights() -> Path:
    """Folder of a tiny FlexAttention checkpoint: config.json, model.safetensors (tower included), clip/."""
    return WEIGHTS


@pytest.fixture
def config_alone(tmp_path) -> Path:
    """A folder with the config.json of LLaVA-1.5-7B-FlexAttention and nothing else."""
    write_config(tmp_path, official(), tower="openai/clip-vit-large-patch14-336")
    return tmp_path
