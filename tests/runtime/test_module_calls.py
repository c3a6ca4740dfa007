"""Calls of a converted module: what is switched on around them, their timesteps, threads, and the end."""

# ruff: noqa: F811 (fixtures of helpers_face)

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from helpers_face import bundle, check, example, net, pipeline, shared, unet, want  # noqa: F401

import districompile as dc
from districompile.errors import InputError
from districompile.runtime.module import DistributedModule

# What is switched on around a call


def default_dtype() -> Any:
    class Half:
        def __enter__(self) -> None:
            torch.set_default_dtype(torch.float16)

        def __exit__(self, *error: Any) -> None:
            torch.set_default_dtype(torch.float32)

    return Half()


AROUND: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "default device": lambda: torch.device("meta"),
    "default dtype": default_dtype,
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "autocast of another device": lambda: torch.autocast("cuda", dtype=torch.float16),
}


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("name", AROUND)
def test_loaded_and_called_inside(name: str, bundle: Path, unet: DistributedModule, want: torch.Tensor) -> None:
    call = example()
    with AROUND[name]():
        loaded = dc.load(bundle, lockstep=True, verify="quick")
        outputs = [u(**call)[0] for u in (unet, loaded) for _ in range(3)]
    outputs.append(loaded(**call)[0])  # what was loaded inside is of use outside
    for output in (outputs[0], outputs[3]):
        torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-5)
    assert all(o.dtype == want.dtype and not o.is_inference() for o in outputs)


def test_autocast_is_refused(unet: DistributedModule, want: torch.Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(InputError, match="autocast: the dtypes of a converted module are fixed"):
            unet(**example())
        with torch.autocast("cpu", enabled=False):
            check(unet, want)


def test_gradients_are_refused_where_they_are_computed(unet: DistributedModule, want: torch.Tensor) -> None:
    x = example()["sample"].requires_grad_()
    output = unet(**{**example(), "sample": x})[0]
    torch.testing.assert_close(output.detach(), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"no gradients: call it with torch.no_grad"):
        torch.autograd.grad((x - output).sum(), x)
    with torch.no_grad():
        assert not unet(**{**example(), "sample": x})[0].requires_grad


@pytest.mark.parametrize("options", [{}, {"dynamic": True}], ids=str)
def test_compile_passes_it_by(unet: DistributedModule, want: torch.Tensor, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(unet, backend="eager", **options)
    for _ in range(2):
        unet.reset()
        check(compiled, want)
    assert compiled.config.in_channels == 4 and next(compiled.parameters()).dtype == torch.float32
    assert pipeline(compiled)._execution_device.type == "cpu"
    with pytest.raises(InputError, match="--dtype float16"):
        compiled.half()


def test_compile_with_one_graph_says_why_not(unet: DistributedModule, want: torch.Tensor) -> None:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a converted module is compiled already: leave torch.comp"):
        torch.compile(unet, backend="eager", fullgraph=True)(**example())
    check(unet, want)


def test_called_inside_of_compiled_code(unet: DistributedModule, want: torch.Tensor) -> None:
    torch._dynamo.reset()
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def step(x: torch.Tensor) -> torch.Tensor:
        return unet(**{**example(), "sample": x + 0})[0] * 2

    with torch.no_grad():
        torch.testing.assert_close(step(example()["sample"]) / 2, want, rtol=1e-4, atol=1e-5)
    assert all("conv" not in str(node.target) for graph in seen for node in graph.graph.nodes)


def test_hooks(unet: DistributedModule) -> None:
    seen: list[str] = []
    handles = [
        unet.register_forward_pre_hook(lambda *a: seen.append("before")),
        unet.register_forward_hook(lambda *a: seen.append("after")),
    ]
    unet(**example())
    for handle in handles:
        handle.remove()
    unet(**example())
    assert seen == ["before", "after"]


# Timesteps


@pytest.mark.parametrize("given", [torch.tensor([521.0]), torch.full((2,), 521), torch.tensor(521.0).expand(2)])
def test_equal_timesteps_are_one(unet: DistributedModule, want: torch.Tensor, given: torch.Tensor) -> None:
    check(unet, want, timestep=given)


def test_unequal_timesteps_are_refused(unet: DistributedModule) -> None:
    with pytest.raises(InputError, match=r"timestep: .* must be equal, but are \[521, 500\]: call once for each"):
        unet(**{**example(), "timestep": torch.tensor([521, 500])})
    with pytest.raises(InputError, match="called with .3."):
        unet(**{**example(), "timestep": torch.full((3,), 521)})


# Threads, and the end


def draw(unet: Any, seed: int, meet: Callable[[], Any] = lambda: None) -> list[torch.Tensor]:
    """The outputs of six steps. The text differs from seed to seed; the timesteps do not."""
    g = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, 24, generator=g)
    outputs = []
    with torch.no_grad():
        for i in range(6):
            meet()
            outputs.append(unet(x, torch.tensor(900.0 - 20 * i), text)[0])
            x = x - 0.1 * outputs[-1]
    return outputs


def in_threads(*actions: Callable[[], Any]) -> list[Any]:
    found: list[Any] = [None] * len(actions)

    def run(i: int) -> None:
        try:
            found[i] = actions[i]()
        except BaseException as e:
            found[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_threads_that_take_turns_are_exact(bundle: Path, net: Any) -> None:
    """Each call is what the original gives: no image is built on the state of another."""
    unet = dc.load(bundle, lockstep=True, verify="quick")
    barrier = threading.Barrier(2, timeout=60)
    turns = in_threads(*(lambda seed=seed: draw(unet, seed, barrier.wait) for seed in (1, 2)))
    for seed, found in zip((1, 2), turns, strict=True):
        assert isinstance(found, list), found
        # Two calls of one thread in a row happen where the other is late, and are displaced at most
        for a, b in zip(found[:2], draw(net, seed)[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        alone = torch.stack(draw(net, seed))
        assert torch.linalg.vector_norm(torch.stack(found) - alone) < 0.02 * torch.linalg.vector_norm(alone)


def test_strict_turns(unet: DistributedModule, net: Any) -> None:
    """One call of each thread at a time, the second image in the midst of the first."""
    turn = threading.Semaphore(1), threading.Semaphore(0)

    def image(number: int) -> list[torch.Tensor]:
        def meet() -> None:
            assert turn[number].acquire(timeout=60)

        def call(*args: Any) -> Any:
            try:
                return unet(*args)
            finally:
                turn[1 - number].release()

        return draw(call, number, meet)

    for seed, found in enumerate(in_threads(lambda: image(0), lambda: image(1))):
        assert isinstance(found, list), found
        torch.testing.assert_close(torch.stack(found), torch.stack(draw(net, seed)), rtol=1e-4, atol=1e-4)


def test_images_of_threads_one_after_the_other(unet: DistributedModule) -> None:
    """As a server draws: each image in a thread of its own, displaced like any other."""
    first, second = draw(unet, 1), in_threads(lambda: draw(unet, 1))[0]
    assert unet.image_calls["displaced"] > 0 or unet.image_calls["exact"] == 6
    assert torch.equal(torch.stack(first), torch.stack(second))


def test_exact_is_of_one_thread(unet: DistributedModule) -> None:
    inside, done = threading.Event(), threading.Event()

    def holds() -> None:
        with unet.exact():
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=holds)
    thread.start()
    inside.wait(60)
    with unet.exact():
        done.set()
        thread.join(60)
        assert unet._phase == "exact"  # the other thread has left its own block
    assert unet._phase is None


def test_calls_after_close(bundle: Path) -> None:
    unet = dc.load(bundle, lockstep=True, verify="quick")
    unet(**example())
    unet.close()
    unet.close()
    with pytest.raises(InputError, match="this module was closed: load the bundle again"):
        unet(**example())
