"""What tests of the server share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.runtime.serve.command import serving


@pytest.fixture(scope="module")
def serve(tmp_path_factory) -> Iterator[object]:
    """serve(bundle, *arguments, **environment) -> url of a server that ends with the module's tests."""
    with ExitStack() as running:

        def get(bundle: Path, *arguments: object, **environment: str) -> str:
            log = tmp_path_factory.mktemp("server") / "log"
            return running.enter_context(serving(bundle, *arguments, log=log, **environment)).url

        yield get
