"""A web app of your own with a model in it: python examples/app.py [--bundle FOLDER] [--port N].

Its own route: curl "http://127.0.0.1:8080/number?shape=red+star" --data-binary @examples/poster.png
Below /vlm: OpenAI's API, and a page to ask at. It needs the extra `serve`."""

import argparse

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from runtime import Engine, FlexError
from runtime.serve import app

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--bundle", default="build/default-fp16", help="made by scripts/quickstart.sh")
parser.add_argument("--port", type=int, default=8080)
given = parser.parse_args()


async def number(request: Request) -> PlainTextResponse:
    question = f"what number is in the {request.query_params.get('shape', 'red star')}?"
    try:  # in a thread: the app goes on while this waits for its answer
        answer = await run_in_threadpool(engine.generate, await request.body(), question, max_new_tokens=16)
    except FlexError as error:  # no picture, too long a question: found, expected, fix
        return PlainTextResponse(f"{error}\n", 400)
    return PlainTextResponse(f"{answer}\n")


try:
    engine = Engine(given.bundle)
except FlexError as error:
    raise SystemExit(f"error: {error}") from None
vlm = app(engine)
routes = [Route("/number", number, methods=["POST"]), Mount("/vlm", vlm)]
uvicorn.run(Starlette(routes=routes, lifespan=vlm.router.lifespan_context), port=given.port)
