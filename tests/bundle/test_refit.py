"""Other weights for a bundle: a fine-tune and a LoRA, compared with the model that has them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import districompile as dc
from districompile.bundle.bundle import Bundle
from districompile.bundle.manifest import manifest_text
from districompile.bundle.refit import Lora, RefitError, new_weights, read_lora, refit
from districompile.cli.main import main
from districompile.errors import BundleError
from districompile.plan.plan_report import PlanReport
from tests.small_models import captured, first, randomise, reference, relative_error

SIZE = ("sdxl", 1, 12, 8)


@pytest.fixture(scope="module", params=["eager", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def bundle(request: Any, tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param) / "bundle"
    dc.convert(captured(*SIZE), ranks=2).save(path, backend=request.param)
    return path


def exact(path: Path, kwargs: dict[str, Any]) -> Tensor:
    unet = dc.load(path, lockstep=True)
    with unet.exact():
        return first(unet(**kwargs))


def layers(module: nn.Module) -> dict[str, nn.Module]:
    """A linear and a convolution of every kind that a LoRA changes."""
    return {
        n: m
        for n, m in module.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and (".attn" in n or n.endswith(("conv1", "conv_shortcut")))
    }


def halves(weight: Tensor, rank: int = 2) -> tuple[Tensor, Tensor]:
    down = torch.randn(rank, *weight.shape[1:]) * 0.3
    up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2)) * 0.3
    return down, up


def changed(module: nn.Module, loras: list[Lora]) -> nn.Module:
    """The model with the changes added by hand, without the code that is tested."""
    new = copy.deepcopy(module)
    with torch.no_grad():
        for lora in loras:
            weight = new.get_parameter(f"{lora.name}.weight")
            weight += lora.scale * (lora.up.flatten(1) @ lora.down.flatten(1)).reshape(weight.shape)
    return new


def test_a_lora_is_added_to_every_ranks_weights(bundle: Path, tmp_path: Path) -> None:
    module, kwargs, _ = reference(*SIZE)
    state: dict[str, Tensor] = {}
    for name, layer in layers(module).items():
        down, up = halves(layer.weight)  # type: ignore[arg-type]
        state |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    assert {t.ndim for t in state.values()} == {2, 4}
    save_file(state, tmp_path / "lora.safetensors")
    loras, other = read_lora(tmp_path / "lora.safetensors", dict(module.config))
    assert len(loras) == len(state) // 2 and other == 0
    before = exact(bundle, kwargs)
    assert (
        main(["refit", str(bundle), "--lora", str(tmp_path / "lora.safetensors"), "--out", str(tmp_path / "new")]) == 0
    )
    with torch.no_grad():
        want = first(changed(module, loras)(**kwargs))
    assert relative_error(before, want) > 1e-3  # it changes something
    assert relative_error(exact(tmp_path / "new", kwargs), want) <= 1e-5
    assert torch.equal(exact(bundle, kwargs), before)  # the old bundle is as it was
    old, new = Bundle.open(bundle), Bundle.open(tmp_path / "new")
    engines = [n for n in old.manifest["files"] if n.startswith("engines/")]
    assert engines and set(engines) <= set(new.manifest["files"])
    (note,) = new.manifest["refits"]
    assert note["loras"] == [str(tmp_path / "lora.safetensors")] and len(note["weights_sha256"]) == 64


def test_scale_and_alpha(tmp_path: Path) -> None:
    module, _, _ = reference(*SIZE)
    name, layer = next(iter(layers(module).items()))
    down, up = halves(layer.weight)  # type: ignore[arg-type]
    # kohya's names and alpha: diffusers maps both
    key = "lora_unet_" + name.replace(".", "_")
    state = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    save_file(state, tmp_path / "kohya.safetensors")
    (lora,), _ = read_lora(tmp_path / "kohya.safetensors", dict(module.config), scale=3.0)
    assert lora.name == name
    assert lora.scale == pytest.approx(3.0 * 1.0 / 2)  # scale * alpha / rank
    own = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    text = {"text_encoder.x.lora_A.weight": down.clone(), "text_encoder.x.lora_B.weight": up.clone()}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.r": 2})}
    save_file({**own, **text}, tmp_path / "peft.safetensors", metadata=metadata)
    (lora,), other = read_lora(tmp_path / "peft.safetensors", dict(module.config))
    assert lora.scale == pytest.approx(8 / 2) and other == 2


def test_another_fine_tune_takes_the_place_of_the_weights(bundle: Path, tmp_path: Path) -> None:
    module, kwargs, _ = reference(*SIZE)
    # Tied and equal tensors share their bytes in the file: after this they differ, and every place moves
    new = randomise(copy.deepcopy(module), seed=5)
    new.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    with torch.no_grad():
        want = first(new(**kwargs))
    out = tmp_path / "new"
    assert main(["refit", str(bundle), "--weights", str(tmp_path / "tuned"), "--out", str(out)]) == 0
    assert relative_error(exact(out, kwargs), want) <= 1e-5
    before = sorted(p.name for p in (tmp_path / "new").iterdir())
    assert main(["refit", str(out), "--weights", str(tmp_path / "tuned")]) == 0  # in place
    assert relative_error(exact(out, kwargs), want) <= 1e-5
    assert sorted(p.name for p in out.iterdir()) == before


def test_equal_weights_that_become_unequal(tmp_path: Path) -> None:
    """Equal tensors lie in one place of the file; ONNX files name places."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 4, 3, padding=1)
            self.b = nn.Conv2d(4, 4, 3, padding=1)
            self.b.load_state_dict(self.a.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.relu(self.a(x)))
            return y

    net, x = Net(), torch.randn(1, 4, 12, 6)
    path = tmp_path / "bundle"
    dc.convert(net, args=(x,), ranks=2, rows={"x": 2}).save(path, backend="onnxruntime")
    with torch.no_grad():
        net.b.weight += 1.0
        want = net(x)
    assert refit(path, module=net) == 4
    unet = dc.load(path, lockstep=True)
    assert relative_error(unet(x), want) <= 1e-5


def test_joined_weights_are_put_together_from_their_parts(tmp_path: Path) -> None:
    """A pass may store several weights as one: the plan says of which parts it is made."""
    old = torch.arange(24.0).reshape(6, 4)

    plan = SimpleNamespace(
        weights={"a.weight+1": dc.ir.spec.TensorSpec((6, 4), torch.float32)},
        report=PlanReport(joined={"a.weight+1": (("a.weight", 2), ("b.weight", 4))}),
    )
    weights = SimpleNamespace(tensor=lambda name: old)
    lora = Lora("b", torch.ones(1, 4), torch.ones(4, 1), 0.5)
    bundle = Bundle(Path(), {}, {"one": plan})  # type: ignore[dict-item]
    readers, count = new_weights(bundle, weights, None, [lora])  # type: ignore[arg-type]
    want = old.clone()
    want[2:] += 0.5
    assert count == 1 and torch.equal(readers["a.weight+1"](), want)


@pytest.mark.parametrize(
    "state, message",
    [
        ({"unet.x.weight": torch.ones(2, 2)}, "is not a LoRA: it holds unet.x.weight"),
        ({"unet.x.lora_A.weight": torch.ones(2, 2)}, "x has one half of a low-rank change only"),
        (
            {"text_encoder.x.lora_A.weight": torch.ones(2, 2), "text_encoder.x.lora_B.weight": torch.ones(2, 2)},
            "changes nothing in the UNet",
        ),
        (
            {
                "unet.x.lora_A.weight": torch.ones(2, 2),
                "unet.x.lora_B.weight": torch.ones(2, 2),
                "unet.x.dora_scale": torch.ones(2),
            },
            "is a DoRA",
        ),
    ],
)
def test_files_that_are_no_lora(state: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(RefitError, match=message):
        read_lora(tmp_path / "x.safetensors")


def test_bad_input_is_one_line_and_changes_nothing(bundle: Path, tmp_path: Path, capsys: Any) -> None:
    manifest = (bundle / "manifest.json").read_bytes()
    (tmp_path / "x.bin").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    alien = {"unet.nowhere.lora_A.weight": torch.ones(2, 2), "unet.nowhere.lora_B.weight": torch.ones(2, 2)}
    save_file(alien, tmp_path / "alien.safetensors")
    module, _, _ = reference("unet2d", 1, 12, 8)
    module.save_pretrained(tmp_path / "other")  # type: ignore[operator]
    for arguments, message in (
        ([], "give --lora FILE, --weights FOLDER, or both"),
        (["--lora", str(tmp_path / "none.safetensors")], "there is no file"),
        (["--lora", str(tmp_path / "x.bin")], "never from a pickle"),
        (["--lora", str(tmp_path / "broken.safetensors")], "cannot be read"),
        (["--lora", str(tmp_path / "alien.safetensors")], "changes nowhere, which the bundle does not have"),
        (["--weights", str(tmp_path / "other")], "another architecture"),
    ):
        assert main(["refit", str(bundle), *arguments]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1, told
    assert (bundle / "manifest.json").read_bytes() == manifest
    Bundle.open(bundle)
    assert [p.name for p in bundle.parent.iterdir()] == [bundle.name]


def test_engines_with_weights_inside_are_refused(bundle: Path, tmp_path: Path) -> None:
    import shutil

    module, _, _ = reference(*SIZE)
    copied = tmp_path / "copy"
    shutil.copytree(bundle, copied)
    data = json.loads((copied / "manifest.json").read_text())
    data["engines"] = {"weights": "inside"}
    (copied / "manifest.json").write_text(manifest_text(data))
    with pytest.raises(BundleError, match="its engines hold their weights"):
        refit(copied, module=module)
