# SPDX-License-Identifier: Apache-2.0
"""Write docs/cli.md from the command line itself: ``python tools/cli_page.py``. A test compares the two."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path

from typer.models import ArgumentInfo, OptionInfo

from districompile.cli.main import app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

HEAD = """# Command line

This page is made from the command line itself by `tools/cli_page.py`; do not edit it.

Every command prints text for people, or with `--json` one JSON object on standard output. Progress, notes and warnings
go to standard error. Output that is not for a terminal has no colours, and no lines are folded.

| exit code | meaning |
| --- | --- |
| 0 | success |
| 1 | `verify`: the exact phase differs from the original by more than the tolerance |
| 2 | an error of the user, printed as one line on standard error |
| 130 | interrupted |
| 141 | the reader of standard output closed it |

Options of a backend are given as `-o key=value`. `districompile convert --backend NAME --help-backend` lists them.
"""

REPORT = {
    "report.ranks": "number of ranks of one guidance half",
    "report.options": "options of the conversion",
    "report.inputs": "by input: `shape`, and the dim of the rows (`rows`), or null",
    "report.rows": "by height of a sharded map: rows of each rank",
    "report.bounds": "by height of a sharded map: the cut points",
    "report.sites": "transfers by purpose: `count`, `displaced` (how many), `bytes` (sent by each rank), `patterns`",
    "report.bytes_per_step": "by phase: bytes that each rank sends",
    "report.segments": "by phase: number of segments",
    "report.waits": "by phase: how many times a rank waits for others",
    "report.engines": "number of distinct engines",
    "report.weights": "`count` and `bytes`",
    "report.memory": "bytes of each rank: `weights`, `received` (buffers of transfers), `saved` (for the next step)",
    "report.fallbacks": "operators without a rule: `node`, `op`, `bytes`, `reason`, `source`",
    "report.few_rows": "a warning where ranks have few rows, or null",
    "report.no_timestep": "a warning where all calls are exact, as no input is known as the time of a step, or null",
    "report.quantised": "layers that have a form in 8 bits: weight, module, why not (null: in 8 bits), signal to noise",
    "report.tokens": "tokens beside the image's: `divided` or not, `sequences`, and what a rank saves (`flops`) and "
    "receives more (`bytes`, `transfers`), or null",
    "report.quality": "trials of `--quality-floor`, or null",
    "report.flops": "FLOPs that are divided (`cut`) and replicated (`whole`), and the divided share (`cut_share`)",
    "report.passes": "passes in order: `name`, `phase`, `exact`, `seconds`, nodes `before` and `after`, `changed`",
}
JSON_KEYS: dict[str, dict[str, str]] = {
    "convert": {
        "bundle": "folder of the bundle",
        "seconds": "`convert` and `save`",
        "shapes": "names of the bundle's shapes",
        "vae": "folder of the VAE's bundle, or null; with `--add`: the new shapes of its parts, by folder",
        "added": "with `--add`: names of the new shapes",
        **REPORT,
    },
    "plan": {
        "model": "the model",
        "size": "`--size`, or null",
        "dtype": "type of the weights",
        "batch": "images in one call",
        "steps": "calls of an image",
        "gpu": "the figures of the GPU: TFLOP/s, GB/s, GiB",
        "gpu_chosen": "where the GPU comes from",
        "measured": "whether a rank was compiled and timed",
        "divisions": "a list of `gpus`, `guidance`, `rows`, `exact`, `displaced` (`ms`, parts), `memory_gib`, `fits`, "
        "`sent_mb`, `seconds`, `exact_seconds`",
        "best": "the division to take, or null: nothing fits",
    },
    "inspect": {
        "bundle": "folder of the bundle",
        "manifest": "the manifest without its tables of files and engines",
        "shapes": "shapes of the inputs, by the bundle's shape",
        "vae": "the bundle's VAE: `folder`, `parts`, and the `problem` because of which it is not used; or null",
        **REPORT,
        "phase": "with `--graph`: the phase",
        "steps": "with `--graph`: its steps as text",
    },
    "verify": {
        "bundle": "folder of the bundle",
        "model": "the original model",
        "exact": "`max_relative_error`, `relative_error` (2-norm), `measure` (that of the two which is compared), "
        "`tolerance`, `ok`, `calls`, `inexact_passes` (that make a difference expected)",
        "drift": "`steps`, `exact_steps`, `relative_error`, `psnr_db` (null: identical), `of`; or null: not measured",
        "nodes": "with `--nodes`: `compared`, `rules`, `worst` (`node`, `op`, `error`, `source`)",
        "steps": "with `--quality`: sampling steps",
        "results": "with `--quality`: the figures of each way of computing",
    },
    "run": {
        "images": "files that were written, without grid and preview",
        "pictures": "`file`, `prompt` and `seed` of each",
        "grid": "file of the grid, or null",
        "bundle": "folder of the bundle",
        "processes": "number of processes",
        "steps": "sampling steps of an image",
        "seed": "seed of the first image",
        "seconds": "time of all steps of all images",
        "it_per_s": "steps a second",
        "calls": "calls of the UNet by phase, of all images",
        "drift": "largest measured speed of change during displaced steps, or null",
        "transport": "transport that was used",
        "not_finite": "share of values that are NaN or infinite, by tensor",
    },
    "serve": {  # of the log
        "time": "end of the request, in UTC",
        "id": "the request's X-Request-Id",
        "client": "address of the client",
        "method": "HTTP method",
        "path": "path that was asked for",
        "status": "HTTP status; 499 for a client that left",
        "seconds": "from the request's first byte to the answer's last one",
        "n": "pictures asked for",
        "steps": "sampling steps of each",
        "seed": "seed of the first",
        "size": "width and height in pixels",
        "prompt_chars": "length of the prompt, which is not written itself",
        "lora": "name of the LoRA, or null",
        "stream": "whether the answer was a stream",
        "outcome": "`drawn`, or the code of the error",
        "waiting_s": "seconds in the queue",
        "drawing_s": "seconds of the pipeline",
        "encoding_s": "seconds of making image files",
        "overhead_s": "seconds that are neither waiting nor drawing",
    },
    "refit": {
        "bundle": "folder of the new bundle",
        "changed": "number of new weights",
        "other_networks": "tensors of the LoRA for networks that are not in the bundle",
        "seconds": "time it took",
    },
    "bench": {
        "bundle": "folder of the bundle",
        "figures": "list of the figures below, by `figure`; each has `processes` and `device`",
        "figures: exact step, displaced step": "`ms` (median, slowest rank), `min_ms`, `calls`",
        "figures: ... step, transfers": "one traced call of the rank that computes longest: `total_ms`, `sent_bytes`, "
        "and the keys below",
        "run_ms": "time of computing",
        "transfer_ms": "time of transfers, whether the rank computes meanwhile or not",
        "exposed_ms": "time that the rank spends on transfers, or waits for them, instead of computing",
        "hidden_ms": "time of transfers while the rank computes",
        "imbalance_ms": "time that the fastest rank waits for the slowest",
        "figures: ... step, transfers free": "`ms` of a step without transfers",
        "figures: original on one device": "with `--original`: `ms`, `min_ms`, `calls`, `model`",
        "figures: run": "with `--steps`: `seconds`, `steps`, `warmup_steps`",
        "figures: peak memory of a GPU": "`gib`",
        "figures: load": "`seconds`",
    },
    "doctor": {
        "python": "version",
        "system": "operating system and processor",
        "cpu_threads": "number of threads",
        "packages": "version by package, or null",
        "gpus": "the GPUs",
        "demo": "whether the demo model is installed",
        "backends": "by backend: `usable`, `reason`, `tested_on`",
        "kernels": "whether the kernels of the inductor backend are usable",
        "tensorrt": "what each TensorRT library can build",
        "tried": "with `--try`: what each backend computed, or where it stopped",
    },
}


def page() -> str:
    """Return the text of docs/cli.md."""
    return "\n".join([HEAD, *(_section(str(c.name), c.callback) for c in app.registered_commands)])


def _section(name: str, function: Callable[..., object] | None) -> str:
    parameters = [_Parameter.of(p) for p in inspect.signature(function or page).parameters.values()]
    arguments = [p for p in parameters if isinstance(p.info, ArgumentInfo)]
    usage = " ".join(["districompile", name, *(p.info.metavar or p.name.upper() for p in arguments), "[OPTIONS]"])
    lines = [f"## {name}", "", *textwrap.wrap(inspect.getdoc(function) or "", 110), "", f"    {usage}", ""]
    for p in arguments:
        lines += [f"`{p.info.metavar or p.name.upper()}`: {p.info.help}", ""]
    panels: dict[str, list[_Parameter]] = {}
    for p in parameters:
        if isinstance(p.info, OptionInfo):
            panels.setdefault(p.info.rich_help_panel or "Options", []).append(p)
    for panel, members in panels.items():
        lines += [f"| {panel} | meaning | default |", "| --- | --- | --- |"]
        lines += [f"| `{_cell(p.flags)}` | {_cell(p.info.help or '')} | {_cell(p.default_text)} |" for p in members]
        lines.append("")
    lines += ["| JSON key | meaning |", "| --- | --- |"]
    lines += [f"| `{key}` | {_cell(meaning)} |" for key, meaning in JSON_KEYS[name].items()]
    return "\n".join([*lines, ""])


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A parameter of a command: its name, its type without None, its default, and Typer's description."""

    name: str
    type: object
    default: object
    info: OptionInfo | ArgumentInfo

    @staticmethod
    def of(parameter: inspect.Parameter) -> _Parameter:
        base, info = typing.get_args(parameter.annotation)
        members = [a for a in typing.get_args(base) if a is not type(None)]
        if type(None) in typing.get_args(base):
            base = members[0]
        return _Parameter(parameter.name, base, parameter.default, info)

    @property
    def flags(self) -> str:
        """The flags with the kind of value: ``--gpus, -n INT``."""
        # Typer takes the first declared name for a default until it has read the signature
        given = [str(n) for n in (self.info.default, *(self.info.param_decls or ())) if str(n).startswith("-")]
        if self.type is bool and not given:
            flag = self.name.replace("_", "-")
            return f"--{flag}, --no-{flag}"
        given = given or [f"--{self.name.replace('_', '-')}"]
        if self.type is bool:
            return ", ".join(given).replace("/", ", ")
        if typing.get_origin(self.type) is typing.Literal:
            return f"{', '.join(given)} {'|'.join(typing.get_args(self.type))}"
        shown = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
        return f"{', '.join(given)} {self.info.metavar or shown.get(typing.cast(type, self.type), 'TEXT')}"

    @property
    def default_text(self) -> str:
        """The default as shown to users."""
        if isinstance(self.info.show_default, str):
            return self.info.show_default
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        return f"`{self.default}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Write the page."""
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
