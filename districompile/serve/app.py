# SPDX-License-Identifier: Apache-2.0
"""The HTTP server as an ASGI application: OpenAI's images API, a page to try it, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from districompile.errors import Error
from districompile.serve.access import Access
from districompile.serve.answers import Answer, check_json
from districompile.serve.api import (
    ApiError,
    EditRequest,
    GenerationRequest,
    Limits,
    check,
    drawings,
    parsed,
    parsed_form,
    size_of,
)
from districompile.serve.dispatcher import Artists, Dispatcher, Ticket
from districompile.serve.group import Group
from districompile.serve.jobs import Drawn, Facts, GroupOptions
from districompile.serve.pictures import load_formats, prepared
from districompile.serve.records import Metrics, Pictures, RequestLog
from districompile.version import __version__

_PAGE = {"": ("page.html", "text/html"), "page.js": ("page.js", "text/javascript"),
         "page.css": ("page.css", "text/css")}  # fmt: skip
_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
DRAIN = 5.5  # seconds that accepted requests have at the end; what is left of ten ends the ranks
STOP = 3.0  # seconds that the ranks have to end
_FIELDS = 40  # of a form
_FILES = ("image", "mask")


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """How a server answers.

    ``token``: needed of every client, None for no token. ``queue``: how many requests may wait. ``hosts``: names under
    which the server is asked, None for any. ``seconds``: that one request may be drawn for.
    """

    limits: Limits
    token: str | None = None
    queue: int = 16
    hosts: frozenset[str] | None = None
    seconds: float = 600.0
    log: RequestLog | None = None


def bundle_app(options: ServeOptions, ranks: GroupOptions) -> FastAPI:
    """Return a server whose ranks start and stop with it, for a host of ASGI applications such as Ray Serve."""
    return create_app(options, Group(ranks), own=True)


def create_app(options: ServeOptions, group: Artists, own: bool = False) -> FastAPI:
    """Return the server in front of ``group``. ``app.state.dispatcher`` is its queue.

    The application starts and ends the queue; the group too, if it is its ``own``. Otherwise whoever runs it does that.
    """
    limits = options.limits
    metrics, pictures = Metrics(), Pictures()
    dispatcher = Dispatcher(group, options.queue, options.seconds)

    def count(ticket: Ticket, drawn: Drawn) -> None:
        metrics.images.inc(min(len(drawn.images), ticket.count))
        for phase, steps in (("exact", drawn.exact), ("displaced", drawn.displaced), ("reused", drawn.reused)):
            if phase != "reused" or steps is not None:
                metrics.steps.labels(phase).inc(steps or 0)

    dispatcher.on_drawn = count
    if isinstance(group, Group):
        group.changed = dispatcher.changed
    metrics.watch("waiting_requests", "Accepted requests that wait", lambda: dispatcher.waiting)
    metrics.watch("running_requests", "Requests that are being drawn", lambda: int(dispatcher.running is not None))
    metrics.watch("group_ready", "1 if all ranks are loaded and alive", lambda: int(group.ready))
    metrics.watch("group_restarts", "How often the ranks were started again", lambda: getattr(group, "restarts", 0))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        dispatcher.start()
        await asyncio.to_thread(load_formats)
        if own and isinstance(group, Group):
            await group.start()
            await group.wait_started()
            if group.fatal is not None:
                await group.stop(STOP)
                raise Error(group.fatal)
        yield
        await dispatcher.end(DRAIN if own else 0.0)
        await dispatcher.close()
        if own and isinstance(group, Group):
            await group.stop(STOP)

    app = FastAPI(
        title="districompile", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        exception_handlers={ApiError: _api_error, StarletteHTTPException: _http_error, Exception: _defect},
    )  # fmt: skip
    app.state.dispatcher, app.state.metrics = dispatcher, metrics
    app.add_middleware(Access, token=options.token, hosts=options.hosts, metrics=metrics, log=options.log)

    def accepted(
        request: Request, body: GenerationRequest | EditRequest, facts: Facts, event: str, image: str | None = None,
        mask: str | None = None,
    ) -> Response:  # fmt: skip
        jobs = drawings(body, facts, limits, request.scope["name"], image, mask)
        first = jobs[0]
        request.scope["record"].update(
            n=body.count, steps=first.steps, seed=first.seed, prompt_chars=len(body.prompt or ""),
            size="{}x{}".format(*first.size), lora=body.lora, stream=bool(body.stream),
        )  # fmt: skip
        ticket = dispatcher.accept(request.scope["name"], jobs, body.count)
        about = {
            "background": "opaque", "output_format": first.format, "quality": body.quality or "auto",
            "size": "{}x{}".format(*first.size) if facts.sizes else "auto",
        }  # fmt: skip
        url = str(request.base_url)
        return Answer(
            dispatcher, ticket, about, pictures=pictures, event=event if body.stream else None,
            url=(lambda kept: f"{url}v1/files/{kept}") if body.response_format == "url" else None,
        )  # fmt: skip

    @app.post("/v1/images/generations", openapi_extra=_json_body(GenerationRequest))
    async def generate(request: Request) -> Response:
        """Draw pictures."""
        check_json(request.headers.get("content-type", ""))
        body: GenerationRequest = parsed(GenerationRequest, await request.body())
        return accepted(request, body, dispatcher.check_open(), "image_generation")

    @app.post("/v1/images/edits", openapi_extra=_form_body())
    async def edit(request: Request) -> Response:
        """Draw pictures that start from one. The transparent part of a mask is drawn anew."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            raise ApiError(415, "Send a form: 'Content-Type: multipart/form-data'.", code="unsupported_media_type")
        body, files = await _form(request)
        facts = dispatcher.check_open()
        if "image" not in files:
            raise ApiError(400, "'image' is required.", code="missing_required_parameter", param="image")
        check(body, facts, limits, "", "" if "mask" in files else None)  # before the pictures are read
        size = size_of(body, facts)
        picture, mask = await prepared(files["image"], files.get("mask"), size if facts.sizes else None)
        return accepted(request, body, facts, "image_edit", picture, mask)

    @app.delete("/v1/images/requests/{name}")
    async def cancel(name: str) -> dict[str, Any]:
        """Cancel a request by the X-Request-Id that it was made with, or that a stream was answered with."""
        if not dispatcher.cancel(name):
            raise ApiError(404, f"There is no request {name[:64]!r} that waits or is drawn.", code="not_found")
        return {"id": name, "object": "images.request", "cancelled": True}

    @app.get("/v1/files/{name}")
    async def file(name: str) -> Response:
        """Return a picture of a request with response_format url."""
        data = pictures.get(name)
        if data is None:
            raise ApiError(404, "There is no such picture, or not any more.", code="not_found")
        return Response(data, media_type=_TYPES.get(name.rpartition(".")[2], "application/octet-stream"))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [model_card(limits, group.facts)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Show the model."""
        if name != limits.name:
            raise ApiError(404, f"This server has the model {limits.name!r} alone.", code="model_not_found")
        return model_card(limits, group.facts)

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def ready() -> Response:
        """Say whether requests are drawn now."""
        if dispatcher.ending or not group.ready:
            reason = "ending" if dispatcher.ending else group.problem or "loading"
            return JSONResponse({"status": "not ready", "reason": reason}, 503)
        return JSONResponse({"status": "ready", "waiting": dispatcher.waiting})

    @app.get("/metrics")
    async def metric_text() -> Response:
        """Return the metrics for Prometheus."""
        text = metrics.text(getattr(group, "memory", {}), getattr(group, "pids", {}))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    for name, (source, kind) in _PAGE.items():
        text = resources.files("districompile.serve").joinpath("page").joinpath(source).read_text(encoding="utf-8")
        app.add_api_route(f"/{name}", _static(text, kind), include_in_schema=False)
    return app


def model_card(limits: Limits, facts: Facts | None) -> dict[str, Any]:
    """Return the entry of the model, with what it can draw as far as that is known."""
    card: dict[str, Any] = {"id": limits.name, "object": "model", "created": 0, "owned_by": "districompile"}
    if facts is not None:
        card |= {
            "sizes": [f"{w}x{h}" for w, h in facts.sizes] or ["auto"],
            "steps": min(limits.steps, facts.most_steps), "most_steps": min(limits.most_steps, facts.most_steps),
            "text": facts.text, "guidance": facts.guidance != "none", "edits": facts.edits,
            "inpaints": facts.inpaints, "previews": facts.previews, "loras": list(limits.loras),
            "gpus": facts.world_size, "backend": facts.backend,
        }  # fmt: skip
    return card


async def _form(request: Request) -> tuple[EditRequest, dict[str, bytes]]:
    """Return the fields and files of a form."""
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    try:
        async with request.form(max_files=2, max_fields=_FIELDS, max_part_size=1 << 20) as form:
            for key, value in form.multi_items():
                name = key.removesuffix("[]")
                if name in fields or name in files:
                    raise ApiError(400, f"{name[:80]!r} is given twice.", code="invalid_value", param=name[:80])
                if isinstance(value, str):
                    fields[name] = value
                elif name in _FILES:
                    files[name] = await value.read()
                else:
                    raise ApiError(400, f"Unknown file: {key[:80]}", code="unknown_parameter", param=key[:80])
    except StarletteHTTPException as e:
        raise ApiError(400, f"The form cannot be read: {e.detail}", code="invalid_form") from None
    for key in _FILES:
        if key in fields:
            raise ApiError(400, f"{key!r} must be a file.", code="invalid_value", param=key)
    return parsed_form(fields), files


def _static(text: str, kind: str) -> Any:
    async def static() -> Response:
        return Response(text, media_type=kind, headers={"content-security-policy": _POLICY})

    return static


def _json_body(model: type[GenerationRequest]) -> dict[str, Any]:
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _form_body() -> dict[str, Any]:
    schema = EditRequest.model_json_schema()
    for name in ("image", "mask"):
        schema["properties"][name] = {"type": "string", "format": "binary"}
    schema["required"] = ["image"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    known = {404: "There is nothing at this address.", 405: "This address does not take that method."}
    body = ApiError(error.status_code, known.get(error.status_code, str(error.detail))).body
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _defect(_: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, f"A defect of the server: {type(error).__name__}.", code="defect").body, 500)
