"""Where the small official-layout checkpoint of the parity data is."""

from pathlib import Path

import pytest

from tests.paths import OFFICIAL

WEIGHTS = OFFICIAL / "weights"


@pytest.fixture
def weights() -> Path:
    """Folder of a tiny FlexAttention checkpoint: config.json, model.safetensors (tower included), clip/."""
    return WEIGHTS
