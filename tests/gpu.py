"""What the tests on a GPU share: the GPU itself, or why there is none."""

from __future__ import annotations

import pytest

from engines.cuda import Cuda
from engines.errors import FlexError


def require_gpu() -> Cuda:
    """This machine's GPU; skips the test, with the reason, when there is none."""
    try:
        return Cuda()
    except FlexError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error.found}")
