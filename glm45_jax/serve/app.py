"""The application: routes, and errors in the form of each."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio.to_thread
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from glm45_jax.errors import UserError
from glm45_jax.infer import Engine
from glm45_jax.serve.answers import Gate
from glm45_jax.serve.asked import Model, read_chat, read_completion
from glm45_jax.serve.chat import ChatWriter
from glm45_jax.serve.completions import CompletionWriter
from glm45_jax.serve.errors import ApiError
from glm45_jax.serve.forms import ANTHROPIC, TYPED, form_of
from glm45_jax.serve.guard import Guard
from glm45_jax.serve.messages import AnthropicWriter, count_tokens, read_anthropic
from glm45_jax.serve.metrics import Metrics
from glm45_jax.serve.options import ServeOptions
from glm45_jax.serve.page import page_route
from glm45_jax.serve.record import record_of
from glm45_jax.serve.responses import ResponseWriter
from glm45_jax.serve.responses_asked import read_response
from glm45_jax.serve.service import Service
from glm45_jax.serve.stored import Store
from glm45_jax.serve.tokens import detokenize, tokenize, tokenizer_info


class App:
    """An ASGI application that serves one model over the HTTP interfaces of OpenAI and Anthropic.

    Args:
      engine: with its tokenizer; whoever made it closes it.
      name: what the model is called.

    Raises:
      UserError: the engine has no tokenizer.

    Attributes:
      engine: the engine.
      gate: set `gate.draining` and new requests get status 503.
    """

    def __init__(self, engine: Engine, name: str = "glm", options: ServeOptions | None = None):
        self.options = options = options or ServeOptions()
        if engine.tokenizer is None:
            raise UserError("the engine needs its tokenizer: Engine(..., tokenizer=tokenizer)")
        self.engine, model = engine, Model(name, engine, engine.tokenizer, options)
        self.gate = Gate(engine.options.slots + options.queue)
        service, metrics = Service(model, self.gate), Metrics(engine, self.gate)
        store = Store(options.store_bytes)
        routes = _answering(service, store) + _kept(store) + _about(service, metrics)
        errors: dict[Any, Any] = {
            ApiError: _api_error, HTTPException: _http_error, ClientDisconnect: _gone, Exception: _own_fault,
        }  # fmt: skip
        app = Starlette(routes=routes, exception_handlers=errors)
        app.router.redirect_slashes = False
        self._app = Guard(app, options.api_keys, metrics, frozenset(route.path for route in routes))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)


def _answering(service: Service, store: Store) -> list[Route]:
    """The routes that the engine works for, and those that prepare what they are asked."""

    async def chat(request: Request) -> Response:
        return await service.answer(request, read_chat, ChatWriter)

    async def completions(request: Request) -> Response:
        return await service.answer(request, read_completion, CompletionWriter)

    async def messages(request: Request) -> Response:
        return await service.answer(request, read_anthropic, AnthropicWriter, ANTHROPIC)

    async def responses(request: Request) -> Response:
        read, writer = functools.partial(read_response, store), functools.partial(ResponseWriter, store)
        return await service.answer(request, read, writer, TYPED)

    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", _in_a_thread(service, count_tokens), methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/tokenize", _in_a_thread(service, tokenize), methods=["POST"]),
        Route("/detokenize", _in_a_thread(service, detokenize), methods=["POST"]),
    ]


def _kept(store: Store) -> list[Route]:
    """Answers that were kept."""

    async def response(request: Request) -> Response:
        name = request.path_params["name"]
        stored = store.get(name)
        if stored is None:
            raise ApiError(404, "there is no such answer; only those asked for with store: true are kept for a while")
        if request.method == "DELETE":
            store.drop(name)
            return JSONResponse({"id": name, "object": "response", "deleted": True})
        return JSONResponse(stored.response)

    return [Route("/v1/responses/{name}", response, methods=["GET", "DELETE"])]


def _about(service: Service, metrics: Metrics) -> list[Route]:
    """The model, and how the server is."""

    async def models(request: Request) -> Response:
        card = _card(service)
        ends = {"has_more": False, "first_id": card["id"], "last_id": card["id"]}
        return JSONResponse({"object": "list", "data": [card], **ends})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != service.model.name:
            raise ApiError(404, "there is no such model; GET /v1/models names the one there is", code="model_not_found")
        return JSONResponse(_card(service))

    async def health(request: Request) -> Response:
        works = _works(service)
        return JSONResponse({"status": "ok" if works else "failed"}, 200 if works else 503)

    async def ready(request: Request) -> Response:
        is_ready = _works(service) and not service.gate.draining
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def info(request: Request) -> Response:
        return JSONResponse(tokenizer_info(service.model))

    async def scrape(request: Request) -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return [
        page_route(),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", scrape),
        Route("/tokenizer_info", info),
    ]


def _in_a_thread(
    service: Service, work: Callable[[Model, bytes], dict[str, Any]]
) -> Callable[[Request], Awaitable[Response]]:
    """A route whose answer needs no engine."""

    async def route(request: Request) -> Response:
        body = await service.body(request)
        return JSONResponse(await anyio.to_thread.run_sync(functools.partial(work, service.model, body)))

    return route


def _card(service: Service) -> dict[str, Any]:
    """The model, with the fields of OpenAI's form and Anthropic's."""
    name, since = service.model.name, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(service.created))
    return {
        "id": name, "object": "model", "created": service.created, "owned_by": "glm45-jax",
        "max_model_len": service.model.engine.room, "type": "model", "display_name": name, "created_at": since,
    }  # fmt: skip


def _works(service: Service) -> bool:
    return service.model.engine.failure is None


# --- errors ----------------------------------------------------------------------------------------------------------


async def _api_error(request: Request, error: ApiError) -> Response:
    return form_of(request.url.path).response(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    what = {404: "there is no such route", 405: f"{request.method} is not allowed here"}
    said = ApiError(error.status_code, what.get(error.status_code, error.detail), headers=error.headers)
    return form_of(request.url.path).response(said)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    record_of(request.scope).gone = True
    return Response(status_code=499)


async def _own_fault(request: Request, error: Exception) -> Response:
    said = ApiError(500, "the server has made an error; its log tells which")
    return form_of(request.url.path).response(said)
