"""What users give wrongly is one line that names it, before any work: tensors, devices, factories, options."""

from __future__ import annotations

import itertools
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import districompile as dc
from districompile.bundle.bundle import Bundle
from districompile.cli import main
from districompile.cli.calls import Calls
from districompile.cli.checks import check_steps
from districompile.cli.common import quiet_libraries
from districompile.cli.timesteps import falling_timesteps, timestep_range
from districompile.common.tensors import not_finite
from districompile.errors import BundleError, CaptureError, EngineWarning, Error, InputError, ValueWarning
from districompile.ir.spec import TensorSpec
from tests.helpers_errors import bundle_of_nets, failing, nets_folder  # noqa: F401  (fixtures)

diffusers = pytest.importorskip("diffusers")

CONFIG: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8,), "layers_per_block": 1,
    "norm_num_groups": 4, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}  # fmt: skip


def odd_tensors() -> dict[str, Tensor]:
    x = torch.randn(2, 4, 8, 8)
    return {
        "meta": x.to("meta"),
        "sparse": x.to_sparse(),
        "nested": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]),
        "quantised": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    }


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_engines_cannot_take(bundle: Path, nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from error_nets import Net  # type: ignore[import-not-found]

    steps = torch.tensor([5, 5])
    loaded = dc.load(bundle, lockstep=True)
    for kind, x in odd_tensors().items():
        with pytest.raises(InputError, match=f"sample is a {kind}"):
            dc.convert(Net(), (x, steps), ranks=2, rows={"sample": 2})
        with pytest.raises(InputError, match=f"'sample' is a {kind}"):
            loaded(x, steps)
    with pytest.raises(InputError, match="'timestep' is too large"):
        loaded(torch.randn(2, 4, 8, 8), 10**400)
    assert loaded(torch.randn(2, 4, 8, 8), steps).shape == (2, 4, 8, 8)  # it still works
    assert "sample is a meta tensor" in failing(capsys, "convert", "error_nets:of_no_values", "--out", str(nets / "m"))
    half_loaded = Net()
    half_loaded.inner.to("meta")
    with pytest.raises(CaptureError, match=r"inner\.weight, inner\.bias: no data"):
        dc.convert(half_loaded, (torch.randn(2, 4, 8, 8), steps), ranks=2)
    quantised = Net()
    quantised.register_buffer("codes", odd_tensors()["quantised"])
    with pytest.raises(CaptureError, match="weight codes is a quantised tensor"):
        dc.convert(quantised, (torch.randn(2, 4, 8, 8), steps), ranks=2)


@pytest.mark.parametrize("device", ["zzz", "", "cuda:-1", "meta", "mps", 1.5, ["cpu"]])
def test_devices_that_there_are_not(bundle: Path, device: Any) -> None:
    with pytest.raises(InputError, match="there is no device|bundles run on"):
        dc.load(bundle, lockstep=True, device=device)


@pytest.mark.parametrize("count", [0, 2])
def test_gpus_that_there_are_not(bundle: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for device in ("cuda:7", torch.device("cuda:7"), *(["cuda"] if count == 0 else [])):
        with pytest.raises((BundleError, InputError), match="no GPU here|cuda:0 to cuda:1"):
            dc.load(bundle, lockstep=True, device=device)


def test_not_finite() -> None:
    assert not_finite(torch.tensor([1.0, torch.nan])) == "NaN"
    assert not_finite(torch.tensor([1.0, torch.inf, 2.0], dtype=torch.bfloat16)) == "infinite values"
    assert not_finite(torch.tensor([1.0, -torch.inf, 2.0])) == "infinite values"
    assert not_finite(torch.full((3, 3), -torch.inf).triu(1)) is None  # a mask
    for fine in (torch.zeros(0), torch.ones(2, dtype=torch.int64), torch.ones(2).to(torch.float8_e5m2)):
        assert not_finite(fine) is None


def test_weights_that_are_no_numbers_are_named(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--backend", "eager", "--out", str(nets / "nan-0"), "--json"]
    assert main.main(["convert", "error_nets:broken", *arguments]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1 and "inner.bias (NaN)" in lines[0]
    from error_nets import broken

    module, args, kwargs, rows = broken()
    with pytest.warns(ValueWarning, match=r"inner\.bias \(NaN\)"):
        dc.convert(module, args, kwargs, ranks=2, rows=rows).save(nets / "nan-1", "eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ValueWarning)
        with torch.no_grad():
            module.inner.bias[1] = 0
        dc.convert(module, args, kwargs, ranks=2, rows=rows).save(nets / "nan-2", "eager")


def test_factories_that_fail(nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failing(capsys, "convert", "error_nets:raises", "--out", str(nets / "x"))
    assert "error_nets:raises failed: KeyError: 'no such key'" in line and "error_nets.py:" in line
    assert "rows must be a dict" in failing(capsys, "convert", "error_nets:bad_rows", "--out", str(nets / "x"))
    (nets / "no_python.py").write_text("def :")
    assert "importing no_python failed: SyntaxError" in failing(capsys, "convert", "no_python:f")


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float32"])
def test_the_type_of_a_factory(nets: Path, dtype: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    out = nets / f"typed-{dtype}"
    arguments = [] if dtype is None else ["--dtype", dtype]
    assert (
        main.main(["convert", "error_nets:table", *arguments, "--backend", "eager", "--out", str(out), "--json"]) == 0
    )
    plan = Bundle.open(out).plan
    wanted = getattr(torch, dtype or "float32")
    assert {w.dtype for w in plan.weights.values()} == {wanted}
    assert {i.path: i.spec.dtype for i in plan.inputs} == {"sample": wanted, "timestep": torch.int64}
    assert plan.options.dtype == dtype
    assert main.main(["verify", str(out), "--model", "error_nets:table", "--json"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [
        (TensorSpec((), torch.float32), 0, 999),
        (TensorSpec((2,), torch.int64), 0, 11),
        (TensorSpec((2,), torch.float16), 0, 999),
        (TensorSpec((), torch.bfloat16), 0, 999),
        (TensorSpec((1,), torch.float32), 0, 1),
        (TensorSpec((), torch.float32), -3.5, 0),
        (TensorSpec((), torch.int32), 0, 5.5),
        (TensorSpec((1,), torch.bfloat16), 0, 0.5),  # the times of a flow, in bench: equal ones are no steps
    ],
)
def test_timesteps_fall_within_their_range(spec: TensorSpec, low: float, high: float) -> None:
    values = falling_timesteps(spec, low, high)
    assert all(tuple(v.shape) == spec.shape and v.dtype == spec.dtype for v in values)
    numbers = [float(v.reshape(-1)[0]) for v in values]
    assert all(a > b for a, b in itertools.pairwise(numbers)) and len(numbers) > 5
    assert low <= numbers[-1] and numbers[0] <= high
    assert high - numbers[0] < 8 and numbers[-1] - low < 1  # bfloat16 has 996, and 1000 is too much


def test_bench_calls_a_learned_table(bundle: Path) -> None:
    module = dc.load(bundle, lockstep=True)
    assert timestep_range(module.plan, module.config) == (0, 5)
    assert timestep_range(module.plan, {"num_train_timesteps": 12}) == (0, 11)
    seen: list[float] = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    timer = Calls(module)
    phases: tuple[Any, ...] = ("exact", "displaced")
    for phase in phases:  # more calls than there are timesteps
        module.phase = phase
        assert len(timer.timed(9)) == 9
    assert seen[:7] == [5, 4, 3, 2, 1, 0, 5] and set(seen) == {0, 1, 2, 3, 4, 5}


def test_examples_of_learned_embeddings() -> None:
    from districompile.models import inputs

    config = {**CONFIG, "num_train_timesteps": 12, "time_embedding_type": "learned"}
    example = inputs.unet(config, inputs.Context(), inputs.Size(8, 8, 1), torch.float32, 0)
    assert example.args[1].dtype == torch.int64 and 0 <= int(example.args[1]) < 12
    with torch.no_grad():
        diffusers.UNet2DModel(**config)(*example.args)


@pytest.mark.parametrize(
    "words",
    [
        ["run", "demo", "--seed", str(2**64)],
        ["run", "demo", "--seed", "-1"],
        ["verify", "demo", "--seed", str(2**64)],
        ["run", "demo", "--guidance", "nan"],
        ["run", "demo", "--guidance", "inf"],
        ["verify", "demo", "--tolerance", "nan"],
        ["verify", "demo", "--quality", "--guidance", "-inf"],
        ["convert", "demo", "--drift-limit", "nan"],
        ["refit", "demo", "--scale", "nan"],
        ["run", "demo", "--prompt", "\udcff"],
        ["verify", "demo", "--prompt", "a \udcfe"],
        ["run", "demo", "--negative-prompt", "\udcff"],
    ],
    ids=lambda words: " ".join(words).encode("ascii", "replace").decode(),
)
def test_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert f"Invalid value for '{words[-2]}'" in failing(capsys, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "x" * 300], "File name too long"),
        (["inspect", "x" * 300], "File name too long"),
        (["convert", "demo", "--backend", "eager", "--dump", "/dev/null"], "/dev/null is a file: give a folder"),
        (["convert", "error_nets:table", "--backend", "eager", "--rules", ""], "rules : it cannot be imported"),
        (["convert", "error_nets:table", "--backend", "eager", "--rules", ".x"], "rules .x: it cannot be imported"),
        (["convert", "error_nets:table", "--backend", "eager", "--rules", "own_faults"], "ZeroDivisionError"),
        (["convert", "error_nets:table", "--backend", "eager", "--passes", "own_faults:P"], "ZeroDivisionError"),
        (["convert", "own_faults:make", "--backend", "eager"], "importing own_faults failed: ZeroDivisionError"),
    ],
    ids=lambda x: " ".join(x)[-30:] if isinstance(x, list) else "",
)
def test_names(
    nets: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (nets / "own_faults.py").write_text("1 / 0")
    monkeypatch.chdir(nets)
    assert message in failing(capsys, *words)


def test_traces_need_a_file(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a folder" in failing(capsys, "bench", str(bundle), "--trace", str(bundle))


@pytest.mark.parametrize(
    ("name", "options", "steps", "ok"),
    [
        ("DDIMScheduler", {"timestep_spacing": "trailing"}, 1000, True),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}, 1001, False),
        ("DDIMScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, 1000, False),
        ("DDIMScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, 500, True),
        ("DDIMScheduler", {"num_train_timesteps": 10}, 11, False),
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, 50, True),
        ("EulerDiscreteScheduler", {}, 50, True),
        ("EulerDiscreteScheduler", {}, 10**12, False),
        ("FlowMatchEulerDiscreteScheduler", {}, 28, True),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, 28, True),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 25, True),
    ],
    ids=str,
)
def test_steps_that_a_scheduler_has(name: str, options: dict[str, Any], steps: int, ok: bool, tmp_path: Path) -> None:
    getattr(diffusers, name)(**options).save_pretrained(tmp_path / "scheduler")
    if ok:
        check_steps(str(tmp_path), steps)
    else:
        with pytest.raises(Error, match=f"--steps {steps}: .*scheduler_config.json"):
            check_steps(str(tmp_path), steps)


@pytest.mark.parametrize("change", [{"_class_name": ["x"]}, {"_class_name": "NoScheduler"}, {"beta_schedule": 7}])
def test_schedulers_that_cannot_be_made(change: dict[str, Any], tmp_path: Path) -> None:
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(Error, match="scheduler_config.json"):
        check_steps(str(tmp_path), 10)


def test_runs_are_refused_before_they_start(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "image.png")
    line = failing(capsys, "run", "demo", "--prompt", "a red circle", "--steps", "1001", "--out", out)
    assert "--steps 1001" in line and not list(tmp_path.iterdir())


def test_standard_output_that_fails(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main.main(["inspect", str(bundle)]) == 2
    line = capfd.readouterr().err
    assert line.startswith("error: standard output cannot be written: No space left") and line.count("\n") == 1
    end, start = os.pipe()
    os.close(end)
    with os.fdopen(start, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main.main(["inspect", str(bundle)]) == 141
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys, "stdout", None)
    assert main.main(["inspect", str(bundle)]) == 2
    assert "standard output is closed" in capfd.readouterr().err


def test_names_that_the_terminal_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        from districompile.cli.checks import Output

        with Output():
            print("\u00e9 \udcff")
    assert (tmp_path / "out").read_text() == "\\xe9 \\udcff\n"


def test_a_command_says_once_that_engines_compute_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.showwarning = main._warn
        quiet_libraries()
        for _ in range(2):
            warnings.warn("engines compute in float32", EngineWarning, stacklevel=1)
            warnings.warn("advice of a library", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: engines compute in float32\n"
