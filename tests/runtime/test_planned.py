"""The static executor: the same results as the plain one, in memory that is planned, under any order of the ranks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_net import Net, images, make_bundle
from helpers_toy import Reference, ToyEngine, function_of, make_engines, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

import districompile as dc
from districompile.backends.base import Engine
from districompile.errors import BundleError, InputError
from districompile.plan.plan import ExecutionPlan, Run, SaveState, Schedule, Start, Wait
from districompile.runtime.executor.arena import ALIGN, Interval, aligned, allocate, place
from districompile.runtime.executor.memory import last_uses, plan_memory
from districompile.runtime.executor.planned import PlannedExecutor
from districompile.runtime.executor.state import ExecutorState
from districompile.runtime.transports.base import SliceCopy, TransferPlan, coalesce
from districompile.runtime.transports.simulated import SimulatedChannel, SimulatedChannels

CPU = torch.device("cpu")
Steps = Generator[None, None, list[torch.Tensor]]


class BindingEngine(ToyEngine):
    """Writes into what it is given, refuses to write anywhere else, and spoils its scratch memory."""

    binds_outputs = True
    scratch_bytes = 100

    def __init__(self, function: Callable[..., Any], outputs: tuple[str, ...]) -> None:
        super().__init__(function)
        self.names = outputs
        self.scratch = torch.empty(0)

    def use_scratch(self, tensor: torch.Tensor) -> None:
        assert tensor.dtype == torch.uint8 and tensor.numel() >= self.scratch_bytes
        self.scratch = tensor

    def bind(self, name: str, tensor: torch.Tensor) -> None:
        assert tensor.is_contiguous() and tensor.data_ptr() % ALIGN == 0
        self.bound[name] = tensor

    def enqueue(self) -> None:
        self.scratch.fill_(255)
        results = {name: value.clone() for name, value in self.function(self.bound).items()}
        for name in self.names:
            self.bound[name].fill_(float("nan"))  # an output over an input would show
        again = self.function(self.bound)
        for name in self.names:
            torch.testing.assert_close(again[name], results[name])
            self.bound[name].copy_(results[name])
        self.bound.clear()


def binding_engines(plan: ExecutionPlan, rank: int) -> dict[str, dict[str, Engine]]:
    return {
        phase: {n: BindingEngine(function_of(plan, s.engines[rank]), s.outputs) for n, s in p.segments.items()}
        for phase, p in plan.phases.items()
    }


class AsyncChannel(SimulatedChannel):
    """Says whether a wait can go on, so that ranks may run in any order that the signals allow; and copies what is
    posted at once, or as late as it may."""

    def __init__(self, group: SimulatedChannels, rank: int, seed: int) -> None:
        super().__init__(group, rank)
        self.late, self.random = dict[TransferPlan, None](), random.Random(f"{seed} {rank}")

    def post(self, transfer: TransferPlan) -> None:
        assert transfer not in self.late
        if self.random.random() < 0.5:
            self.late[transfer] = None
        else:
            super().post(transfer)

    def sent(self, transfer: TransferPlan) -> None:
        if transfer in self.late:
            del self.late[transfer]
            super().post(transfer)

    def join(self) -> None:
        for transfer in list(self.late):
            self.sent(transfer)

    def ready(self, transfer: TransferPlan) -> bool:
        self.sent(transfer)
        return self.arrived(transfer)


class Ranks:
    """All ranks of a plan in this process."""

    def __init__(self, plan: ExecutionPlan, engines: Any = binding_engines, seed: int | None = None) -> None:
        self.plan = plan
        self.channels = SimulatedChannels(plan.ranks, CPU)
        if seed is not None:
            self.channels.channels = tuple(AsyncChannel(self.channels, r, seed) for r in range(plan.ranks))
        self.random = random.Random(seed) if seed is not None else None
        self.executors = [
            PlannedExecutor(plan, r, engines(plan, r), k, CPU) for r, k in enumerate(self.channels.channels)
        ]

    def new_states(self) -> list[ExecutorState]:
        return [e.new_state() for e in self.executors]

    def start(self, sample: torch.Tensor, t: float, phase: str, states: list[ExecutorState]) -> list[Steps]:
        inputs = {"sample": sample, "timestep": torch.full((2,), t)}
        return [e.iterate(phase, inputs, s) for e, s in zip(self.executors, states, strict=True)]

    def __call__(self, sample: torch.Tensor, t: float, phase: str, states: list[ExecutorState]) -> list[torch.Tensor]:
        return self.finish(self.start(sample, t, phase, states))

    @staticmethod
    def finish(runs: list[Steps]) -> list[torch.Tensor]:
        outputs: dict[int, list[torch.Tensor]] = {}
        while len(outputs) < len(runs):
            for rank, run in enumerate(runs):
                try:
                    next(run)
                except StopIteration as end:
                    outputs.setdefault(rank, end.value)
        return [outputs[r][0] for r in range(len(runs))]


PHASES = ["exact", "exact", "displaced", "displaced", "displaced", "exact", "displaced", "displaced"]


@pytest.mark.parametrize("engines", [make_engines, binding_engines])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("parted", [False, True])
def test_both_phases_streams_and_reset(ranks: int, engines: Any, parted: bool) -> None:
    plan = make_plan(ranks, parted=parted)
    run = Ranks(plan, engines)
    states = [run.new_states(), run.new_states()]
    torch.manual_seed(0)
    kept = []
    for _image in range(2):
        references = [Reference(plan), Reference(plan)]
        for i, phase in enumerate(PHASES):
            for stream in (0, 1):
                sample = torch.randn(2, 7)
                want = references[stream](sample, 5.0 - i, phase)
                for got in run(sample, 5.0 - i, phase, states[stream]):
                    torch.testing.assert_close(got, want)
                    kept.append((got, want))
        for by_rank in states:
            for executor, state in zip(run.executors, by_rank, strict=True):
                executor.reset(state)
        assert not run.channels.signals
    for got, want in kept:  # fresh tensors: nothing later has written to them
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("ranks", "cfg"), [(1, "none"), (2, "split"), (3, "none")])
def test_a_converted_model_in_fixed_memory(ranks: int, cfg: str, tmp_path: Path) -> None:
    """Both phases equal the executor that allocates as it goes, where transposed values cross segments, too."""
    bundle = make_bundle(tmp_path / "b", ranks, cfg=cfg)
    unet = dc.load(bundle, lockstep=True)
    torch.manual_seed(0)
    kwargs = {"sample": torch.randn(2, 4, 40, 32), "timestep": torch.tensor(10.0)}
    module = Net().eval()  # the same weights as in the bundle
    program = dc.convert(module, kwargs=kwargs, ranks=ranks, warmup_steps=3, cfg=cfg)
    with unet.image():
        for i in range(6):
            x = {"sample": torch.randn(2, 4, 40, 32), "timestep": torch.tensor(100.0 - i)}
            got, want = unet(**x), program.simulate(**x, phase="exact" if i < 3 else "displaced")
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            if i < 3:
                torch.testing.assert_close(got, module(**x), rtol=1e-5, atol=1e-6)
    assert images(unet, 4) == images(unet, 4)  # bit for bit


@pytest.mark.parametrize("segments", [3, 6])
def test_what_is_sent_is_overwritten_only_afterwards(segments: int) -> None:
    """Sources of a displaced step share memory with what later segments make, however late they are copied."""
    torch.manual_seed(0)
    module, kwargs = Net().eval(), {"sample": torch.randn(2, 4, 40, 32), "timestep": torch.tensor(10.0)}
    program = dc.convert(module, kwargs=kwargs, ranks=2, segments=segments)
    plan, engines = program.plan, program._engines()
    results = []
    for seed in (None, 1):
        run = Ranks(plan, lambda plan, rank: engines[rank], seed)
        states, outputs = run.new_states(), []
        for i in range(6):
            given = {"sample": torch.randn(2, 4, 40, 32, generator=torch.Generator().manual_seed(i)),
                     "timestep": torch.tensor(9.0 - i)}  # fmt: skip
            inputs = {spec.value: given[spec.path] for spec in plan.inputs}
            calls = [e.iterate("displaced" if i else "exact", inputs, s)
                     for e, s in zip(run.executors, states, strict=True)]  # fmt: skip
            outputs.append(run.finish(calls))
        results.append(outputs)
    for turns, late in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(turns, late, strict=True))
    memory = plan_memory(plan, 0).phases["displaced"]
    sources = {c.source for c in plan.collectives.values() if c.displaced} & set(memory.offsets)
    spans = {v: range(at, at + memory.specs[v].nbytes) for v, at in memory.offsets.items()}
    assert any(
        a != b and spans[a].start < spans[b].stop and spans[b].start < spans[a].stop for a in sources for b in spans
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.booleans())
def test_any_order_of_the_ranks_gives_the_same_bits(seed: int, ranks: int, parted: bool) -> None:
    """Each rank goes through all its calls on its own; signals alone hold it up. Whoever overtakes must not be able to
    overwrite what another rank still reads."""
    plan = make_plan(ranks, parted=parted)
    turns, free = Ranks(plan), Ranks(plan, seed=seed)
    calls = [(torch.randn(2, 7, generator=torch.Generator().manual_seed(i)), p, i % 2) for i, p in enumerate(
        [p for p in PHASES for _ in (0, 1)])]  # fmt: skip
    states = [turns.new_states(), turns.new_states()]
    want = [turns(x, 1.0, phase, states[stream]) for x, phase, stream in calls]
    free_states = [free.new_states(), free.new_states()]

    def rank_program(rank: int) -> Generator[None, None, list[torch.Tensor]]:
        outputs = []
        for x, phase, stream in calls:
            inputs = {"sample": x, "timestep": torch.full((2,), 1.0)}
            outputs += yield from free.executors[rank].iterate(phase, inputs, free_states[stream][rank])
        return outputs

    programs = {r: rank_program(r) for r in range(ranks)}
    results: dict[int, list[torch.Tensor]] = {}
    favourite = random.Random(seed)
    for _ in range(100_000):
        if not programs:
            break
        rank = favourite.choice(list(programs))
        try:
            for _ in range(favourite.choice([1, 1, 5, 50])):
                next(programs[rank])
        except StopIteration as end:
            results[rank] = end.value
            del programs[rank]
    assert not programs, "the ranks wait for each other"
    for i in range(len(calls)):
        assert all(torch.equal(results[r][i], want[i][r]) for r in range(ranks)), f"call {i}"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 12), st.integers(0, 6)), max_size=30))
def test_places_of_values_alive_together_do_not_overlap(items: list[tuple[int, int, int]]) -> None:
    intervals = [Interval(f"v{i}", size, first, first + more) for i, (size, first, more) in enumerate(items)]
    offsets, total = place(intervals)
    assert offsets.keys() == {i.name for i in intervals} and all(o % ALIGN == 0 for o in offsets.values())
    for a in intervals:
        assert offsets[a.name] + a.nbytes <= total
        for b in intervals:
            if a is not b and a.overlaps(b):
                one, other = sorted((a, b), key=lambda i: offsets[i.name])
                assert offsets[one.name] + max(1, one.nbytes) <= offsets[other.name]
    assert total <= sum(aligned(max(1, i.nbytes)) for i in intervals)
    busiest = max((sum(i.nbytes for i in intervals if i.first <= s <= i.last) for s in range(20)), default=0)
    assert total >= busiest


def test_one_place_for_what_is_read_before_it_is_posted() -> None:
    assert plan_memory(make_plan(2), 0).single_buffered == frozenset()  # nothing runs after the displaced phase's posts
    plan = make_plan(2, parted=True)
    memory = plan_memory(plan, 0)
    assert memory.cross_call == {"halo", "total"} and memory.single_buffered == {"halo"}
    for rank in (0, 1):
        one, two = memory.single_layout[rank], memory.double_layout[rank]
        assert list(one.offsets) == ["halo"] and list(two.offsets) == ["total"]
        assert one.offsets["halo"] == two.nbytes == 2 * two.stride and one.nbytes == two.nbytes + one.stride
    displaced = plan.phases["displaced"]
    later = dataclasses.replace(displaced, segments=dict(displaced.segments))
    later.segments["end"] = dataclasses.replace(
        displaced.segments["end"], inputs=("y", "sum", "total", "own_sum", "halo")
    )
    changed = dataclasses.replace(plan, phases={**plan.phases, "displaced": later})
    assert plan_memory(changed, 0).single_buffered == frozenset()  # it is read again after it is posted


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_memory_of_a_plan_is_never_shared_by_living_values(ranks: int) -> None:
    plan = make_plan(ranks)
    for rank in range(ranks):
        memory = plan_memory(plan, rank)
        for name, phase in plan.phases.items():
            part = memory.phases[name]
            last = last_uses(plan, phase, held=not part.releases)
            made = {v: i for i, s in enumerate(phase.steps) if isinstance(s, Run)
                    for v in phase.segments[s.segment].outputs}  # fmt: skip
            for a in part.offsets:
                for b in part.offsets:
                    if a < b and a in made and b in made and made[a] <= last[b] and made[b] <= last[a]:
                        ends = [part.offsets[v] + part.specs[v].nbytes for v in (a, b)]
                        assert ends[0] <= part.offsets[b] or ends[1] <= part.offsets[a], (a, b)


def test_values_share_memory() -> None:
    """y of the exact phase is dead when nothing of it is read any more; x, too."""
    plan = make_plan(1, rows=4096)
    one = plan.phases["exact"].values["x"][0].nbytes
    assert 2 * one <= plan_memory(plan, 0).arena_bytes < 4 * one


def test_steady_without_warmup_names_the_site() -> None:
    run = Ranks(make_plan(2))
    states = run.new_states()
    with pytest.raises(InputError, match=r"stencil: nothing was received .* Run the exact phase first"):
        run(torch.ones(2, 7), 1.0, "displaced", states)
    run(torch.ones(2, 7), 1.0, "exact", states)
    for state in states:
        state.buffers.kept.clear()
    with pytest.raises(InputError, match=r"own_sum: no earlier call left this state"):
        run(torch.ones(2, 7), 1.0, "displaced", states)


def test_a_plan_without_sizes_is_refused() -> None:
    plan = make_plan(2)
    phases = {n: dataclasses.replace(p, values={}) for n, p in plan.phases.items()}
    with pytest.raises(BundleError, match="convert again"):
        Ranks(dataclasses.replace(plan, phases=phases))


def test_a_state_that_only_the_warm_up_writes_is_read_for_ever() -> None:
    """What the displaced phase neither posts nor keeps stays as the last exact call left it."""
    plan = make_plan(2)
    displaced = plan.phases["displaced"]
    frozen = Schedule(
        tuple(s for s in displaced.steps if not isinstance(s, SaveState) and s != Start(("halo", "total"))),
        displaced.segments, displaced.outputs, displaced.values,
    )  # fmt: skip
    run = Ranks(dataclasses.replace(plan, phases={**plan.phases, "displaced": frozen}))
    states = run.new_states()
    reference = Reference(plan)
    first, x = torch.randn(2, 7), torch.randn(2, 7)
    reference(first, 2.0, "exact")
    run(first, 2.0, "exact", states)
    for t in (1.0, 0.5, 0.25):
        before = (reference.last_x, reference.last_sums)
        want = reference(x, t, "displaced")
        reference.last_x, reference.last_sums = before
        torch.testing.assert_close(run(x, t, "displaced", states)[0], want)


def test_posts_come_before_waits_in_the_exact_phase_and_after_them_in_the_displaced() -> None:
    plan = make_plan(2)
    run = Ranks(plan)
    states = run.new_states()
    seen: list[tuple[str, str]] = []
    channel = run.channels.channels[0]
    post, wait = channel.post, channel.wait
    channel.post = lambda r: (seen.append(("post", r.name)), post(r))[1]  # type: ignore[method-assign]
    channel.wait = lambda r: (seen.append(("wait", r.name)), wait(r))[1]  # type: ignore[method-assign]
    run(torch.ones(2, 7), 1.0, "exact", states)
    assert seen == [("post", "halo"), ("wait", "halo"), ("post", "total"), ("wait", "total"), ("post", "out"),
                    ("wait", "out")]  # fmt: skip
    seen.clear()
    run(torch.ones(2, 7), 1.0, "displaced", states)
    assert seen == [("post", "halo and 1 more"), ("post", "out"), ("wait", "out")]  # the warm-up's were waited for
    seen.clear()
    run(torch.ones(2, 7), 1.0, "displaced", states)
    assert seen == [("wait", "halo and 1 more"), ("post", "halo and 1 more"), ("post", "out"), ("wait", "out")]
    signatures = []
    for _ in range(4):
        run(torch.ones(2, 7), 1.0, "displaced", states)
        signatures.append(states[0].buffers.signature)
    assert signatures[0] == signatures[2] != signatures[1] == signatures[3]  # two graphs are enough


def test_copies_are_merged_across_padding_only() -> None:
    memory, arrived = allocate(4 * ALIGN, CPU), allocate(4 * ALIGN, CPU)
    memory.copy_(torch.arange(4 * ALIGN) % 251)

    def part(start: int, size: int, to: int, closes: bool) -> SliceCopy:
        return SliceCopy(memory[start : start + size], arrived[to : to + size], closes)

    joined = coalesce([part(0, 100, 0, True), part(ALIGN, 50, ALIGN, False), part(ALIGN + 50, 20, ALIGN + 50, True)])
    assert [(s.numel(), t.numel()) for s, t in joined] == [(ALIGN + 70, ALIGN + 70)]
    apart = coalesce([part(0, 100, 0, False), part(ALIGN, 50, ALIGN, True), part(2 * ALIGN, 5, 3 * ALIGN, True)])
    assert [s.numel() for s, _ in apart] == [100, 50, 5]
    for s, t in joined:
        t.copy_(s)
    for piece in (slice(100), slice(ALIGN, ALIGN + 70)):
        assert torch.equal(arrived[piece], memory[piece])


def test_waiting_for_what_nobody_posts_is_a_defect() -> None:
    plan = make_plan(2)
    exact = plan.phases["exact"]
    run = Ranks(plan)
    states = run.new_states()
    steps = run.start(torch.ones(2, 7), 1.0, "exact", states)
    assert exact.steps[:3] == (Run("cut"), Start(("halo",)), Wait(("halo",)))
    next(steps[0]), next(steps[0])
    with pytest.raises(RuntimeError, match="rank 0 waits for halo, which has not come so far"):
        next(steps[0])
