# SPDX-License-Identifier: Apache-2.0
"""``districompile serve``: keep the ranks of a bundle loaded, and draw what clients ask for over HTTP.

This process imports no PyTorch, so that the server opens at once and stays small.
"""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from districompile.cli.common import whole_path
from districompile.cli.serve import Settings
from districompile.common.outputs import check_folder
from districompile.errors import Error

if TYPE_CHECKING:
    from districompile.serve.jobs import GroupOptions


def main(settings: Settings) -> int:
    """Serve until a signal."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise Error("serve starts the processes of the bundle itself: leave torchrun out")
    try:
        from districompile.serve.api import Limits
        from districompile.serve.app import ServeOptions
        from districompile.serve.records import RequestLog
        from districompile.serve.server import allowed_hosts, bind, serve
    except ImportError as e:
        raise Error(f"serving needs more packages ({e}): pip install 'districompile[serve]'") from e
    ranks = _ranks(settings)
    name = settings.name or ranks.bundle.name
    if settings.steps > settings.most_steps:
        raise Error(f"--steps {settings.steps} is above --most-steps {settings.most_steps}")
    if settings.log_dir is not None:
        check_folder(settings.log_dir, "--log-dir")
    token = _token(settings)
    limits = Limits(name, settings.steps, settings.most_steps, tuple(ranks.loras))
    listener = bind(settings.host, settings.port, token)
    with listener:
        options = ServeOptions(
            limits, token, settings.queue, allowed_hosts(settings.host, token), settings.most_seconds,
            RequestLog(settings.log),
        )  # fmt: skip
        asyncio.run(serve(options, ranks, listener, settings.host))
    return 0


def _token(settings: Settings) -> str | None:
    """Return the token that clients need."""
    if settings.token_file is None:
        return settings.token
    if settings.token is not None:
        raise Error("--token and --token-file: give one of them")
    try:
        return settings.token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not text"
        raise Error(f"--token-file {settings.token_file}: {reason}") from e


def _ranks(settings: Settings) -> GroupOptions:
    """Return how the ranks load the bundle. What needs PyTorch is checked by the process that launches them."""
    from districompile.bundle.manifest import read_manifest
    from districompile.serve.jobs import NAME, GroupOptions

    bundle = settings.bundle.expanduser().resolve()
    read_manifest(bundle)
    loras: dict[str, tuple[Path, float]] = {}
    for text in settings.lora:
        name, given, place = text.partition("=")
        file, at, scale = place.rpartition("@")
        if not at:
            file, scale = place, "1"
        path = Path(file).expanduser().resolve()
        if not given or re.fullmatch(NAME, name) is None or re.fullmatch(r"-?[0-9]{1,6}(\.[0-9]{1,9})?", scale) is None:
            raise Error(f"--lora {text}: give NAME=FILE or NAME=FILE@SCALE, as style=style.safetensors@0.8")
        if name in loras:
            raise Error(f"--lora {name} is given twice")
        if not path.is_file():
            raise Error(f"--lora {text}: there is no file {path}")
        loras[name] = (path, float(scale))
    return GroupOptions(
        bundle=bundle, vae=whole_path(settings.vae), model=settings.model,
        transport=settings.transport, cuda_graph=settings.cuda_graph,
        device=settings.device, native_code=settings.native_code, timeout=settings.timeout,
        extensions=settings.extension, loras=loras,
        log_dir=None if settings.log_dir is None else settings.log_dir.absolute(),
    )  # fmt: skip
