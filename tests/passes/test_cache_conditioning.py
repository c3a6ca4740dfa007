"""What depends on the conditioning alone is computed once an image; a conditioning that changes makes a call exact."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import districompile as dc
from districompile.runtime.calls.call_tracker import Decision
from districompile.runtime.calls.conditioning import Conditioning


class Net(nn.Module):
    """Cross-attention to a text, as in a UNet, small."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.q, self.kv, self.time = nn.Linear(16, 16), nn.Linear(8, 32), nn.Linear(1, 16)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x = self.inner(sample) + self.time(timestep.reshape(1, 1) / 100)[..., None, None]
        k, v = self.kv(text).chunk(2, -1)
        seen = nn.functional.scaled_dot_product_attention(self.q(x.flatten(2).transpose(1, 2)), k, v)
        result: Tensor = self.outer(x + seen.transpose(1, 2).reshape(x.shape))
        return result


@pytest.fixture(scope="module")
def made() -> tuple[Net, dict[str, Any], Any]:
    torch.manual_seed(0)
    net = Net().eval()
    kwargs = {"sample": torch.randn(1, 4, 12, 8), "timestep": torch.tensor(9.0), "text": torch.randn(1, 5, 8)}
    program = dc.convert(net, kwargs=kwargs, ranks=3, warmup_steps=1, optimise="cache-conditioning")
    return net, kwargs, program


def test_the_displaced_phase_does_not_read_its_weights(made: tuple[Net, dict[str, Any], Any]) -> None:
    _, _, program = made
    read = {p: {w for s in program.plan.phases[p].segments.values() for w in s.weights} for p in ("exact", "displaced")}
    assert read["exact"] - read["displaced"] == {"kv.weight", "kv.bias"}
    assert program.plan.options.conditioning == ("text",)


def calls(unet: Any, kwargs: dict[str, Any], texts: list[Tensor]) -> list[Tensor]:
    unet.reset()
    return [unet(**{**kwargs, "timestep": torch.tensor(9.0 - i), "text": t}).clone() for i, t in enumerate(texts)]


def test_changes_are_noticed(made: tuple[Net, dict[str, Any], Any], tmp_path: Any) -> None:
    net, kwargs, program = made
    program.save(tmp_path / "b", backend="eager")
    dc.convert(net, kwargs=kwargs, ranks=3, warmup_steps=1).save(tmp_path / "plain", backend="eager")
    unet, plain = (dc.load(tmp_path / n, lockstep=True) for n in ("b", "plain"))
    text, other = kwargs["text"], torch.randn(1, 5, 8)
    for a, b in zip(calls(unet, kwargs, [text] * 4), calls(plain, kwargs, [text] * 4), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    written = text.clone()
    changing = [text, text.clone(), other, other, text, text]
    found = calls(unet, kwargs, changing)
    unet.reset()
    unet(**{**kwargs, "text": written})
    written.add_(1)
    late = unet(**{**kwargs, "timestep": torch.tensor(8.0), "text": written})
    with torch.no_grad():
        for i in (0, 2, 4):  # exact
            torch.testing.assert_close(
                found[i],
                net(**{**kwargs, "timestep": torch.tensor(9.0 - i), "text": changing[i]}),
                rtol=1e-5,
                atol=1e-5,
            )
        want = net(**{**kwargs, "timestep": torch.tensor(8.0), "text": written})
    torch.testing.assert_close(late, want, rtol=1e-5, atol=1e-5)


def test_constant_change_is_told() -> None:
    follow = Conditioning(["text"])
    phases = [follow.check(Decision("exact", 0, True), {"text": torch.zeros(2)}).phase]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for i in range(1, 5):
            phases.append(follow.check(Decision("displaced", 0, False), {"text": torch.full((2,), float(i))}).phase)
    assert phases == ["exact"] * 5
    assert ["text changes from step to step" in str(w.message) for w in told] == [True]


def test_the_same_memory_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """That would wait for the device, at every step."""
    follow, text = Conditioning(["text"]), torch.zeros(2, 3)
    follow.check(Decision("exact", 0, True), {"text": text.detach()})
    monkeypatch.setattr(torch, "equal", None)
    assert follow.check(Decision("displaced", 0, False), {"text": text.detach()}).phase == "displaced"
    monkeypatch.undo()
    other = torch.frombuffer(text.numpy(), dtype=text.dtype).reshape(2, 3)  # at the same address, by another way
    text.numpy().fill(2)
    assert other.data_ptr() == text.data_ptr()
    assert follow.check(Decision("displaced", 0, False), {"text": other}).phase == "exact"
    text.zero_()
    assert follow.check(Decision("displaced", 0, False), {"text": text}).phase == "exact"
    assert follow.check(Decision("displaced", 0, False), {"text": text.add_(1).detach()}).phase == "exact"
    assert follow.check(Decision("displaced", 0, False), {"text": text.as_strided((2, 3), (0, 1))}).phase == "displaced"
    assert follow.check(Decision("displaced", 0, False), {"text": text[:1].expand(2, 3) * 2}).phase == "exact"


def test_streams_are_apart_and_inference_tensors_compared() -> None:
    follow = Conditioning(["text"])
    with torch.inference_mode():
        text = torch.zeros(2)
    for stream in (0, 1):
        assert follow.check(Decision("exact", stream, stream == 0), {"text": text}).phase == "exact"
    assert follow.check(Decision("displaced", 0, False), {"text": text}).phase == "displaced"
    with torch.inference_mode():
        text.add_(1)
    assert follow.check(Decision("displaced", 0, False), {"text": text}).phase == "exact"
    assert follow.check(Decision("displaced", 1, False), {"text": text}).phase == "exact"
    assert follow.check(Decision("displaced", 1, False), {"text": text}).phase == "displaced"
