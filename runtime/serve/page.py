"""The page at /, whose files lie in page/ beside this one, and the examples that it offers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from runtime.serve.errors import ApiError

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
    """The shipped examples: image, question, answer; none where they are not installed."""
    listed = EXAMPLES / "examples.json"
    if not listed.is_file():
        return JSONResponse([])
    root = request.scope.get("root_path", "")
    found = [{**each, "image": f"{root}/flex/examples/{each['image']}"} for each in json.loads(listed.read_text())]
    return JSONResponse(found)


async def example_image(request: Request) -> Response:
    """One of the images that `examples` lists."""
    name, listed = request.path_params["name"], EXAMPLES / "examples.json"
    names = {each["image"] for each in json.loads(listed.read_text())} if listed.is_file() else set()
    if name not in names:
        raise ApiError(404, "no such example", code="not_found", fix="see /flex/examples")
    return FileResponse(EXAMPLES / name, headers=_FRESH)
