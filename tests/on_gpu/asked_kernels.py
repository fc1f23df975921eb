"""A pytest plugin that runs GPU tests of the kernels without a GPU, to learn what they compile: every op is computed by
its reference, and the sets of kernels that would be compiled are written to the file that ASKED names."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest

import tests.conftest  # first: kernels are decorated for the interpreter
import tests.gpu
from engines.cuda import Cuda
from plugins.artifacts import Artifacts
from plugins.op import Kernel
from tests.emulator.driver import Driver, emulated_artifacts
from tests.on_gpu import compiled
from tests.plugins import checks
from tests.plugins.harness import Launcher, by_reference

ASKED, SM = "FLEX_ASKED_KERNELS", "FLEX_ASKED_SM"  # environment variables: a file; of which GPU
_asked: list[tuple[tuple[Kernel, ...], tuple[int, ...]]] = []


def _remember(kernels: Sequence[Kernel], sms: Sequence[int]) -> Artifacts:
    _asked.append((tuple(kernels), tuple(sms)))
    return emulated_artifacts(kernels, sms)


def _compute(self, op, dtype, inputs):
    self.artifacts(op, dtype)
    return by_reference(op, dtype, inputs)


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is imported."""
    tests.gpu.require_gpu = lambda: Cuda(Driver(sm=int(os.environ[SM])))
    compiled.compiled = _remember
    Launcher.__call__ = _compute
    # A reference leaves the rest of the cache otherwise, and multiplies what nobody may look at by zero.
    checks.compare_attention = checks.compare_int8_cache = lambda *arguments, **named: None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was asked for."""
    Path(os.environ[ASKED]).write_bytes(pickle.dumps(list(dict.fromkeys(_asked))))
