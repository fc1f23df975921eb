"""The page at /, whose files lie in page/ beside this one, and the examples that it offers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from runtime.serve.errors import RETRY_AFTER, ApiError
from runtime.serve.scenes import SEEDS, Scenes

FOLDER = Path(__file__).parent / "page"
EXAMPLES = Path(__file__).parents[2] / "examples"  # there in a checkout of the repository
_FRESH = {"Cache-Control": "no-cache"}  # kept, and asked for again: a newer server has a newer page


class PageFiles(StaticFiles):
    """The page's files."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER, check_dir=False)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """As StaticFiles makes it, but checked for a newer one each time."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(_FRESH)
        return response


async def index(request: Request) -> Response:
    """The page itself."""
    path = FOLDER / "index.html"
    if not path.is_file():
        raise ApiError(404, "this server has no page", code="not_found", fix="it answers at /v1/chat/completions")
    return FileResponse(path, headers=_FRESH)


async def examples(request: Request) -> Response:
    """The shipped examples: image (its path from the root of this app), question, answer, and of a follow-up history:
    [question, answer] of each turn before it; none where they are not installed."""
    return JSONResponse([{**each, "image": f"/flex/examples/{each['image']}"} for each in _listed()])


async def example_image(request: Request) -> Response:
    """One of the images that `examples` lists."""
    name = request.path_params["name"]
    if not any(each["image"] == name for each in _listed()):
        raise ApiError(404, "no such example", code="not_found", fix="see /flex/examples")
    return FileResponse(EXAMPLES / name, headers=_FRESH)


def _listed() -> list[dict[str, Any]]:
    """The shipped examples; none where they are not installed."""
    path = EXAMPLES / "examples.json"
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return found


class NewScenes:
    """Endpoint of new scenes for the default model, where its generator is installed."""

    MOST = 4  # that wait for the generator at a time; each of them holds a thread

    def __init__(self, *, default_model: bool) -> None:
        """`default_model`: whether that is served; no other knows such scenes."""
        self.available = default_model and Scenes.available()
        self._scenes, self._asked = Scenes(), 0

    async def __call__(self, request: Request) -> Response:
        """The scene of ?seed=N: image and questions with their answers."""
        if not self.available:
            raise ApiError(
                404, "no scenes are drawn here", code="not_found",
                fix="serve the default model, from a checkout with the extra export installed",
            )  # fmt: skip
        seed = request.query_params.get("seed", "")
        if not (seed.isascii() and seed.isdigit() and len(seed) < 20 and int(seed) < SEEDS):
            raise ApiError(400, f"seed: expected 0 .. {SEEDS - 1}", code="invalid_value", param="seed")
        if self._asked >= self.MOST:
            raise ApiError(429, "too many scenes are being drawn", code="queue_full", headers=RETRY_AFTER)
        self._asked += 1
        try:
            return JSONResponse(await run_in_threadpool(self._scenes.draw, int(seed)))
        finally:
            self._asked -= 1

    def close(self) -> None:
        """End the generator."""
        self._scenes.close()
