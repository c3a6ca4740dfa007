#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Load ``districompile serve`` for a while and write JSON lines of what came of it.

Clients draw, leave in the middle, cancel, stream and send requests that are wrong, while ranks are killed at random::

    python tools/bench_serve.py BUNDLE --minutes 60 --clients 4 --kill-every 60 --out soak.jsonl

Lines: ``start`` (the machine and the arguments), ``sample`` (memory of the server and of each rank, what waits),
``kill``, ``wrong`` (an answer that should not be), and at the end ``summary``. The exit code is 1 if a request had no
answer, an answer was wrong, or the group did not come back.

Before that it measures, with one client, the overhead of a request: the server's time less that of the pipeline. On a
machine that is busy otherwise, ``server_cpu_s`` says more: the processor time of the server for each request.

    python tools/bench_serve.py --null --requests 200

measures the server alone: its ranks have every picture at once (``null_ranks.py``). ``request_s`` is what the client
waits for the answer, with 100 kB of a picture.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import httpx

PATH = "/v1/images/generations"
ANSWER_WITHIN = 300.0  # seconds: a request without an answer after that counts as lost
BACK_WITHIN = 180.0  # seconds that a killed group may take to be ready again
WRONG: tuple[dict[str, Any], ...] = (
    {"content": b"{"}, {"content": b"[" * 10_000}, {"json": {}}, {"json": {"prompt": "a", "n": 99}},
    {"json": {"prompt": "a", "size": "1x1"}}, {"json": {"prompt": "a", "seed": -1}}, {"json": {"prompt": "a", "x": 1}},
    {"json": {"prompt": "a" * 40_000}}, {"content": os.urandom(200)}, {"json": {"prompt": "a", "steps": 10**9}},
)  # fmt: skip
FINE_CODES = {"rank_lost", "queue_full", "cancelled"}  # answers that a loaded server with dying ranks may give


@dataclasses.dataclass
class Tally:
    """What came of the requests."""

    out: TextIO
    began: float = dataclasses.field(default_factory=time.monotonic)
    answers: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: int = 0
    lost: int = 0
    kills: int = 0
    back: list[float] = dataclasses.field(default_factory=list)
    failed_in: list[float] = dataclasses.field(default_factory=list)
    memory: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def write(self, kind: str, **fields: Any) -> None:
        """Write one line."""
        line = {"kind": kind, "seconds": round(time.monotonic() - self.began, 3), **fields}
        self.out.write(json.dumps(line) + "\n")
        self.out.flush()

    def complain(self, what: str, **fields: Any) -> None:
        """Count and write an answer that should not be."""
        self.wrong += 1
        self.write("wrong", what=what, **fields)


async def client(url: str, number: int, until: float, steps: int, tally: Tally) -> None:
    """Send requests of all sorts, one after the other."""
    rng = random.Random(number)
    pictures: dict[int, str] = {}  # by seed: a drawing that is repeated gives the same picture
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_WITHIN) as http:
        while time.monotonic() < until:
            what = rng.choices(("draw", "stream", "leave", "cancel", "wrong"), (5, 2, 1, 1, 3))[0]
            try:
                await _request(http, what, rng, number, steps, pictures, tally)
            except httpx.ReadTimeout:
                if what != "leave":
                    tally.lost += 1
                    tally.write("wrong", what=f"{what}: no answer")
            except httpx.TransportError as e:
                tally.complain(f"{what}: {type(e).__name__}: {e}")


async def _request(
    http: httpx.AsyncClient, what: str, rng: random.Random, number: int, steps: int, pictures: dict[int, str],
    tally: Tally,
) -> None:  # fmt: skip
    seed = rng.randrange(4)
    body = {"prompt": "a red circle", "seed": seed, "steps": steps}
    if what == "wrong":
        answer = await http.post(PATH, headers={"content-type": "application/json"}, **rng.choice(WRONG))
        tally.answers["refused" if 400 <= answer.status_code < 500 else "wrong"] += 1
        if not 400 <= answer.status_code < 500:
            tally.complain("a wrong request", status=answer.status_code, body=answer.text[:200])
    elif what == "leave":
        with contextlib.suppress(httpx.ReadTimeout):
            await http.post(PATH, json={**body, "steps": 10 * steps}, timeout=rng.uniform(0.05, 1.0))
        tally.answers["left"] += 1
    elif what == "cancel":
        name = f"c{number}-{rng.randrange(1 << 60):x}"
        asked = asyncio.create_task(http.post(PATH, json={**body, "steps": 10 * steps}, headers={"x-request-id": name}))
        await asyncio.sleep(rng.uniform(0.05, 1.0))
        await http.delete(f"/v1/images/requests/{name}")
        _judge(await asked, "cancel", tally)
    elif what == "stream":
        async with http.stream("POST", PATH, json={**body, "stream": True, "partial_images": 1}) as answer:
            text = (await answer.aread()).decode()
        last = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")][-1:]
        if answer.status_code != 200:
            _judge(answer, "stream", tally)
        elif not last or ("error" in last[0] and last[0]["error"]["code"] not in FINE_CODES):
            tally.complain("stream", body=text[-300:])
        else:
            tally.answers[last[0]["error"]["code"] if "error" in last[0] else "drawn"] += 1
    else:
        answer = await http.post(PATH, json=body)
        if _judge(answer, "draw", tally):
            picture = answer.json()["data"][0]["b64_json"]
            if pictures.setdefault(seed, picture) != picture:
                tally.complain("another picture for the same seed", seed=seed)


def _judge(answer: httpx.Response, what: str, tally: Tally) -> bool:
    """Count an answer. Return whether it has a picture."""
    if answer.status_code == 200:
        tally.answers["drawn"] += 1
        return True
    code = answer.json()["error"]["code"]
    tally.answers[code] += 1
    if code not in FINE_CODES:
        tally.complain(what, status=answer.status_code, body=answer.text[:300])
    return False


async def rank_pids(http: httpx.AsyncClient) -> list[int]:
    """Return the processes of the ranks, as the server names them."""
    text = (await http.get("/metrics")).text
    return [int(pid) for pid in re.findall(r'^districompile_rank_resident_bytes{pid="(\d+)"', text, re.MULTILINE)]


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used, which does not depend on what else the machine does."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def killer(url: str, every: float, until: float, tally: Tally) -> None:
    """Kill or stop a rank now and then, and wait until the group is back."""
    rng = random.Random(0)
    async with httpx.AsyncClient(base_url=url, timeout=10) as http:
        while True:
            wait = rng.uniform(0.5, 1.5) * every
            if time.monotonic() + wait + BACK_WITHIN / 3 > until:
                return
            await asyncio.sleep(wait)
            pids = await rank_pids(http)
            if not pids:
                continue
            number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
            os.kill(rng.choice(pids), number)
            tally.kills += 1
            began = time.monotonic()
            noticed = None
            while time.monotonic() - began < BACK_WITHIN:
                await asyncio.sleep(0.1)
                ready = (await http.get("/readyz")).status_code == 200
                if not ready and noticed is None:
                    noticed = time.monotonic() - began
                    tally.failed_in.append(noticed)
                if ready and noticed is not None:
                    break
            else:
                tally.complain("the group did not come back")
                return
            tally.back.append(time.monotonic() - began)
            tally.write("kill", signal=number.name, noticed_s=round(noticed or 0, 3), back_s=round(tally.back[-1], 3))


async def sampler(url: str, server: int, every: float, tally: Tally) -> None:
    """Write the memory of the processes, and the state of the queue."""
    async with httpx.AsyncClient(base_url=url, timeout=10) as http:
        while True:
            lines = (await http.get("/metrics")).text.splitlines()
            values = dict(line.rsplit(" ", 1) for line in lines if line.startswith("districompile") and "{" not in line)
            ranks = [resident(p) for p in await rank_pids(http)]
            entry = {
                "seconds": time.monotonic() - tally.began,
                "server": resident(server),
                "ranks": max(ranks, default=0),
            }
            tally.memory.append(entry)
            tally.write(
                "sample", server_bytes=entry["server"], rank_bytes=ranks, answers=dict(tally.answers),
                waiting=float(values["districompile_waiting_requests"]),
                restarts=float(values["districompile_group_restarts"]),
            )  # fmt: skip
            await asyncio.sleep(every)


async def soak(args: argparse.Namespace, url: str, server: int, tally: Tally) -> None:
    """Run clients, killer and sampler for as long as asked."""
    if args.idle:
        await asyncio.sleep(args.idle)
        async with httpx.AsyncClient(base_url=url, timeout=ANSWER_WITHIN) as http:
            answer = await http.post(PATH, json={"prompt": "a red circle", "steps": args.steps})
        tally.write("idle", idle_s=args.idle, status=answer.status_code)
        if answer.status_code != 200:
            tally.complain("after idling", body=answer.text[:300])
    until = time.monotonic() + 60 * args.minutes
    sampling = asyncio.create_task(sampler(url, server, args.sample_every, tally))
    work = [client(url, i, until, args.steps, tally) for i in range(args.clients)]
    if args.kill_every:
        work.append(killer(url, args.kill_every, until, tally))
    await asyncio.gather(*work)
    sampling.cancel()


async def measure(args: argparse.Namespace, url: str) -> None:
    """Draw one picture after the other, for the overhead."""
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_WITHIN) as http:
        for i in range(args.requests):
            (await http.post(PATH, json={"prompt": "a red circle", "seed": i, "steps": args.steps})).raise_for_status()


async def null(args: argparse.Namespace, tally: Tally) -> None:
    """Serve ranks that draw nothing in this process, and write what a request takes."""
    from districompile.serve.api import Limits
    from districompile.serve.app import ServeOptions
    from districompile.serve.jobs import GroupOptions
    from districompile.serve.server import bind, serve

    options = ServeOptions(limits=Limits("null", steps=args.steps, most_steps=100, loras=()), queue=args.queue)
    ranks = Path(__file__).with_name("null_ranks.py")
    listener = bind("127.0.0.1", 0, None)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    serving = asyncio.create_task(
        serve(options, GroupOptions(bundle=Path("null")), listener, "127.0.0.1", (sys.executable, str(ranks)))
    )

    def ask() -> list[float]:
        taken = []
        with httpx.Client(base_url=url, timeout=ANSWER_WITHIN) as http:
            while http.get("/readyz").status_code != 200:
                time.sleep(0.05)
            for i in range(args.requests):
                began = time.perf_counter()
                http.post(PATH, json={"prompt": "a red circle", "seed": i}).raise_for_status()
                taken.append(time.perf_counter() - began)
        return taken

    cpu = cpu_seconds(os.getpid())
    taken = await asyncio.to_thread(ask)
    own = (cpu_seconds(os.getpid()) - cpu) / args.requests
    tally.write(
        "null", request_s=quantiles(taken[1:]), cpu_s=round(own, 6), cores=os.cpu_count(), load=os.getloadavg()[0]
    )
    os.kill(os.getpid(), signal.SIGTERM)
    await serving


def quantiles(values: list[float]) -> dict[str, float]:
    """Return the median, the 95th percentile and the maximum, in the values' unit."""
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "count": len(ordered), "median": round(statistics.median(ordered), 6),
        "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 6), "max": round(ordered[-1], 6),
    }  # fmt: skip


def main() -> int:
    """Start a server, load it, and write what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--null", action="store_true", help="measure the server alone, without a bundle")
    parser.add_argument("--minutes", type=float, default=5.0, help="length of the load")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps of a picture")
    parser.add_argument("--queue", type=int, default=8)
    parser.add_argument("--kill-every", type=float, default=0.0, help="seconds between two killed ranks; 0: none")
    parser.add_argument("--sample-every", type=float, default=10.0, help="seconds between two samples")
    parser.add_argument("--requests", type=int, default=20, help="requests of the measurement of the overhead")
    parser.add_argument("--idle", type=float, default=0.0, help="seconds without a request before the load")
    parser.add_argument("--timeout", type=float, default=30.0, help="--timeout of the server")
    parser.add_argument("--out", type=Path, default=None, help="file of the lines; standard output without it")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        out = sys.stdout if args.out is None else stack.enter_context(args.out.open("w"))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tally = Tally(out)
        if args.null:
            asyncio.run(null(args, tally))
            return 0
        if args.bundle is None:
            parser.error("give a BUNDLE, or --null")
        given = {k: v for k, v in vars(args).items() if k not in ("bundle", "out")}
        tally.write("start", bundle=args.bundle.name, python=platform.python_version(), cores=os.cpu_count(), **given)
        log, errors = scratch / "log", scratch / "errors"
        server = subprocess.Popen(
            [sys.executable, "-m", "districompile", "serve", str(args.bundle), "--port", "0", "--log", str(log),
             "--queue", str(args.queue), "--timeout", str(args.timeout)],
            stderr=stack.enter_context(errors.open("w")),
        )  # fmt: skip
        stack.callback(server.wait)
        stack.callback(server.kill)
        while " at http" not in errors.read_text():
            if server.poll() is not None:
                sys.exit(errors.read_text())
            time.sleep(0.1)
        url = errors.read_text().partition(" at ")[2].split()[0]
        tally.write("ready")
        before = cpu_seconds(server.pid)
        asyncio.run(measure(args, url))
        own = (cpu_seconds(server.pid) - before) / max(1, args.requests)
        overhead = [json.loads(line) for line in log.read_text().splitlines()]
        alone = [e["overhead_s"] for e in overhead if "overhead_s" in e][1:]
        encoding = [e["encoding_s"] for e in overhead if "encoding_s" in e][1:]
        tally.write("overhead", overhead_s=quantiles(alone), encoding_s=quantiles(encoding), server_cpu_s=round(own, 6))
        asyncio.run(soak(args, url, server.pid, tally))
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        code = server.wait(30)
        third = max(1, len(tally.memory) // 3)
        early, late = tally.memory[:third], tally.memory[-third:]
        tally.write(
            "summary", answers=dict(tally.answers), wrong=tally.wrong, lost=tally.lost, kills=tally.kills,
            noticed_s=quantiles(tally.failed_in), back_s=quantiles(tally.back), overhead_s=quantiles(alone),
            end_s=round(time.monotonic() - began, 3), exit_code=code,
            **{f"{who}_mib": {when: round(statistics.median(e[who] for e in part) / 2**20, 1)
                              for when, part in (("first_third", early), ("last_third", late)) if part}
               for who in ("server", "ranks")},
        )  # fmt: skip
        return int(bool(tally.wrong or tally.lost or code))


if __name__ == "__main__":
    sys.exit(main())
