"""The ASGI app: what is where, and what it is made of."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from engines.errors import FlexError, TokenizerError
from runtime.engine import Engine
from runtime.serve import page
from runtime.serve.completions import Completions, Model
from runtime.serve.errors import ApiError, on_api_error, on_http_error
from runtime.serve.guard import Bodies, Guard, keyed
from runtime.serve.metrics import CONTENT_TYPE, Metrics
from runtime.serve.settings import Settings
from runtime.serve.worker import Worker

COMPLETIONS = "/v1/chat/completions"
DEFAULT_MODEL = "default"  # its folder's name, which a bundle keeps: checkpoints/default


class Service:
    """One engine behind HTTP: what the endpoints share."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        if engine.manifest.prompt.tokenizer is None:
            raise TokenizerError(
                f"the bundle {engine.manifest.name} has no tokenizer",
                expected="one: a chat completion is text",
                fix="put tokenizer.json or tokenizer.model into the checkpoint, and rebuild",
            )
        self._engine, self._settings = engine, settings
        self._begun = int(time.time())
        self.metrics = Metrics()
        self.worker = Worker(engine, settings, self.metrics)
        self.model = Model(engine.manifest.name, f"fp_{engine.digest.removeprefix('sha256:')[:16]}", engine.geometry)
        self.scenes = page.NewScenes(default_model=engine.manifest.source.get("folder") == DEFAULT_MODEL)
        self.bodies = Bodies(settings)
        self.completions = Completions(self.model, self.worker, settings, self.bodies)

    async def health(self, request: Request) -> Response:
        """Whether the process answers at all."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether questions are taken: not when the server is ending, its engine is closed, or its bundle changed."""
        self.worker.require_ready()
        return JSONResponse({"status": "ready"})

    async def models(self, request: Request) -> Response:
        """The one model there is, and what it can."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def one_model(self, request: Request) -> Response:
        """The same, alone."""
        if request.path_params["name"] != self.model.name:
            raise ApiError(404, "this model is not here", code="model_not_found", fix=f"ask for {self.model.name}")
        return JSONResponse(self._described())

    async def measured(self, request: Request) -> Response:
        """The metrics."""
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    def _described(self) -> dict[str, Any]:
        manifest, geometry = self._engine.manifest, self._engine.geometry
        flex = {
            "grid": geometry.cells,
            "pages": geometry.pages,
            "page_budget": manifest.page_budget,
            "layers": list(geometry.reading_layers),
            "conversation": manifest.prompt.turn is not None,
            "system": manifest.prompt.system is not None,
            "context": geometry.context,
            "max_tokens": self._settings.max_tokens,
            "precision": manifest.precision,
            "backend": self._engine.backend,
            "device": self._engine.device,
            "scenes": self.scenes.available,
        }
        return {
            "id": self.model.name,
            "object": "model",
            "created": self._begun,
            "owned_by": "flexattention",
            "flex": flex,
        }


def app(engine: Engine, settings: Settings | None = None) -> Starlette:
    """An ASGI app that answers questions with `engine`: alone under a server, or mounted in another app under a prefix.

    Whoever mounts it takes over its end, too: `lifespan=mounted.router.lifespan_context` of the outer app, or
    `mounted.state.service.worker.drain(seconds)`. The engine stays the caller's, and is not closed. TokenizerError for
    one that takes token ids only.
    """
    settings = settings or Settings()
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.worker.drain, settings.grace)
        await run_in_threadpool(service.scenes.close)

    made = Starlette(
        routes=[
            Route(COMPLETIONS, keyed(service.completions.__call__, settings), methods=["POST"]),
            Route("/v1/models", keyed(service.models, settings)),
            Route("/v1/models/{name:path}", keyed(service.one_model, settings)),
            Route("/metrics", keyed(service.measured, settings)),
            Route("/flex/examples", keyed(page.examples, settings)),
            Route("/flex/examples/{name}", keyed(page.example_image, settings)),
            Route("/flex/scene", keyed(service.scenes.__call__, settings)),
            Route("/health", service.health),
            Route("/health/ready", service.ready),
            Route("/", page.index),
            Mount("/page", page.PageFiles()),
        ],
        middleware=[
            Middleware(Guard, settings=settings, metrics=service.metrics, ending=lambda: not service.worker.accepting)
        ],
        exception_handlers={ApiError: on_api_error, FlexError: on_api_error, HTTPException: on_http_error},
        lifespan=lifespan,
    )
    made.state.service = service
    return made
