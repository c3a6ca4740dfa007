# SPDX-License-Identifier: Apache-2.0
"""Requests and errors in the shape of OpenAI's images API, and their checks against what the bundle can draw."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from districompile.serve.jobs import NAME, Drawing, Facts, Format

MOST_IMAGES = 10  # of one request, as in OpenAI's API
MOST_PREVIEWS = 3
LARGEST_SEED = (1 << 64) - 1
_Text = Annotated[str, StringConstraints(max_length=32_000)]
_Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
_GUIDED = ("batch", "split")
# How many steps a quality stands for where the request does not say, as multiples of the server's own number.
_QUALITY = {"low": 0.5, "standard": 1.0, "medium": 1.0, "auto": 1.0, "high": 2.0, "hd": 2.0}


class ApiError(Exception):
    """An answer other than success: an HTTP status, and the body of OpenAI's errors."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Request(BaseModel):
    """The fields that drawing and editing share. The last six are not OpenAI's."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: _Text | None = None
    model: str | None = Field(default=None, max_length=256)
    n: Annotated[int, Field(ge=1, le=MOST_IMAGES)] | None = None
    size: Annotated[str, StringConstraints(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] | None = None
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: str | None = Field(default=None, max_length=512)
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=MOST_PREVIEWS)] | None = None

    seed: _Seed | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance: Annotated[float, Field(ge=0, le=1000)] | None = None
    negative_prompt: _Text | None = None
    lora: Annotated[str, StringConstraints(pattern=NAME)] | None = None

    @property
    def count(self) -> int:
        """The number of pictures."""
        return self.n or 1

    @property
    def previews(self) -> int:
        """The number of previews of each picture."""
        return self.partial_images or 0


class GenerationRequest(_Request):
    """The body of ``POST /v1/images/generations``."""

    moderation: Literal["auto", "low"] | None = None  # there is none
    style: Literal["vivid", "natural"] | None = None  # changes nothing


class EditRequest(_Request):
    """The fields of ``POST /v1/images/edits`` besides its files."""

    strength: Annotated[float, Field(gt=0, le=1)] | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """``name``: of the model. ``steps``: the number where a request says none. ``most_steps``: the largest number."""

    name: str
    steps: int = 50
    most_steps: int = 200
    loras: tuple[str, ...] = ()


def parsed(model: type[BaseModel], body: bytes) -> Any:
    """Return a JSON body as ``model``. Raise :class:`ApiError` that names the first field at fault."""
    try:
        return model.model_validate_json(body, strict=True)
    except ValidationError as e:
        raise refusal(e) from None


def parsed_form(fields: dict[str, str]) -> EditRequest:
    """Return the text fields of a form as a request. Raise :class:`ApiError`."""
    try:
        return EditRequest.model_validate(fields)
    except ValidationError as e:
        raise refusal(e) from None


def refusal(error: ValidationError) -> ApiError:
    """Return the answer to a body that does not fit."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: {_short(where)}", code="unknown_parameter", param=_short(where))
    message = str(first["msg"])
    named = message if where is None else f"Invalid value for {_short(where)!r}: {message}"
    return ApiError(400, named, code="invalid_value", param=_short(where))


def _short(text: str | None) -> str | None:
    """Return a name from a request so that it can stand in an answer."""
    if text is None:
        return None
    plain = text.encode("ascii", "replace").decode()
    return plain if len(plain) <= 80 else plain[:77] + "..."


def check(request: _Request, facts: Facts, limits: Limits, image: str | None = None, mask: str | None = None) -> None:
    """Check that the bundle can draw what a request asks for. Raise :class:`ApiError` that says what it can."""

    def refuse(param: str, message: str, code: str = "invalid_value") -> ApiError:
        return ApiError(400, message, code=code, param=param)

    if request.model not in (None, limits.name):
        raise ApiError(
            404, f"The model {_short(request.model)!r} does not exist here; this server has {limits.name!r}.",
            code="model_not_found", param="model",
        )  # fmt: skip
    if facts.text and not (request.prompt and request.prompt.strip()):
        raise refuse("prompt", "'prompt' is required: the model draws from text.", "missing_required_parameter")
    if not facts.text and request.prompt:
        raise refuse("prompt", "This model does not draw from text: leave 'prompt' out.")
    size_of(request, facts)
    most = min(limits.most_steps, facts.most_steps)
    if request.steps is not None and request.steps > most:
        raise refuse("steps", f"'steps' is {request.steps}; at most {most} are drawn here.")
    if request.guidance is not None:
        if facts.guidance in _GUIDED and request.guidance <= 1:
            raise refuse("guidance", f"The bundle was made with guidance: 'guidance' must be above 1, not "
                         f"{request.guidance:g}.")  # fmt: skip
        if facts.guidance not in _GUIDED and request.guidance > 1:
            raise refuse("guidance", "The bundle was made without guidance (--cfg none): leave 'guidance' out.")
    if request.negative_prompt and not facts.negative:
        raise refuse("negative_prompt", "The bundle was made without guidance: 'negative_prompt' has no effect.")
    if request.lora is not None and request.lora not in limits.loras:
        known = ", ".join(limits.loras) or "none"
        raise refuse("lora", f"There is no LoRA {request.lora!r}; this server has: {known}.")
    if request.previews and not request.stream:
        raise refuse("partial_images", "'partial_images' needs 'stream': true.")
    if request.previews and not facts.previews:
        raise refuse("partial_images", "This pipeline does not show its steps: leave 'partial_images' out.")
    if request.stream and request.response_format == "url":
        raise refuse("response_format", "A stream carries pictures as b64_json.")
    if request.output_compression is not None and request.output_format in (None, "png"):
        raise refuse("output_compression", "'output_compression' needs 'output_format' jpeg or webp.")
    drawn = -(-request.count // facts.images) * facts.images
    if request.seed is not None and request.seed + drawn - 1 > LARGEST_SEED:
        raise refuse("seed", f"The seeds of {drawn} pictures end at {LARGEST_SEED}: use a smaller one.")
    if image is not None and mask is None and not facts.edits:
        raise refuse("image", "This pipeline has no form that starts from a picture.", "unsupported")
    if mask is not None and not facts.inpaints:
        raise refuse("mask", "This pipeline has no form that takes a mask.", "unsupported")
    strength = getattr(request, "strength", None)
    steps = steps_of(request, facts, limits)
    if strength is not None and int(steps * strength) < 1:
        raise refuse("strength", f"'strength' {strength:g} leaves none of the {steps} steps.")


def size_of(request: _Request, facts: Facts) -> tuple[int, int]:
    """Return the width and height of a request. Raise :class:`ApiError` for a size that the bundle does not have."""
    if request.size in (None, "auto"):
        return facts.sizes[0] if facts.sizes else (1, 1)
    width, _, height = str(request.size).partition("x")
    size = (int(width), int(height))
    if size not in facts.sizes:
        known = ", ".join(f"{w}x{h}" for w, h in facts.sizes) or "auto"
        raise ApiError(
            400, f"The size {request.size} is not in this bundle; it has: {known}.", code="invalid_size", param="size"
        )
    return size


def steps_of(request: _Request, facts: Facts, limits: Limits) -> int:
    """Return the number of steps: the request's own, else the server's as the quality changes it."""
    if request.steps is not None:
        return request.steps
    wanted = round(limits.steps * _QUALITY[request.quality or "auto"])
    return max(1, min(wanted, limits.most_steps, facts.most_steps))


def drawings(
    request: _Request, facts: Facts, limits: Limits, name: str, image: str | None = None, mask: str | None = None
) -> list[Drawing]:
    """Return the calls of the pipeline that give the pictures of a request, in order.

    The i-th picture has the request's seed plus i. Without a seed a random one is taken.
    """
    check(request, facts, limits, image, mask)
    seed = secrets.randbelow(1 << 32) if request.seed is None else request.seed
    calls = -(-request.count // facts.images)
    return [
        Drawing(
            id=f"{name}.{i}",
            prompt=request.prompt if facts.text else None,
            negative_prompt=request.negative_prompt or None,
            steps=steps_of(request, facts, limits),
            guidance=request.guidance,
            seed=seed + i * facts.images,
            size=size_of(request, facts),
            image=image,
            mask=mask,
            strength=getattr(request, "strength", None),
            lora=request.lora,
            previews=request.previews,
            format=request.output_format or "png",
            compression=100 if request.output_compression is None else request.output_compression,
        )
        for i in range(calls)
    ]
