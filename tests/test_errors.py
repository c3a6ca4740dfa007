"""What users give wrongly is one line that names it, before any work: configurations, weights, LoRAs, options."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import districompile as dc
from districompile import cli
from districompile.bundle import Bundle
from districompile.commands.bench import Calls
from districompile.commands.checks import check_steps
from districompile.commands.timesteps import falling_timesteps, timestep_range
from districompile.errors import BundleError, CaptureError, Error, InputError, ValueWarning
from districompile.ir.plan import TensorSpec
from districompile.refit import RefitError, read_lora
from districompile.tensors import not_finite

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8,), "layers_per_block": 1,
    "norm_num_groups": 4, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}  # fmt: skip

NETS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(12, 4)
        self.inner = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample, timestep):
        return self.inner(sample) + self.table(timestep)[:, :, None, None]

def table():
    return Net(), (torch.randn(2, 4, 8, 8), torch.tensor([5, 5])), {}, {"sample": 2}

def broken():
    net = Net()
    with torch.no_grad():
        net.inner.bias[1] = torch.nan
    return net, *table()[1:]

def raises():
    return {}["no such key"]

def bad_rows():
    return Net(), (torch.randn(2, 4, 8, 8), torch.tensor([5, 5])), {}, {"sample": "2"}

def of_no_values():
    return Net(), (torch.empty(2, 4, 8, 8, device="meta"), torch.tensor([5, 5])), {}, {"sample": 2}
"""


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder; tests copy it before they damage it."""
    path = tmp_path_factory.mktemp("unet")
    torch.manual_seed(0)
    diffusers.UNet2DModel(**CONFIG).save_pretrained(path)
    return path


@pytest.fixture
def model(unet: Path, tmp_path: Path) -> Path:
    shutil.copytree(unet, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with factories in it, importable."""
    home = tmp_path_factory.mktemp("nets")
    (home / "error_nets.py").write_text(NETS)
    sys.path.insert(0, str(home))
    try:
        yield home
    finally:
        sys.path.remove(str(home))
        sys.modules.pop("error_nets", None)


@pytest.fixture(scope="module")
def bundle(nets: Path) -> Path:
    assert cli.main(["convert", "error_nets:table", "--backend", "eager", "--out", str(nets / "b"), "--json"]) == 0
    return nets / "b"


def failing(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must fail with one line; returns it."""
    capsys.readouterr()
    assert cli.main(list(words)) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[-1].startswith("error: ") and "Traceback" not in err, err
    assert len([line for line in lines if line.startswith("error")]) == 1
    return lines[-1]


def convert(model: Path) -> list[str]:
    return ["convert", str(model), "--gpus", "1", "--backend", "eager", "--out", str(model.parent / "made")]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("_class_name", ["UNet2DModel"], "no example inputs are known for the class"),
        ("_class_name", {"a": 1}, "no example inputs are known for the class"),
        ("_class_name", None, "no example inputs are known for the class"),
        ("sample_size", "word", "config.json: sample_size is 'word'"),
        ("sample_size", [8, 8, 8], "config.json: sample_size is [8, 8, 8]"),
        ("sample_size", [], "config.json: sample_size is []"),
        ("sample_size", -8, "config.json: sample_size is -8"),
        ("sample_size", True, "config.json: sample_size is True"),
        ("sample_size", 10**15, "config.json: sample_size is 1000000000000000"),
        ("in_channels", "four", "config.json: in_channels is 'four'"),
        ("in_channels", -1, "in_channels is -1"),
        ("in_channels", 0, "conv_in.weight"),
        ("in_channels", None, "in_channels is None"),
        ("block_out_channels", 8, "config.json: block_out_channels is 8"),
        ("block_out_channels", [], "config.json: block_out_channels is []"),
        ("block_out_channels", ["x"], "config.json: block_out_channels has 'x'"),
        ("norm_num_groups", 0, "norm_num_groups is 0"),
        ("norm_num_groups", 3, "norm_num_groups is 3"),
        ("norm_eps", "small", "config.json: norm_eps is 'small'"),
        ("act_fn", ["silu"], "config.json: act_fn is ['silu']"),
        ("act_fn", "nothing", "act_fn is 'nothing'"),
        ("flip_sin_to_cos", "yes", "config.json: flip_sin_to_cos is 'yes'"),
        ("time_embedding_type", "other", "time_embedding_type is 'other'"),
        ("layers_per_block", 10**9, "config.json: layers_per_block is 1000000000"),
        ("layers_per_block", 0, "down_blocks.0.resnets.0.conv1.bias"),
        ("num_class_embeds", 5, "lacks class_embedding.weight"),
        ("class_embed_type", "other", "config.json: class_embed_type 'other'"),
        ("num_train_timesteps", "many", "config.json: num_train_timesteps is 'many'"),
        ("quantization_config", [1], "quantised"),
    ],
    ids=str,
)
def test_configurations(model: Path, key: str, value: Any, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: value}))
    line = failing(capsys, *convert(model))
    assert words in line and str(model) in line


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1]", "does not hold a JSON object"),
        (b"", "cannot be read"),
    ],
    ids=["deep", "not utf-8", "list", "empty"],
)
@pytest.mark.parametrize("name", ["config.json", "model_index.json"])
def test_files_that_are_no_json(
    model: Path, name: str, data: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / name).write_bytes(data)
    line = failing(capsys, *convert(model))
    assert words in line and name in line


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
LIES = {
    "overlapping": (safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "offset for tensor `b`"),
    "too long": (safetensors({"a": entry(0, 8)}, bytes(8), 10**6), "header length"),
    "huge": (safetensors({"a": entry(0, 8)}, bytes(8), 2**62), "header too large"),
    "truncated": (safetensors({"a": entry(0, 8)}, bytes(4)), "not fully covered"),
    "twice": (safetensors(TWICE, bytes(8)), "names a twice"),
    "unknown type": (safetensors({"a": entry(0, 8, "F99")}, bytes(8)), "unknown variant `F99`"),
    "other shape": (safetensors({"a": entry(0, 8, shape=(3,))}, bytes(8)), "invalid shape"),
    "list": (safetensors([1]), "invalid type: sequence"),
    "no json": (safetensors(b"hello"), "invalid JSON"),
    "empty": (b"", "header too small"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie(model: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, words = LIES[name]
    (model / WEIGHTS).write_bytes(data)
    line = failing(capsys, *convert(model))
    assert words in line and f"{model / WEIGHTS} cannot be read" in line
    (tmp_path / "lora.safetensors").write_bytes(data)
    with pytest.raises(RefitError, match=re.escape(words)):
        read_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("conv_in.weight"), "lacks conv_in.weight"),
        (lambda s: s.update(foreign=torch.zeros(2)), "foreign"),
        (lambda s: s.update({"conv_in.weight": torch.zeros(2, 3)}), "conv_in.weight expected shape"),
        (lambda s: s.update({"conv_in.weight": torch.tensor(1.0)}), "conv_in.weight expected shape"),
        (lambda s: s.update({"conv_in.weight": s["conv_in.weight"].int()}), "conv_in.weight is of type I32"),
    ],
    ids=["missing", "foreign", "shape", "scalar", "integers"],
)
def test_weights_that_do_not_fit(
    model: Path, bundle: Path, change: Callable[[dict[str, Tensor]], Any], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    state = load_file(model / WEIGHTS)
    change(state)
    save_file(state, model / WEIGHTS)
    assert words in failing(capsys, *convert(model))
    assert words in failing(capsys, "refit", str(bundle), "--weights", str(model), "--out", str(model / "refitted"))


def test_a_pipelines_file_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries drop the name of the file, or the reason."""
    from districompile.models.sources import ModelError, load_pipeline

    model.rename(model.with_name("unet"))
    (model.parent / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    (model.parent / "vae").mkdir()
    (model.parent / "vae" / WEIGHTS).write_bytes(LIES["truncated"][0])

    def load(*_: Any, **__: Any) -> None:
        raise OSError("Error while deserializing header")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)
    with pytest.raises(ModelError, match=f"vae/{WEIGHTS} cannot be read: .*not fully covered"):
        load_pipeline(str(model.parent))


def sharded(model: Path, **named: Any) -> None:
    name = "diffusion_pytorch_model-00001-of-00001.safetensors"
    (model / WEIGHTS).rename(model / name)
    keys = load_file(model / name)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, name), **named}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"conv_in.weight": "part-2.safetensors"}, "names part-2.safetensors, which is missing"),
        ({"conv_in.weight": "../x.safetensors"}, "not a file beside it"),
        ([1], "weight_map"),
        ({"conv_in.weight": 5}, "weight_map"),
    ],
    ids=str,
)
def test_indices(model: Path, weight_map: Any, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    sharded(model, weight_map=weight_map)
    assert words in failing(capsys, *convert(model))


def test_links_and_shards_work(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / WEIGHTS).rename(model.parent / "blob")
    (model / WEIGHTS).symlink_to("../blob")
    assert cli.main([*convert(model), "--stop-after", "annotate"]) == 0
    (model.parent / "blob").rename(model.parent / "moved")
    assert "broken link" in failing(capsys, *convert(model))
    (model / WEIGHTS).unlink()
    shutil.copy(model.parent / "moved", model / WEIGHTS)
    sharded(model)
    assert cli.main([*convert(model), "--stop-after", "annotate"]) == 0


DOWN, UP = "unet.mid.to_q.lora_A.weight", "unet.mid.to_q.lora_B.weight"


@pytest.mark.parametrize(
    ("state", "metadata", "words"),
    [
        ({DOWN: torch.zeros(0, 8), UP: torch.zeros(8, 0)}, {}, "rank 0"),
        ({DOWN: torch.tensor(1.0), UP: torch.tensor(1.0)}, {}, "is a matrix"),
        ({DOWN: torch.ones(8), UP: torch.ones(8)}, {}, "is a matrix"),
        ({DOWN: torch.full((2, 8), torch.nan), UP: torch.ones(8, 2)}, {}, f"{DOWN} holds NaN"),
        ({DOWN: torch.ones(2, 8), UP: torch.full((8, 2), torch.inf)}, {}, f"{UP} holds NaN or infinite"),
        ({DOWN: torch.ones(2, 8).int(), UP: torch.ones(8, 2)}, {}, "of type int32"),
        ({DOWN: torch.ones(2, 8), UP: torch.ones(8, 1)}, {}, "do not fit each other"),
        ({DOWN: torch.ones(2, 8)}, {}, "one half"),
        ({UP: torch.ones(2, 8)}, {}, "one half"),
        ({}, [1], "is a list"),
        ({}, {"unet.lora_alpha": "word"}, "lora_alpha is 'word'"),
        ({}, {"unet.lora_alpha": [1]}, "lora_alpha is [1]"),
        ({}, {"unet.alpha_pattern": {"a": 1}}, "alpha_pattern"),
        ({}, {"unet.use_rslora": True}, "use_rslora"),
        ({"unet.mid.to_q.lora_B.bias": torch.ones(8)}, {}, "lora_B.bias"),
        ({"unet.mid.to_q.alpha": torch.ones(2)}, {}, "alpha of mid.to_q is [2]"),
        ({"unet.mid.to_q.alpha": torch.tensor(torch.nan)}, {}, "alpha of mid.to_q is nan"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_loras(state: dict[str, Tensor], metadata: Any, words: str, tmp_path: Path) -> None:
    if DOWN not in state and UP not in state:
        state = {DOWN: torch.ones(2, 8), UP: torch.ones(8, 2), **state}
    file = tmp_path / "lora.safetensors"
    save_file(state, file, metadata={"lora_adapter_metadata": json.dumps(metadata)})
    with pytest.raises(RefitError, match=re.escape(words)) as found:
        read_lora(file)
    assert str(file) in str(found.value)


def test_alpha_beside_the_factors_is_read(tmp_path: Path) -> None:
    state = {DOWN: torch.ones(2, 8), UP: torch.ones(8, 2), "unet.mid.to_q.alpha": torch.tensor(8.0)}
    save_file(state, tmp_path / "lora.safetensors")
    (lora,), _ = read_lora(tmp_path / "lora.safetensors")
    assert lora.scale == 4


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
    arguments = ["--backend", "eager", "--out", str(nets / "nan"), "--json"]
    assert cli.main(["convert", "error_nets:broken", *arguments]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1 and "inner.bias (NaN)" in lines[0]
    from error_nets import broken

    module, args, kwargs, rows = broken()
    with pytest.warns(ValueWarning, match=r"inner\.bias \(NaN\)"):
        dc.convert(module, args, kwargs, ranks=2, rows=rows).save(nets / "nan", "eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ValueWarning)
        with torch.no_grad():
            module.inner.bias[1] = 0
        dc.convert(module, args, kwargs, ranks=2, rows=rows).save(nets / "nan", "eager")


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
    assert cli.main(["convert", "error_nets:table", *arguments, "--backend", "eager", "--out", str(out), "--json"]) == 0
    plan = Bundle.open(out).plan
    wanted = getattr(torch, dtype or "float32")
    assert {w.dtype for w in plan.weights.values()} == {wanted}
    assert {i.path: i.spec.dtype for i in plan.inputs} == {"sample": wanted, "timestep": torch.int64}
    assert plan.options.get("dtype") == dtype
    assert cli.main(["verify", str(out), "--json"]) == 0
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
    phases: tuple[Any, ...] = ("warmup", "steady")
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
        assert cli.main(["inspect", str(bundle)]) == 2
    line = capfd.readouterr().err
    assert line.startswith("error: standard output cannot be written: No space left") and line.count("\n") == 1
    end, start = os.pipe()
    os.close(end)
    with os.fdopen(start, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["inspect", str(bundle)]) == 141
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["inspect", str(bundle)]) == 2
    assert "standard output is closed" in capfd.readouterr().err


def test_names_that_the_terminal_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        from districompile.commands.checks import Output

        with Output():
            print("\u00e9 \udcff")
    assert (tmp_path / "out").read_text() == "\\xe9 \\udcff\n"
