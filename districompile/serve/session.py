# SPDX-License-Identifier: Apache-2.0
"""Draw what requests ask for, in the process of one rank, with pipelines that stay loaded."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import inspect
import io
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from districompile.bundle.bundle import Bundle
from districompile.cli.common import UsageError, load_extensions, quiet_libraries, source_of
from districompile.cli.generate import GUIDED, Request, as_bytes, as_pictures, decoded, draw
from districompile.cli.options import NO_VAE
from districompile.cli.pictures import PNG_LEVEL
from districompile.cli.pipeline import MEETING, attach, open_pipeline
from districompile.models.sources import import_diffusers, network_name
from districompile.runtime.load import load
from districompile.runtime.module import DistributedModule
from districompile.runtime.opening import upload_ahead
from districompile.serve.jobs import Drawing, Drawn, Facts, Format, GroupOptions

Show = Callable[[int, str], None]  # the number of a preview, and its file in base64


class Cancelled(Exception):
    """A drawing was ended between two steps, because nobody waits for it any more."""


class DrawingSession:
    """The pipelines of one rank: from text, from a picture, and from a picture with a mask.

    They share their networks. ``loras`` are refits of the bundle by the name of their LoRA; each is loaded once.
    """

    def __init__(self, options: GroupOptions, loras: Mapping[str, Path], first: bool) -> None:
        bundle = Bundle.open(options.bundle, verify=False)  # which is checked as it is loaded
        model = source_of(bundle.manifest, options.model)
        how: dict[str, Any] = {
            "transport": options.transport,
            "cuda_graph": options.cuda_graph,
            "device": options.device,
            "native_code": options.native_code,
            "timeout": options.timeout,
        }
        self._first = first
        quiet_libraries()
        load_extensions(options.extensions)
        upload_ahead(bundle, options.device)
        self._text = open_pipeline(model, bundle.plan.options, bundle)
        vae = None if options.vae in (None, NO_VAE) else Path(options.vae)  # chosen by the supervisor
        meeting = max(60.0, MEETING * options.timeout)
        compiled = attach(self._text, options.bundle, vae, start_timeout=meeting, warm_up=True, **how)
        self._modules: dict[str | None, DistributedModule] = {None: compiled}
        for name in sorted(loras):  # in the same order on all ranks
            self._modules[name] = load(loras[name], warm_up=True, **how)
        self._image, self._inpaint = (_form(self._text, name) for name in ("Image2Image", "Inpainting"))
        self._options = compiled.plan.options
        self._all_decode = _decodes_together(self._text)
        self.facts = self._facts(bundle)
        self._warm_up()

    def _warm_up(self) -> None:
        """Draw once, so that no request waits for the first calls of text encoders, sampler and VAE."""
        prompt = "" if self.facts.text else None
        request = Request(prompt, None, min(2, self.facts.most_steps), None, 0, self._options)
        with contextlib.suppress(UsageError):  # of a pipeline that always starts from a picture
            draw(self._text, request, decode=self._first or self._all_decode)
        self._modules[None].reset()

    def _facts(self, bundle: Bundle) -> Facts:
        pipe, options = self._text, self._options
        plan = self._modules[None].plan
        accepted = inspect.signature(pipe.__call__).parameters
        shapes = [p.options for p in bundle.plans.values() if p.options.images == options.images]
        sizes = dict.fromkeys((o.width, o.height) for o in shapes if o.width is not None and o.height is not None)
        steps = getattr(pipe.scheduler, "config", {}).get("num_train_timesteps")
        return Facts(
            world_size=plan.world_size,
            backend=str(bundle.manifest["backend"]),
            sizes=tuple(sizes),
            images=options.images,
            guidance=options.guidance or "none",
            most_steps=steps if isinstance(steps, int) and steps > 0 else 1000,
            text=any(i.path == "encoder_hidden_states" for i in plan.inputs),
            negative="negative_prompt" in accepted and options.guidance in GUIDED,
            edits=self._image is not None,
            inpaints=self._inpaint is not None,
            previews="callback_on_step_end" in accepted and hasattr(getattr(pipe, "vae", None), "decode"),
        )

    def draw(self, job: Drawing, cancelled: Callable[[], bool], show: Show) -> Callable[[], Drawn] | None:
        """Draw the pictures of one call of the pipeline. Rank 0 returns what makes their files, and other ranks None.

        What makes the files may be called in any thread, also during the next drawing. ``cancelled`` is asked on rank 0
        before each step. ``show`` is called there for each preview.

        Raises :class:`Cancelled`, :class:`districompile.errors.RanksDifferError` on the other ranks of a cancelled
        drawing, and :class:`districompile.errors.Error` for a request that the pipeline refuses.
        """
        pipe = self._text if job.image is None else self._image if job.mask is None else self._inpaint
        unet = self._modules[job.lora]
        setattr(pipe, network_name(pipe), unet)
        options = dataclasses.replace(self._options, width=job.size[0], height=job.size[1])
        request = Request(job.prompt, job.negative_prompt, job.steps, job.guidance, job.seed, options)
        # Each picture has a generator of its own, so that it does not depend on the others of its batch.
        generators = [torch.Generator("cpu").manual_seed(job.seed + i) for i in range(self._options.images)]
        extra = {
            "generator": generators if len(generators) > 1 else generators[0],
            "image": None if job.image is None else _picture(job.image, "RGB"),
            "mask_image": None if job.mask is None else _picture(job.mask, "L"),
            "strength": job.strength,
        }

        def check(*_: Any) -> None:
            if cancelled():
                unet.stop()
                raise Cancelled

        hook = unet.register_forward_pre_hook(check) if self._first else None
        decode = self._first or self._all_decode
        try:
            with _estimates(pipe.scheduler if job.previews else None) as estimate:
                on_step = functools.partial(self._preview, pipe, job, estimate, show)
                picture = draw(
                    pipe, request, decode=decode, extra=extra, on_step=on_step if job.previews and decode else None
                )
        finally:
            if hook is not None:
                hook.remove()
        if not self._first or picture.pixels is None:
            return None
        tensors = {"latents": picture.latents, "image": picture.pixels}
        not_finite = tuple(n for n, t in tensors.items() if t is not None and not bool(t.isfinite().all()))
        images = as_bytes(picture.pixels)
        return functools.partial(_as_files, images, job, picture.seconds, dict(unet.image_calls), not_finite)

    def _preview(self, pipe: Any, job: Drawing, estimate: list[Tensor], show: Show, done: int, latents: Tensor) -> None:
        total = int(getattr(pipe, "num_timesteps", 0) or job.steps)
        number = preview_at(done, total, job.previews)
        if number is None:
            return
        shown = estimate[0] if estimate and estimate[0].shape == latents.shape else latents
        # A VAE that is a bundle may know the pictures of a whole call alone
        pixels = decoded(pipe, shown if self._all_decode else shown[:1])
        if self._first:
            show(number, encoded(as_bytes(pixels), job.format, job.compression)[0])

    def close(self) -> None:
        """Close all modules together with the other ranks."""
        for module in self._modules.values():
            module.close()


def _as_files(
    images: Tensor, job: Drawing, seconds: float, calls: Mapping[str, int], not_finite: tuple[str, ...]
) -> Drawn:
    started = time.perf_counter()
    files = tuple(encoded(images, job.format, job.compression))
    return Drawn(
        images=files, seconds=seconds, encoding=time.perf_counter() - started, exact=calls["exact"],
        displaced=calls["displaced"], reused=calls.get("reused"), not_finite=not_finite,
    )  # fmt: skip


def preview_at(done: int, total: int, count: int) -> int | None:
    """Return the number of the preview that is shown after ``done`` of ``total`` steps; None for no preview.

    ``count`` previews are spread over the steps. None is shown after the last step, which gives the picture itself.
    """
    places = [total * (i + 1) // (count + 1) for i in range(count)]
    places = sorted({p for p in places if 0 < p < total})
    return places.index(done) if done in places else None


def encoded(images: Tensor, kind: Format, compression: int) -> list[str]:
    """Return images in 8 bits (B, H, W, 3) as files in base64 (:func:`~districompile.cli.generate.as_bytes`)."""
    how: dict[str, Any] = {"compress_level": PNG_LEVEL} if kind == "png" else {"quality": compression}
    files = []
    for picture in as_pictures(images):
        data = io.BytesIO()
        picture.save(data, format=kind.upper(), **how)
        files.append(base64.b64encode(data.getvalue()).decode())
    return files


def _picture(text: str, mode: str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"]).convert(mode)


def _form(pipe: Any, name: str) -> Any:
    """Return another form of a pipeline, with the same networks; None where diffusers has none."""
    try:
        return getattr(import_diffusers(), f"AutoPipelineFor{name}").from_pipe(pipe)
    except (ValueError, TypeError, AttributeError):
        return None


def _decodes_together(pipe: Any) -> bool:
    """Return whether a network besides the UNet is sharded too, so that no rank can decode alone."""
    parts = [part for name, part in pipe.components.items() if name != "unet" and isinstance(part, torch.nn.Module)]
    while parts:
        part = parts.pop()
        if isinstance(part, DistributedModule):  # which refuses to list modules
            return True
        parts += part.children()
    return False


@contextlib.contextmanager
def _estimates(scheduler: Any) -> Iterator[list[Tensor]]:
    """Keep a sampler's newest estimate of the clean latents, which previews show. Some samplers have none."""
    kept: list[Tensor] = []
    if scheduler is None:
        yield kept
        return
    step = scheduler.step

    @functools.wraps(step)  # pipelines read its parameters
    def kept_step(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        result = step(*args, return_dict=True, **kwargs)
        estimate = getattr(result, "pred_original_sample", None)
        kept[:] = [] if estimate is None else [estimate]
        return result if return_dict else result.to_tuple()

    scheduler.step = kept_step
    try:
        yield kept
    finally:
        del scheduler.step
