# SPDX-License-Identifier: Apache-2.0
"""Load ``districompile serve`` for a bounded time with requests of all sorts while ranks are killed, and judge it.

    python tools/soak_serve.py BUNDLE --minutes 60 --kill-every 90 --out soak.jsonl

Clients draw, stream, leave and cancel as those of ``bench_serve.py`` do. Another sends what hypothesis makes: JSON of
any fields and values, and any bytes. The last line is ``verdict``. The exit code is 1 unless all of this holds:

- Every request was answered, and no answer was wrong. What was accepted was drawn, or failed with ``rank_lost``.
- A lost rank was noticed within 10 seconds, and the group came back.
- The memory of the server, and of a rank, grew by at most ``--growth`` percent between the second third and the last.
- The server ended within 10 seconds of SIGTERM, and left no process.

Needs hypothesis. Requests go to the loopback interface alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_serve
import httpx
from bench_serve import ANSWER_WITHIN, FINE_CODES, PATH, Tally, client, killer, quantiles, rank_pids, sampler
from hypothesis import HealthCheck, Phase, given, seed, settings
from serve_requests import BODIES, BYTES, GOOD

NOTICED_WITHIN = 10.0  # seconds
ENDED_WITHIN = 10.0


def judge_any(answer: httpx.Response, tally: Tally, what: str) -> None:
    """Judge the answer to a request that hypothesis made, of which nobody knows whether it is right."""
    if answer.status_code < 300:
        tally.answers["made: drawn"] += 1
        return
    try:
        code = answer.json()["error"]["code"]
    except (ValueError, KeyError, TypeError):
        tally.complain(what, status=answer.status_code, body=answer.text[:300])
        return
    tally.answers["made: refused" if answer.status_code < 500 else f"made: {code}"] += 1
    if answer.status_code >= 500 and code not in FINE_CODES:
        tally.complain(what, status=answer.status_code, body=answer.text[:300])


def make_requests(url: str, until: float, steps: int, tally: Tally) -> None:
    """Send what hypothesis makes until the time is over."""
    quiet = settings(
        deadline=None, max_examples=50, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    with httpx.Client(base_url=url, timeout=ANSWER_WITHIN) as http:

        def send(data: bytes) -> None:
            if time.monotonic() > until:
                return
            try:
                judge_any(http.post(PATH, content=data, headers={"content-type": "application/json"}), tally, "made")
            except httpx.ReadTimeout:
                tally.lost += 1
                tally.write("wrong", what="made: no answer", data=data[:300].decode("utf-8", "replace"))
            except httpx.TransportError as e:
                tally.complain(f"made: {type(e).__name__}: {e}", data=data[:300].decode("utf-8", "replace"))

        number = 0
        while time.monotonic() < until:

            @seed(number)
            @quiet
            @given(BODIES)
            def bodies(body: dict[str, Any]) -> None:
                send(json.dumps({**GOOD, "steps": steps, **body}).encode())

            @seed(number)
            @quiet
            @given(BYTES)
            def anything(data: bytes) -> None:
                send(data)

            bodies()
            anything()
            number += 1


async def soak(args: argparse.Namespace, url: str, server: int, tally: Tally) -> None:
    """Run all clients, the killer and the sampler for as long as asked."""
    until = time.monotonic() + 60 * args.minutes
    sampling = asyncio.create_task(sampler(url, server, args.sample_every, tally))
    work = [client(url, i, until, args.steps, tally) for i in range(args.clients)]
    work.append(asyncio.to_thread(make_requests, url, until, args.steps, tally))
    if args.kill_every:
        work.append(killer(url, args.kill_every, until, tally))
    limit = 60 * args.minutes + 2 * ANSWER_WITHIN
    try:
        await asyncio.wait_for(asyncio.gather(*work), limit)
    except asyncio.TimeoutError:
        tally.complain(f"clients still wait {2 * ANSWER_WITHIN:.0f} s after the end")
    if sampling.done() and sampling.exception() is not None:
        tally.complain(f"the sampler ended: {sampling.exception()}")
    sampling.cancel()


def growth(tally: Tally, who: str) -> float | None:
    """Return by how many percent a memory grew from the second third of the samples to the last; None for too few."""
    values = [entry[who] for entry in tally.memory if entry[who]]
    third = len(values) // 3
    if third < 2:
        return None
    before, after = statistics.median(values[third : 2 * third]), statistics.median(values[2 * third :])
    return round(100 * (after / before - 1), 2)


def main() -> int:
    """Start a server, load it, and judge what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0, help="length of the load")
    parser.add_argument("--clients", type=int, default=2, help="besides the one of hypothesis")
    parser.add_argument("--steps", type=int, default=2, help="steps of a picture")
    parser.add_argument("--queue", type=int, default=8)
    parser.add_argument("--kill-every", type=float, default=90.0, help="seconds between two killed ranks; 0: none")
    parser.add_argument("--sample-every", type=float, default=5.0, help="seconds between two samples")
    parser.add_argument("--back-within", type=float, default=180.0, help="seconds for a killed group to be ready again")
    parser.add_argument("--growth", type=float, default=5.0, help="percent by which memory may grow")
    parser.add_argument("--out", type=Path, default=None, help="file of the lines; standard output without it")
    args = parser.parse_args()
    bench_serve.BACK_WITHIN = args.back_within
    with contextlib.ExitStack() as stack:
        out = sys.stdout if args.out is None else stack.enter_context(args.out.open("w"))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tally = Tally(out)
        given_ = {k: v for k, v in vars(args).items() if k not in ("bundle", "out")}
        tally.write("start", bundle=args.bundle.name, python=platform.python_version(), cores=os.cpu_count(), **given_)
        errors = scratch / "errors"
        server = subprocess.Popen(
            [sys.executable, "-m", "districompile", "serve", str(args.bundle), "--port", "0", "--most-steps",
             str(20 * args.steps), "--steps", str(args.steps), "--log", str(scratch / "log"), "--queue",
             str(args.queue)],
            stderr=stack.enter_context(errors.open("w")),
        )  # fmt: skip
        stack.callback(server.wait)
        stack.callback(server.kill)
        while " at http" not in errors.read_text():
            if server.poll() is not None:
                sys.exit(errors.read_text())
            time.sleep(0.1)
        url = errors.read_text().partition(" at ")[2].split()[0]
        while httpx.get(f"{url}/readyz").status_code != 200:
            if server.poll() is not None:
                sys.exit(errors.read_text())
            time.sleep(0.2)
        tally.write("ready")
        asyncio.run(soak(args, url, server.pid, tally))

        async def ranks() -> list[int]:
            async with httpx.AsyncClient(base_url=url, timeout=10) as http:
                return await rank_pids(http)

        pids = asyncio.run(ranks())
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        try:
            code: int | None = server.wait(2 * ENDED_WITHIN)
        except subprocess.TimeoutExpired:
            code = None
        ended = time.monotonic() - began
        time.sleep(1.0)
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        grown = {who: growth(tally, who) for who in ("server", "ranks")}
        said = [line for line in errors.read_text().splitlines() if "Traceback" in line or "Error" in line]
        checks = {
            "all answered": tally.lost == 0,
            "no wrong answer": tally.wrong == 0,
            "losses noticed": all(s <= NOTICED_WITHIN for s in tally.failed_in),
            "memory flat": all(g is None or g <= args.growth for g in grown.values()),
            "ended in time": code is not None and ended <= ENDED_WITHIN,
            "no process left": not left,
        }
        tally.write(
            "verdict", checks=checks, answers=dict(tally.answers), wrong=tally.wrong, lost=tally.lost,
            kills=tally.kills, noticed_s=quantiles(tally.failed_in), back_s=quantiles(tally.back), growth_percent=grown,
            end_s=round(ended, 3), exit_code=code, said=said[-5:],
        )  # fmt: skip
        return int(not all(checks.values()))


if __name__ == "__main__":
    sys.exit(main())
