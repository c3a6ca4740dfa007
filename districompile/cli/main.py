# SPDX-License-Identifier: Apache-2.0
"""The command line: its commands, its errors and its exit codes.

A file of :mod:`districompile.cli` declares the options of one command; :mod:`districompile.cli.commands` implements
it and is imported when the command runs. So ``--help``, ``--version`` and a wrong option do not import PyTorch.

Exit codes: 0 success; 1 ``verify`` found a difference; 2 an error of the user, printed as one line on standard error;
130 interrupted; 141 the reader of standard output closed it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from districompile.cli import bench, checks, convert, doctor, inspect, plan, refit, run, serve, verify
from districompile.cli.options import command_of
from districompile.common.interrupts import INTERRUPTED, end_undisturbed
from districompile.errors import EngineWarning, Error, ValueWarning
from districompile.version import __version__

app = typer.Typer(
    name="districompile",
    help="Compile a diffusion model into programs for N GPUs (or CPU processes) that draw one image together.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _convert(settings: convert.Settings) -> int:
    """Compile MODEL for N processes into a bundle on disk."""
    from districompile.cli.commands import convert as command

    return command.main(settings)


def _plan(settings: plan.Settings) -> int:
    """Predict seconds, memory and bytes of an image for several numbers of GPUs, before anything is compiled."""
    from districompile.cli.commands import plan as command

    return command.main(settings)


def _inspect(settings: inspect.Settings) -> int:
    """Show what a bundle does: its model, partition, transfers, engines, memory, passes and quality."""
    from districompile.cli.commands import inspect as command

    return command.main(settings)


def _verify(settings: verify.Settings) -> int:
    """Compare a bundle with its original model: the error of the exact phase and the drift of the displaced phase.
    With --quality, compare images of many prompts and seeds. Exit code 1: the exact phase differs."""
    if settings.quality:
        from districompile.cli import quality

        return quality.main(settings)
    from districompile.cli.commands import verify as command

    return command.main(settings)


def _run(settings: run.Settings) -> int:
    """Draw images on all processes of a bundle, each on all of them. A MODEL is converted first; its bundle is kept in
    a cache. The options of the model, the partition, the quality and the backend apply to a MODEL only. Files hold how
    they were drawn: prompt, seed, options and the bundle's hash."""
    from districompile.cli.commands import run as command

    return command.main(settings)


def _serve(settings: serve.Settings) -> int:
    """Keep the processes of a bundle loaded, and draw what clients ask for over HTTP, by OpenAI's images API."""
    from districompile.cli.commands import serve as command

    return command.main(settings)


def _refit(settings: refit.Settings) -> int:
    """Replace the weights of a bundle, by a fine-tune or a LoRA, without building its engines again."""
    from districompile.cli.commands import refit as command

    return command.main(settings)


def _bench(settings: bench.Settings) -> int:
    """Time the exact and the displaced step of a bundle on this machine, with random inputs."""
    from districompile.cli.commands import bench as command

    return command.main(settings)


def _doctor(settings: doctor.Settings) -> int:
    """Show versions, devices, and which backends are usable here, with the reason where one is not."""
    from districompile.cli.commands import doctor as command

    return command.main(settings.as_json, settings.trying)


app.command("convert")(command_of(convert.Settings, _convert))
app.command("plan")(command_of(plan.Settings, _plan))
app.command("inspect")(command_of(inspect.Settings, _inspect))
app.command("verify")(command_of(verify.Settings, _verify))
app.command("run")(command_of(run.Settings, _run))
app.command("serve")(command_of(serve.Settings, _serve))
app.command("refit")(command_of(refit.Settings, _refit))
app.command("bench")(command_of(bench.Settings, _bench))
app.command("doctor")(command_of(doctor.Settings, _doctor))


def _version(value: bool) -> None:
    if value:
        print(f"districompile {__version__}")
        raise typer.Exit(0)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors that a user can cause are one line, everything else is a defect
    and keeps its traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        with checks.Output(), warnings.catch_warnings():
            warnings.showwarning = _warn
            # Typer's group turns Ctrl-C into the result 130.
            result: Any = typer.main.get_command(app).main(
                args=args or ["--help"], prog_name="districompile", standalone_mode=False
            )
            end_undisturbed()
    except checks.ReaderLeft:
        return 141  # as a shell says it of a process that SIGPIPE ended
    except Error as e:
        return _fail(str(e))
    except OSError as e:
        if e.filename is None:
            raise
        name = str(e.filename)
        return _fail(f"{name if len(name) <= 100 else name[:97] + '...'}: {e.strerror}")
    except (KeyboardInterrupt, typer.Abort):
        end_undisturbed()
        result = INTERRUPTED
    except Exception as e:
        # Usage errors; their class lives in click or inside typer, depending on typer's version.
        if hasattr(e, "format_message") and hasattr(e, "exit_code"):
            return _fail(str(e.format_message()))
        raise
    if result == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return result if isinstance(result, int) else 0


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Our own in one line, as errors are."""
    own = issubclass(category, (ValueWarning, EngineWarning))
    print(f"{'warning' if own else category.__name__}: {message}", file=sys.stderr)


def _fail(message: str) -> int:
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    print(f"error: {line}", file=sys.stderr)
    return 2
