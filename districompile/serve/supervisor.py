# SPDX-License-Identifier: Apache-2.0
"""The process that launches the ranks for the server: ``python -m districompile.serve.supervisor``.

Its orders are a :class:`~districompile.serve.jobs.Start` (:mod:`districompile.runtime.processes.supervisor`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from districompile.runtime.processes.supervisor import supervise
from districompile.serve.jobs import GroupOptions, Start


def main() -> int:
    """Launch the ranks and wait for their end."""
    return supervise(lambda orders: _launch(Start.model_validate_json(orders)))


def _launch(start: Start) -> None:
    """Check everything that can be checked before a rank starts, then launch the ranks."""
    from districompile.bundle.bundle import Bundle
    from districompile.cli.common import UsageError, is_bundle, load_extensions, quiet_libraries, source_of
    from districompile.cli.options import NO_VAE
    from districompile.cli.pipeline import chosen_vae
    from districompile.models.sources import pipeline_location
    from districompile.runtime.load import check_device, check_native_code
    from districompile.runtime.processes.launcher import launch
    from districompile.runtime.processes.liveness import check_timeout
    from districompile.runtime.transports.select import check_transport
    from districompile.serve.worker import serve_rank

    options = start.options
    quiet_libraries()
    load_extensions(options.extensions)
    check_transport(options.transport)
    check_timeout(options.timeout)
    if not is_bundle(options.bundle):
        raise UsageError(f"{options.bundle} is not a bundle: make one with `districompile convert MODEL --out FOLDER`")
    bundle = Bundle.open(options.bundle, verify="quick")  # the ranks check the hashes
    check_device(bundle, options.device)
    check_native_code(bundle, options.native_code)
    pipeline_location(source_of(bundle.manifest, options.model))
    drawn = [p for p in bundle.plans.values() if p.options.images == bundle.plan.options.images]
    vae, note = chosen_vae(options.vae, bundle, drawn, device=options.device, native_code=options.native_code)
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    start = start.model_copy(
        update={"options": options.model_copy(update={"vae": NO_VAE if vae is None else str(vae)})}
    )
    loras = _refits(bundle, options, Path(start.address).parent)
    launch(serve_rank, (start.model_dump_json(), loras), bundle.plan.world_size, log_dir=options.log_dir)


def _refits(bundle: Any, options: GroupOptions, scratch: Path) -> dict[str, str]:
    """Return a refit of the bundle for each LoRA, by name. They are made once, and live as long as the server."""
    from districompile.bundle.refit import read_lora, refit
    from districompile.cli.common import is_bundle

    folders = {}
    for name, (path, scale) in options.loras.items():
        folder = scratch / "loras" / name
        if not is_bundle(folder):
            folder.parent.mkdir(exist_ok=True)
            found, other = read_lora(path, bundle.manifest.get("config") or {}, scale)
            refit(options.bundle, folder, loras=found, note={"weights": None, "loras": [str(path)], "scale": scale})
            if other:
                print(f"note: {path}: {other} tensors are for text encoders, which stay as they are", file=sys.stderr)
        folders[name] = str(folder)
    return folders


if __name__ == "__main__":
    sys.exit(main())
