"""The group and its queue, over ranks that need no PyTorch: what is lost, what is kept, and what starts again."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import helpers_supervisor
import pytest

from districompile.serve import group as module
from districompile.serve.dispatcher import Dispatcher, Ticket
from districompile.serve.group import Group, GroupLost, Refused, Stopped
from districompile.serve.jobs import Drawing, GroupOptions

KEEPER = (sys.executable, str(Path(helpers_supervisor.__file__)))


def job(prompt: str, seed: int = 1) -> Drawing:
    return Drawing(id=f"{prompt}-{seed}", prompt=prompt, steps=1, seed=seed, size=(64, 48))


def with_group(work: Callable[[Group], Awaitable[None]], *arguments: str) -> None:
    """Run ``work`` with a group that is ready, and check that nothing of it is left."""

    async def main() -> None:
        group = Group(GroupOptions(bundle=Path("none")), silence=1.0, supervisor=(*KEEPER, *arguments))
        await group.start()
        await asyncio.wait_for(group.wait_started(), 20)
        pids = set(group.pids.values())
        try:
            await work(group)
        finally:
            pids |= set(group.pids.values())
            await group.stop()
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        assert group._scratch is not None and not group._scratch.exists()

    asyncio.run(asyncio.wait_for(main(), 60))


async def draw(group: Group, prompt: str, cancel: asyncio.Event | None = None) -> tuple[str, list[Any]]:
    previews: list[Any] = []
    drawn = await group.draw(job(prompt), lambda *shown: previews.append(shown), cancel or asyncio.Event())
    return drawn.images[0], previews


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_a_drawing_and_its_previews() -> None:
    async def work(group: Group) -> None:
        assert group.facts == helpers_supervisor.FACTS and not group.troubled
        assert await draw(group, "a star") == ("a star 1", [(0, "early")])
        await until(lambda: group.memory == {0: 1000, 1: 1001})
        with pytest.raises(Refused, match="no such token"):
            await draw(group, "refuse")
        cancel = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, cancel.set)
        with pytest.raises(Stopped):
            await draw(group, "long", cancel)
        assert (await draw(group, "a moon"))[0] == "a moon 1"
        assert group.restarts == 0

    with_group(work)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [("die", "rank 1 ended"), ("fall silent", "rank 1 has given no sign"), ("nonsense", "unknown"),
     ("supervisor", "rank 1 failed: no memory")],
)  # fmt: skip
def test_a_lost_rank_fails_one_drawing(prompt: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REASON", 0.3)

    async def work(group: Group) -> None:
        began = time.monotonic()
        with pytest.raises(GroupLost, match=reason):
            await draw(group, prompt)
        assert time.monotonic() - began < 8
        assert not group.ready
        with pytest.raises(GroupLost):  # which the queue does not ask for
            await draw(group, "too early")
        await until(lambda: group.ready)
        assert (await draw(group, "a star"))[0] == "a star 1" and group.restarts == 1

    with_group(work)


def test_ranks_that_do_not_report_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRAGGLE", 0.2)
    monkeypatch.setattr(module, "_REASON", 0.1)

    async def work(group: Group) -> None:
        group._silence = 30.0  # so that it is not the silence that tells
        with pytest.raises(GroupLost, match="rank 1 did not end a drawing in time"):
            await draw(group, "fall silent")

    with_group(work)


def test_the_queue_outlives_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REASON", 0.3)

    async def work(group: Group) -> None:
        dispatcher = Dispatcher(group, bound=5)
        group.changed = dispatcher.changed
        dispatcher.start()
        tickets = [dispatcher.accept(p, [job(p)], 1) for p in ("die", "a star", "a moon")]

        assert [(await answer(t))[-1] for t in tickets] == ["rank_lost", "drawn", "drawn"]
        assert group.restarts == 1
        await dispatcher.close()

    with_group(work)


async def answer(ticket: Ticket) -> list[str]:
    """Return the pictures of a request, and how it ended."""
    found = []
    while (event := await ticket.events.get()).kind not in ("end", "error"):
        found += [event.image] if event.kind == "picture" else []
    return [*found, (event.error.code or "") if event.error is not None else "drawn"]


@contextlib.asynccontextmanager
async def dispatching(group: Group) -> AsyncIterator[Dispatcher]:
    dispatcher = Dispatcher(group, bound=5)
    group.changed = dispatcher.changed
    dispatcher.start()
    yield dispatcher
    await dispatcher.close()


def test_the_next_drawing_begins_while_files_are_made() -> None:
    """The file of "large" is made when "next" is drawn. Otherwise it would take 20 seconds."""

    async def work(group: Group) -> None:
        free = asyncio.Event()
        first = asyncio.create_task(group.draw(job("large"), lambda *shown: None, asyncio.Event(), free))
        await free.wait()
        assert not first.done() and (await draw(group, "next"))[0] == "next 1"
        assert (await first).images == ("large 1",)
        async with dispatching(group) as dispatcher:
            tickets = [dispatcher.accept("both", [job("large", 2), job("next", 3)], 2)]
            tickets += [dispatcher.accept(p, [job(p, 4)], 1) for p in ("large", "next")]
            answers = [await answer(t) for t in tickets]
            assert answers == [["large 2", "next 3", "drawn"], ["large 4", "drawn"], ["next 4", "drawn"]]
            await until(lambda: dispatcher.running is None and not dispatcher._tickets)

    with_group(work)


def test_files_do_not_pile_up() -> None:
    """Where files take longer than drawings, the bound of the queue holds nevertheless."""

    async def work(group: Group) -> None:
        async with dispatching(group) as dispatcher:
            for seed in range(3):
                dispatcher.accept(f"large {seed}", [job("large", seed)], 1)
            await until(lambda: len(group._drawings) == 2 and all(d.free.is_set() for d in group._drawings.values()))
            await asyncio.sleep(0.3)
            assert len(group._drawings) == 2 and dispatcher.running is not None and dispatcher.waiting == 1
            await dispatcher.end(0)

    with_group(work)


def test_ranks_that_are_lost_while_files_are_made_fail_both() -> None:
    async def work(group: Group) -> None:
        async with dispatching(group) as dispatcher:
            tickets = [dispatcher.accept(p, [job(p)], 1) for p in ("large", "die", "a star")]
            assert [(await answer(t))[-1] for t in tickets] == ["rank_lost", "rank_lost", "drawn"]

    with_group(work)


def test_the_end_waits_for_files() -> None:
    async def work(group: Group) -> None:
        async with dispatching(group) as dispatcher:
            ticket = dispatcher.accept("large", [job("large")], 1)
            await until(lambda: dispatcher._answering)
            began = time.monotonic()
            await dispatcher.end(0.3)
            assert 0.25 < time.monotonic() - began < 5 and await answer(ticket) == ["ending"]

    with_group(work)


def test_a_first_start_that_fails_is_fatal(tmp_path: Path) -> None:
    (tmp_path / "fail").touch()

    async def work(group: Group) -> None:
        assert group.fatal == "no memory" and group.troubled and not group.ready

    with_group(work, str(tmp_path / "fail"))


def test_later_starts_that_fail_are_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REASON", 0.1)
    monkeypatch.setattr(module, "_LONGEST_PAUSE", 0.1)

    async def work(group: Group) -> None:
        (tmp_path / "fail").touch()
        with pytest.raises(GroupLost):
            await draw(group, "die")
        await until(lambda: group.troubled)
        assert group.problem == "no memory" and group.fatal is None
        (tmp_path / "fail").unlink()
        await until(lambda: group.ready)
        assert not group.troubled and group.problem is None
        assert (await draw(group, "a star"))[0] == "a star 1"

    with_group(work, str(tmp_path / "fail"))


def test_strangers_are_not_ranks() -> None:
    async def work(group: Group) -> None:
        for data in (b"\x00\x00\x00\x02{}", b"\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n"):
            reader, writer = await asyncio.open_unix_connection(group._address)
            writer.write(data)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
        assert (await draw(group, "a star"))[0] == "a star 1"

    with_group(work)
