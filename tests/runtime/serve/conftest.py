"""What tests of the server share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.applications import Starlette

from engines.bundle.manifest import PROMPT_TEMPLATE
from runtime import Engine
from runtime.serve import Settings, app
from tests.runtime.questions import TALKATIVE
from tests.runtime.serve.command import serving


@pytest.fixture(scope="module")
def serve(tmp_path_factory) -> Iterator[object]:
    """serve(bundle, *arguments, **environment) -> url of a server that ends with the module's tests."""
    with ExitStack() as running:

        def get(bundle: Path, *arguments: object, **environment: str) -> str:
            log = tmp_path_factory.mktemp("server") / "log"
            return running.enter_context(serving(bundle, *arguments, log=log, **environment)).url

        yield get


@pytest.fixture(scope="session")
def chat_bundle(random_model) -> Path:
    """Of a random model with the official template of conversations; its name is "serve-fp32"."""
    return random_model("serve", TALKATIVE, tokenizer=True, template=PROMPT_TEMPLATE)[1]


@pytest.fixture(scope="module")
def engine(chat_bundle) -> Iterator[Engine]:
    with Engine(chat_bundle) as opened:
        yield opened


@pytest.fixture
def made(engine) -> Iterator[Callable[..., Starlette]]:
    """made(**settings) -> an app on `engine`, whose worker ends with the test."""
    with ExitStack() as ending:

        def get(**settings: object) -> Starlette:
            served = app(engine, Settings(**settings))
            ending.callback(served.state.service.worker.drain, 0.0)
            return served

        yield get
