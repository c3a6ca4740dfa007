"""Folders and LoRAs that cannot be loaded: one line that names the file, the key or weight, and the reason."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from districompile.bundle.refit import RefitError, read_lora
from districompile.cli import main
from tests.helpers_errors import bundle_of_nets, failing, nets_folder  # noqa: F401  (fixtures)

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8,), "layers_per_block": 1,
    "norm_num_groups": 4, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}  # fmt: skip


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
        (lambda s: s.update({"conv_in.weight": torch.zeros(2, 3)}), "conv_in.weight expected shape"),
        (lambda s: s.update({"conv_in.weight": torch.tensor(1.0)}), "conv_in.weight expected shape"),
        (lambda s: s.update({"conv_in.weight": s["conv_in.weight"].int()}), "conv_in.weight is of type I32"),
    ],
    ids=["missing", "shape", "scalar", "integers"],
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


def test_a_stray_weight_is_a_warning(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(model / WEIGHTS)
    save_file({**state, "foreign": torch.zeros(2)}, model / WEIGHTS)
    assert main.main(convert(model)) == 0
    assert "warning: " in (err := capsys.readouterr().err) and "has foreign besides" in err


def test_a_pipelines_file_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries drop the name of the file, or the reason."""
    from districompile.models.sources import ModelError, load_pipeline

    model.rename(model.with_name("unet"))
    (model.parent / "model_index.json").write_text(
        json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]})
    )
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
    assert main.main([*convert(model), "--stop-after", "propagate-shardings"]) == 0
    (model.parent / "blob").rename(model.parent / "moved")
    assert "broken link" in failing(capsys, *convert(model))
    (model / WEIGHTS).unlink()
    shutil.copy(model.parent / "moved", model / WEIGHTS)
    sharded(model)
    assert main.main([*convert(model), "--stop-after", "propagate-shardings"]) == 0


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
