"""The example of Ray Serve: two replicas of two CPU ranks, where Ray is installed."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_serve import tiny_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
ray = pytest.importorskip("ray", reason="Ray is not installed")
serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "ray_serve.py"


def example() -> Any:
    spec = importlib.util.spec_from_file_location("ray_serve", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_replicas_draw_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from districompile.cli.main import main

    model, bundle = tiny_pipeline(tmp_path / "tiny"), tmp_path / "bundle"
    assert main(["convert", str(model), "--gpus", "2", "--backend", "eager", "--out", str(bundle), "--json"]) == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=6, include_dashboard=False, _node_ip_address="127.0.0.1")  # logical ones
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(example().application(bundle, 2, {"CPU": 2.0}, steps=2))
        groups = [g for g in ray.util.placement_group_table().values() if g["state"] == "CREATED"]
        assert sorted(str(g["bundles"]) for g in groups) == ["{0: {'CPU': 2.0}}"] * 2
        url = f"http://127.0.0.1:{port}"

        def draw(seed: int) -> Any:
            answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a star", "seed": seed}, timeout=100)
            assert answer.status_code == 200, answer.text
            return answer.json()["data"][0]["b64_json"]

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            first, second = ([*pool.map(draw, range(6))] for _ in range(2))
        assert first == second and len(set(first)) == 6
        assert len(replicas_that_drew(port)) == 2
        assert httpx.post(f"{url}/v1/images/generations", json={"prompt": "a", "n": 99}).status_code == 400
    finally:
        serve.shutdown()
        ray.shutdown()
    assert not left_over(bundle)


def replicas_that_drew(port: int) -> set[str]:
    """Return the processes that answer with pictures in their metrics."""
    found = set()
    for _ in range(60):
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        if float(values["districompile_images_total"]) > 0:
            found.add(values["process_start_time_seconds"])
    return found


def left_over(bundle: Path) -> list[str]:
    """Return the processes that still have a bundle open."""
    found = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        if maps.parent.name == str(os.getpid()):
            continue
        try:
            if str(bundle) in maps.read_text():
                found.append(maps.parent.name)
        except OSError:
            continue
    return found
