# SPDX-License-Identifier: Apache-2.0
"""Several replicas of a bundle on Ray Serve. Each replica is a placement group with all GPUs of one bundle.

Ray places the replicas, sends requests to them and starts them again; the ranks of a replica are those of
``districompile serve``, with the same HTTP interface::

    pip install 'districompile[serve]' 'ray[serve]'
    python docs/examples/ray_serve.py BUNDLE --replicas 2 --gpus 2     # or --cpus 2 for a bundle of the CPU
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ray import serve


def application(bundle: Path, replicas: int, resources: dict[str, float], steps: int = 50) -> Any:
    """Return the application of ``replicas`` replicas.

    ``resources`` are those of one replica, such as ``{"GPU": 2, "CPU": 4}``. They are one bundle of a placement group,
    so that all of them are on one machine.
    """

    def build() -> Any:  # in the process of each replica
        from districompile.serve.api import Limits
        from districompile.serve.app import ServeOptions, bundle_app
        from districompile.serve.jobs import GroupOptions

        options = ServeOptions(Limits(bundle.name, steps), queue=4)  # Ray queues the others
        return bundle_app(options, GroupOptions(bundle=bundle))

    actor = {"num_cpus": resources.get("CPU", 1), "num_gpus": resources.get("GPU", 0)}
    deployment = serve.deployment(
        serve.ingress(build)(),
        name="districompile",
        num_replicas=replicas,
        max_ongoing_requests=5,  # one is drawn, four wait in the replica
        max_queued_requests=64,
        ray_actor_options=actor,
        placement_group_bundles=[resources],
        placement_group_strategy="STRICT_PACK",
        graceful_shutdown_timeout_s=10,
    )
    return deployment.bind()


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of one replica")
    parser.add_argument("--cpus", type=int, default=2, help="CPU cores of one replica")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    resources = {"CPU": float(args.cpus)} | ({"GPU": float(args.gpus)} if args.gpus else {})
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    serve.run(application(args.bundle.resolve(), args.replicas, resources), blocking=True)


if __name__ == "__main__":
    main()
