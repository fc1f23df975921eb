"""A real browser before the real server. Each test gets a window without a past."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from runtime import Engine
from tests.runtime.serve.browser.visit import Visit
from tests.runtime.serve.command import Server, serving

CHROMIUM = "/usr/bin/chromium"
PATIENCE = 15_000  # milliseconds until what should be there must be there, on a busy machine, too
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="session")
def chromium() -> str:
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"no browser: {CHROMIUM} is not installed (apt-get install chromium)")
    return CHROMIUM


@pytest.fixture(scope="package")  # Playwright keeps an event loop running, in which other tests cannot run theirs
def browser(chromium) -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="session")
def engine(default_bundle) -> Engine:
    """What the server's answers are compared with."""
    return Engine(default_bundle("fp16"), threads=1)


@pytest.fixture(scope="session")
def url(chromium, default_bundle, tmp_path_factory) -> Iterator[str]:
    """Of a server with the default model, for tests that leave it alive."""
    with serving(default_bundle("fp16"), "--threads", 1, log=tmp_path_factory.mktemp("server") / "log") as server:
        yield f"{server.url}/"


@pytest.fixture
def own_server(chromium, default_bundle, tmp_path) -> Iterator[Callable[..., Server]]:
    """own_server(**environment) -> a server of the test's own."""
    with ExitStack() as running:

        def get(**environment: str) -> Server:
            log = tmp_path / "log"
            return running.enter_context(serving(default_bundle("fp16"), "--threads", 1, log=log, **environment))

        yield get


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., Visit]]:
    """visit(url, **options of the window) -> the page, opened there. Afterwards: nothing went wrong unseen."""
    made: list[Visit] = []

    def get(url: str, **options: object) -> Visit:
        context = browser.new_context(**{"reduced_motion": "reduce", **DESKTOP, **options})
        context.set_default_timeout(PATIENCE)
        made.append(Visit(context.new_page(), url))
        return made[-1].open()

    yield get
    for each in made:
        each.page.context.close()
        each.check()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Where screenshots go: FLEX_SCREENSHOTS names the folder, or they are gone with the test's."""
    named = os.environ.get("FLEX_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
