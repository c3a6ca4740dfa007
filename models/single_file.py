# SPDX-License-Identifier: Apache-2.0
"""Models in one file, under the names of the original code (Stable Diffusion 1, 2, XL and others).

diffusers translates the names. The sizes of the networks are not in the file: they come from a folder of configuration,
which is that of any pipeline of the same kind, without weights. Without one, diffusers knows the kind by the file's
names and has its configuration on the model hub.
"""

from __future__ import annotations

import hashlib
import importlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from districompile.models.files import check_safetensors, first_line, one_reason
from districompile.models.inputs import ModelError
from districompile.models.origin import Origin

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
_PREFIXES = {"UNet2DConditionModel": "model.diffusion_model.", "AutoencoderKL": "first_stage_model."}
_CONFIGURATION = ["*.json", "*.txt", "*.model", "**/*.json", "**/*.txt", "**/*.model"]
_SOUGHT = 10.0  # seconds until the model hub counts as out of reach


def check_file(file: Path, accepted: str) -> None:
    """Check that ``file`` can be a model. Raises :class:`ModelError` with the way out."""
    if file.suffix in PICKLES:
        raise ModelError(pickle_refusal(file))
    if file.suffix != ".safetensors":
        raise ModelError(f"{file} is a file; a model is {accepted}")
    check_safetensors(file)


def pickle_refusal(file: Path) -> str:
    """Return why a pickle is refused, with the line that converts it."""
    new = file.with_suffix(".safetensors")
    code = (
        "import sys, torch; from safetensors.torch import save_file; "
        "d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
        "save_file({k: v.clone().contiguous() for k, v in d.items() if hasattr(v, 'dtype')}, sys.argv[2])"
    )
    return (
        f"{file} is a pickle, which can run code when it is read: convert it once, and give the result: "
        f"python -c {shlex.quote(code)} {shlex.quote(str(file))} {shlex.quote(str(new))}"
    )


def refuse_pickles(folder: Path) -> None:
    """Raise :class:`ModelError` for the folder of a component whose weights are pickles alone."""
    pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles and not any(folder.glob("*.safetensors*")):
        raise ModelError(pickle_refusal(pickles[0]))


def config_folder(given: Origin, file: Path) -> Path:
    """Return the folder with the configuration of a single file. Raises :class:`ModelError` if there is none."""
    if given.config is not None:
        folder = Path(given.config).expanduser()
        if not any((folder / name).is_file() for name in ("model_index.json", "config.json")):
            raise ModelError(
                f"--config {given.config} is no diffusers folder: it has no model_index.json or config.json"
            )
        return folder.resolve()
    advice = (
        "give --config FOLDER, a diffusers folder of the same kind of model (model_index.json and the config.json of "
        "its parts; weights are not needed)"
    )
    try:
        utils = importlib.import_module("diffusers.loaders.single_file_utils")
        with safe_open(str(file), framework="pt") as opened:
            shapes = {n: opened.get_slice(n).get_shape() for n in opened.keys()}  # noqa: SIM118  (it is no mapping)
        empty = {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
        kind = str(utils.fetch_diffusers_config(empty)["pretrained_model_name_or_path"])
    except (ImportError, AttributeError, KeyError, TypeError) as e:
        raise ModelError(f"{file}: its configuration is not known ({one_reason(e)}): {advice}") from e
    return _from_hub(kind, f"{file} looks like {kind}, whose configuration is on the model hub", advice)


def _from_hub(name: str, what: str, advice: str) -> Path:
    """Return the folder with the configuration files of a model on the hub, without its weights."""
    hub = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=_CONFIGURATION, local_files_only=True))
    except Exception:  # not in the cache, in any of the client's ways to say so
        pass
    try:
        hub.HfApi().model_info(name, timeout=_SOUGHT)
        return Path(hub.snapshot_download(name, allow_patterns=_CONFIGURATION))
    except Exception as e:  # the client's network errors are of whichever HTTP library it uses
        raise ModelError(f"{what}, which cannot be reached ({first_line(e)}): {advice}") from e


def read_module(cls: Any, file: Path, folder: Path, dtype: torch.dtype, source: str) -> tuple[nn.Module, list[str]]:
    """Return the module of class ``cls`` in ``file``, and the names in the file that it does not use.

    ``folder`` has its config.json. Raises :class:`ModelError` for a weight that is missing or of another shape.
    """
    if not hasattr(cls, "from_single_file"):
        raise ModelError(f"{source}: diffusers reads no {cls.__name__} from a single file: give a folder")
    try:
        module: nn.Module = cls.from_single_file(str(file), config=str(folder), dtype=dtype)
    except Exception as e:  # its converters index and split any names and shapes
        _refuse_missing(_missing(cls, file, folder), source, folder)
        raise ModelError(
            f"{source}: its {cls.__name__} cannot be loaded: {one_reason(e)}; the file and {folder / 'config.json'} "
            "may be of different kinds of model"
        ) from e
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    _refuse_missing(sorted(n for n, t in state.items() if t.is_meta), source, folder)
    return module, _unread(cls.__name__, file, state, dtype)


def _refuse_missing(missing: list[str], source: str, folder: Path) -> None:
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"{source}: the file lacks {', '.join(missing[:3])}{more}: it and {folder / 'config.json'} are of "
            "different kinds of model, or the download is incomplete"
        )


def _missing(cls: Any, file: Path, folder: Path) -> list[str]:
    """Return the weights that a file lacks, as far as diffusers' translation of names shows it.

    diffusers itself names none of them. Raises :class:`ModelError` for a file with no weights of the class.
    """
    try:
        known = importlib.import_module("diffusers.loaders.single_file_model").SINGLE_FILE_LOADABLE_CLASSES
        config = cls.load_config(str(folder))
        found = known[cls.__name__]["checkpoint_mapping_fn"](checkpoint=load_file(file), config=config)
        with torch.device("meta"):
            wanted = cls.from_config(config).state_dict()
    except Exception:  # its private functions may change, and fail in any way for a file of another kind
        return []
    if not found.keys() & wanted.keys():
        raise ModelError(f"{file}: the file has no weights of a {cls.__name__}: it is of another kind of model")
    return sorted(wanted.keys() - {name for name, tensor in found.items() if tensor is not None})


def _unread(kind: str, file: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Return the tensors of a file that belong to the module and are not in its ``state``."""
    prefix = _PREFIXES.get(kind)
    with safe_open(str(file), framework="pt") as opened:
        names = [n for n in opened.keys() if prefix is not None and n.startswith(prefix)]  # noqa: SIM118
        if len(names) <= len(state):
            return []
        used = {_digest(t, dtype) for t in state.values()}
        return sorted(n for n in names if _digest(opened.get_tensor(n), dtype) not in used)


def _digest(tensor: Tensor, dtype: torch.dtype) -> bytes:
    """Return a hash of the values alone: the translation of names may drop dims of 1."""
    flat = tensor.detach().to(dtype).contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).digest()


def read_pipeline(cls: Any, file: Path, folder: Path, dtype: torch.dtype, unet: Any) -> Any:
    """Return the pipeline of class ``cls`` in ``file`` with another ``unet``. ``folder`` has its configuration."""
    return cls.from_single_file(str(file), config=str(folder), unet=unet, dtype=dtype)
