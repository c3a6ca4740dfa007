"""What a conversion chooses without flags, for machines that are described, not there."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from districompile.cli import defaults, main
from districompile.cli.convert import Settings
from districompile.cli.defaults import Choice, Machine, resolve
from districompile.cli.divisions import Divisions, choose_guidance
from districompile.cli.shapes import Shape
from districompile.cost.gpus import find_gpu
from districompile.cost.planner import Division
from districompile.cost.predict import StepEstimate
from districompile.errors import BackendError, ConvertError
from districompile.models.shipped import Shipped, shipped
from districompile.models.sources import load_source
from districompile.plan.defaults import BACKENDS, OPTIMISE, SEGMENTS
from districompile.progress import Silent
from tests import helpers_tensorrt as fakes

THIS_MACHINE = defaults.this_machine  # before the fixture of this folder
NO_FLAGS = Settings(model="demo", gpus=8)


@dataclasses.dataclass(frozen=True)
class Described(Machine):
    """A machine on which the backends of ``reasons`` cannot be used."""

    reasons: tuple[tuple[str, str], ...] = ()

    def unusable(self, backend: str) -> str | None:
        return dict(self.reasons).get(backend)


def component(folder: Path, config: dict[str, Any], **files: torch.dtype) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, dtype in files.items():
        tensors = {"weight": torch.zeros(4, 4, dtype=dtype), "scale": torch.zeros(1)}
        save_file(tensors, folder / f"diffusion_pytorch_model{name.replace('_', '.')}.safetensors")
    return folder


def pipeline(folder: Path, config: dict[str, Any], name: str = "StableDiffusionPipeline", **files: torch.dtype) -> str:
    component(folder / "unet", {"_class_name": "UNet2DConditionModel", **config}, **files)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name, "unet": ["diffusers", "X"]}))
    return str(folder)


def test_a_library_that_is_slow_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"tensorrt": fakes.library_of(fakes.V8()), "tensorrt_rtx": "not installed"}
    monkeypatch.setattr("districompile.backends.tensorrt.library._load", found.__getitem__)
    monkeypatch.setattr("districompile.backends.tensorrt.backend.present_gpu", lambda device=None: "sm90")
    reason = Machine(("sm90",)).unusable("tensorrt")
    assert reason == "tensorrt 8.6.0 takes long to build, and computes float16 in float32"


def test_without_gpus_nothing_is_chosen() -> None:
    assert resolve(NO_FLAGS, Machine()) == (NO_FLAGS, Choice())
    assert THIS_MACHINE().gpus == () or torch.cuda.is_available()


def test_the_best_that_runs_on_the_gpus() -> None:
    found, choice = resolve(NO_FLAGS, Described(("sm89",) * 8))
    assert (found.backend, found.dtype, found.optimise, found.segments, found.cfg) == (
        "tensorrt", "float16", OPTIMISE, SEGMENTS, "split",
    )  # fmt: skip
    assert choice.others == ("inductor",) and choice.line is not None and "\n" not in choice.line
    assert choice.line == (
        "chosen for the GPUs here (sm89), each option overrides it: --backend tensorrt, --dtype float16 (as the "
        f"weights are shipped), --optimise {OPTIMISE}, --segments {SEGMENTS}, --cfg split (the same work a GPU, and "
        "fewer rows to exchange)"
    )
    hopper = Described(("sm90",) * 8, (("tensorrt", "it does not run on sm90"),))
    found, choice = resolve(NO_FLAGS, hopper)
    assert found.backend == "inductor" and choice.others == ()
    assert "--backend inductor (tensorrt: it does not run on sm90)" in (choice.line or "")


def test_where_no_backend_of_gpus_works() -> None:
    neither = Described(("sm90",), tuple((name, f"no {name}") for name in BACKENDS))
    found, choice = resolve(NO_FLAGS, neither)
    assert (found.backend, found.dtype, found.optimise, found.cfg) == ("onnxruntime", "float32", None, None)
    assert "no tensorrt" in (choice.line or "") and "no inductor" in (choice.line or "")


def test_options_override() -> None:
    given = Settings(
        model="demo", gpus=8, backend="inductor", dtype="bfloat16", optimise="cse", segments=3, cfg="batch"
    )
    assert resolve(given, Described(("sm90",))) == (given, Choice())
    found, choice = resolve(dataclasses.replace(given, dtype=None), Described(("sm90",)))
    assert found == dataclasses.replace(given, dtype="float16") and "--backend" not in (choice.line or "")
    on_cpu = Settings(model="demo", backend="eager")
    assert resolve(on_cpu, Described(("sm90",), (("eager", "it runs on the CPU"),))) == (on_cpu, Choice())


@pytest.mark.parametrize(("gpus", "cfg"), [(2, "split"), (3, "batch"), (8, "split")])
def test_guidance_is_split_over_an_even_number(gpus: int, cfg: str) -> None:
    assert resolve(Settings(model="demo", gpus=gpus), Described(("sm90",)))[0].cfg == cfg


@pytest.mark.parametrize(
    ("files", "kinds", "dtype"),
    [
        ({"": torch.float32}, "sm90", "float32"),
        ({"": torch.float16}, "sm90", "float16"),
        ({"": torch.float32, "_fp16": torch.float16}, "sm90", "float16"),
        ({"": torch.bfloat16}, "sm90", "bfloat16"),
        ({"": torch.bfloat16}, "sm75", "float32"),
    ],
)
def test_the_type_that_weights_are_shipped_in(
    files: dict[str, torch.dtype], kinds: str, dtype: str, tmp_path: Path
) -> None:
    model = pipeline(tmp_path / "pipe", {}, **files)
    assert resolve(Settings(model=model), Described((kinds,)))[0].dtype == dtype


def test_what_the_files_say(tmp_path: Path) -> None:
    assert shipped("demo") == Shipped("float16", False, True)
    half = {"": torch.float16}
    vae = component(tmp_path / "vae", {"_class_name": "AutoencoderKL", "force_upcast": True}, **half)
    assert shipped(str(vae)) == Shipped("float16", True, False)
    assert resolve(Settings(model=str(vae)), Described(("sm90",)))[0].dtype == "float32"
    calm = component(tmp_path / "calm", {"_class_name": "AutoencoderKL", "force_upcast": False}, **half)
    assert resolve(Settings(model=str(calm)), Described(("sm90",)))[0].dtype == "float16"
    distilled = pipeline(tmp_path / "lcm", {"time_cond_proj_dim": 256}, **half)
    three = pipeline(tmp_path / "pix", {}, "StableDiffusionInstructPix2PixPipeline", **half)
    for model in (distilled, three):
        found = shipped(model)
        assert found is not None and not found.guided
        assert resolve(Settings(model=model, gpus=2), Described(("sm90",)))[0].cfg is None
    for model in ("package:factory", str(tmp_path)):
        assert shipped(model) is None
        found_settings = resolve(Settings(model=model), Described(("sm90",)))[0]
        assert found_settings.dtype is None and found_settings.backend == "tensorrt"


class Hub:
    """A model hub with the files of a folder, none of which is in the local cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def HfApi(self) -> Hub:
        return self

    def try_to_load_from_cache(self, model: str, name: str) -> None:
        return None

    def hf_hub_download(self, model: str, name: str) -> str:
        return str(self.folder / name)

    def model_info(self, model: str, timeout: float) -> Any:
        files = [p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file()]
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in files])

    def parse_safetensors_file_metadata(self, model: str, name: str) -> Any:
        assert name == "unet/diffusion_pytorch_model.safetensors"
        return types.SimpleNamespace(parameter_count={"F32": 5, "BF16": 900})


def test_a_model_of_the_hub(tmp_path: Path) -> None:
    plain, both = tmp_path / "plain", tmp_path / "both"
    pipeline(plain, {}, **{"": torch.bfloat16})
    pipeline(both, {}, **{"": torch.float32, "_fp16": torch.float16})
    assert shipped("some/model", Hub(plain)) == Shipped("bfloat16", False, True)
    assert shipped("some/model", Hub(both)) == Shipped("float16", False, True)
    assert shipped("some/model", object()) is None  # whatever goes wrong there
    assert shipped("some/model:factory", Hub(both)) is None


def test_files_that_are_damaged_choose_nothing(tmp_path: Path) -> None:
    folder = Path(pipeline(tmp_path / "pipe", {}, **{"": torch.float16}))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    for data in (b"", b"\xff" * 64, (9).to_bytes(8, "little") + b"[1, 2, 3]"):
        weights.write_bytes(data)
        assert shipped(str(folder)) is None
    (folder / "model_index.json").write_text("[")
    assert shipped(str(folder)) is None


def test_convert_says_what_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A backend that fails to build is replaced by the next one, which says so."""
    from districompile.cli.commands import convert

    (tmp_path / "gpu_nets.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Conv2d(4, 4, 3, padding=1), (torch.randn(1, 4, 16, 8),), {}\n"
    )
    monkeypatch.chdir(tmp_path)
    tried = []

    def backend(name: str, **options: object) -> Any:
        from districompile.backends.registry import get_backend

        tried.append(name)
        made: Any = get_backend("eager")
        if name == "tensorrt":
            monkeypatch.setattr(type(made), "build", fail, raising=True)
        else:
            monkeypatch.undo()
        return made

    def fail(*_: object) -> None:
        raise BackendError("aten.odd has no translation")

    monkeypatch.setattr(defaults, "this_machine", lambda: Described(("sm89", "sm89")))
    monkeypatch.setattr(convert, "get_backend", backend)
    assert main.main(["convert", "gpu_nets:make", "--gpus", "2", "--out", str(tmp_path / "b"), "--json"]) == 0
    err = capsys.readouterr().err.splitlines()
    assert tried == ["tensorrt", "inductor"]
    assert err[0].startswith("chosen for the GPUs here (sm89), each option overrides it: --backend tensorrt, ")
    assert err[1].startswith("note: --backend inductor instead of eager, which cannot build this: ")
    made_with = json.loads((tmp_path / "b" / "manifest.json").read_text())["made_with"]
    assert (made_with["backend"], made_with["optimise"], made_with["segments"]) == ("inductor", OPTIMISE, SEGMENTS)


H100 = find_gpu("h100")
KNOWN = Described(("sm90",) * 4, gpu=H100)


def test_guidance_waits_for_a_prediction_where_gpus_are_known() -> None:
    found, choice = resolve(Settings(model="demo", gpus=4), KNOWN)
    assert found.cfg is None and choice.gpu is H100 and "--cfg" not in (choice.line or "")
    for given in (Settings(model="demo", gpus=4, cfg="batch"), Settings(model="demo", gpus=3)):
        assert resolve(given, KNOWN)[1].gpu is None
    assert resolve(Settings(model="demo", gpus=3), KNOWN)[0].cfg == "batch"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small guided model."""
    pytest.importorskip("diffusers")
    from helpers_pipelines import write_pipeline

    return load_source(str(write_pipeline(tmp_path_factory.mktemp("small") / "pipe")))


def test_guidance_is_what_the_plan_predicts(small: Any) -> None:
    settings = Settings(model="any", gpus=2, segments=2)
    found, line = defaults.with_guidance(settings, small, H100, Silent())
    assert line is not None and line.startswith(f"chosen by the plan: --cfg {found.cfg} (predicted ")
    seconds = [float(text) for text in re.findall(r"\d+\.\d\d", line)]
    assert len(seconds) == 2 and seconds[0] <= seconds[1] and "for 50 steps on 2 h100" in line
    divisions = Divisions(small, functools.partial(Shape().example, small), H100, 50, Silent(), {"segments": 2})
    chosen = divisions.of(2, str(found.cfg))
    assert f"{chosen.seconds:.2f}" == f"{seconds[0]:.2f}" and dataclasses.replace(found, cfg=None) == settings


@pytest.mark.parametrize(
    ("batch", "split", "cfg", "why"),
    [
        ((1.0, True), (0.8, True), "split", "predicted 0.80 s for 50 steps on 4 h100, batch 1.00"),
        ((0.7, True), (0.8, True), "batch", "predicted 0.70 s for 50 steps on 4 h100, split 0.80"),
        ((1.0, True), (0.8, False), "batch", "split needs 2.0 GiB of a GPU's memory on 4 h100"),
        ((0.7, False), (0.8, False), "batch", "predicted 0.70 s"),
    ],
)
def test_the_faster_guidance_that_fits(
    batch: tuple[float, bool], split: tuple[float, bool], cfg: str, why: str
) -> None:
    @dataclasses.dataclass
    class Known(Divisions):
        def of(self, gpus: int, guidance: str, measure: Any = None) -> Division:
            seconds, fits = {"batch": batch, "split": split}[guidance]
            step = StepEstimate(seconds)
            return Division(gpus, guidance, (8, 8), step, step, 1.0 + (not fits), fits, 1.0, seconds, seconds)

    none: Any = None
    found = choose_guidance(Known(none, none, H100, 50, Silent(), {}), 4)
    assert found is not None and found[0] == cfg and found[1].startswith(why)


def test_the_rule_holds_where_nothing_can_be_predicted(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConvertError("no")

    settings = Settings(model="any", gpus=2)
    monkeypatch.setattr("districompile.api.convert", fail)
    found, line = defaults.with_guidance(settings, small, H100, Silent())
    assert found.cfg == "split" and "the same work a GPU, and fewer rows to exchange" in (line or "")
    alone = dataclasses.replace(small, cfg="none")
    assert defaults.with_guidance(settings, alone, H100, Silent()) == (settings, None)


@pytest.mark.slow
def test_convert_chooses_guidance_by_the_plan(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The chosen guidance is in the bundle, and the same conversion again replaces it without --force."""
    monkeypatch.setattr(defaults, "this_machine", lambda: Described(("sm90",) * 2, gpu=H100))
    words = ["convert", small.source, "--gpus", "2", "--backend", "eager", "--segments", "1", "--dtype", "float32"]
    for _ in range(2):
        assert main.main([*words, "--out", str(tmp_path / "b"), "--json"]) == 0
        assert "chosen by the plan: --cfg " in capsys.readouterr().err
    plan = json.loads((tmp_path / "b" / "plan.json").read_text())
    assert plan["options"]["guidance"] in ("batch", "split")


def test_a_variant_is_what_counts(tmp_path: Path) -> None:
    model = pipeline(tmp_path / "pipe", {}, **{"": torch.float32, "_fp16": torch.float16, "_bf16": torch.bfloat16})
    for variant, dtype in (("fp16", "float16"), ("bf16", "bfloat16"), ("none", "float16")):
        assert shipped(f"{model}#variant={variant}") == Shipped(dtype, False, True)  # type: ignore[arg-type]
