"""Tests, and commands that nobody runs by pytest: what both need before all imports is here; fixtures: conftest.py."""

from __future__ import annotations

import os

# Before anything imports onnxruntime, in processes that tests start as well: no test, and no benchmark, reports to
# anybody. Who has set it to something else has their way.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
