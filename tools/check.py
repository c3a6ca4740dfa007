"""The one entry for checks, for people and for CI.

    python tools/check.py            every check; of the slow tests a third, by the date
    python tools/check.py lint       formatting and lint
    python tools/check.py types      mypy --strict; brings TensorRT's type stubs into build/typings the first time
    python tools/check.py test       pytest; further arguments go to it: tools/check.py test -k cli
    python tools/check.py --all      every check and every test
    python tools/check.py --fast     every check; none of the slow tests
    python tools/check.py --fix      reformat and repair what ruff can repair, then check

Runs every check even if one fails; the exit code is 1 if any did.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ("lint", "types", "test")
# Their packages ask for TensorRT itself, whose libraries need no place here: what is looked at are stubs and bindings.
REFERENCES = {
    "build/typings": "tensorrt-stubs==10.13.0.35.1",
    "build/bindings-10": "tensorrt_cu12_bindings==10.16.1.11",
    "build/bindings-11": "tensorrt_cu13_bindings==11.4.0.106",
}

# As published, the stubs are no valid Python in a few places, and `bool` means TensorRT's dtype of that name.
STUB_ERRORS = {
    ", in: ": ", in_: ",
    "power: Weights = None, channel_axis: int)": "power: Weights = None, *, channel_axis: int)",
    "-> bool:": "-> builtins.bool:",
    "from __future__ import annotations\n": "from __future__ import annotations\nimport builtins\n",
}


def commands(check: str, slow: str, fix: bool, extra: list[str]) -> list[list[str]]:
    """What a check runs, one command line each. ``slow``: which slow tests, "all", "some" of them, or "none"."""
    python = sys.executable
    if check == "lint":
        ruff = [python, "-m", "ruff"]
        return [
            [*ruff, "format", *([] if fix else ["--check"]), "."],
            [*ruff, "check", *(["--fix"] if fix else []), "."],
        ]
    if check == "types":
        fetch()
        return [[python, "-m", "mypy", "--strict"]]
    chosen = {"all": ["--all"], "some": [], "none": ["-m", "not slow"]}[slow]
    return [[python, "-m", "pytest", "-q", *chosen, *extra]]


def fetch() -> None:
    """Bring what TensorRT code is checked against into build/, where it is not there yet. Without a network the checks
    go on without it."""
    for folder, package in REFERENCES.items():
        if (ROOT / folder).is_dir():
            continue
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, package]
        if subprocess.run(command, cwd=ROOT).returncode:
            print(f"{package} cannot be installed into {folder}: TensorRT code is not checked against it", flush=True)
            continue
        for stub in (ROOT / folder).rglob("tensorrt.pyi"):
            text = stub.read_text()
            for wrong, right in STUB_ERRORS.items():
                text = text.replace(wrong, right)
            stub.write_text(text)


def main() -> int:
    """Run the checks asked for, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="lint|types|test", help="which checks; all without")
    slow = parser.add_mutually_exclusive_group()
    slow.add_argument("--all", dest="slow", action="store_const", const="all", help="run every test marked slow")
    slow.add_argument("--fast", dest="slow", action="store_const", const="none", help="leave out tests marked slow")
    parser.add_argument("--fix", action="store_true", help="let ruff change files")
    options, extra = parser.parse_known_args()
    unknown = [c for c in options.checks if c not in CHECKS]
    if unknown and options.checks[0] != "test":
        parser.error(f"no check named {unknown[0]!r}; there are: {', '.join(CHECKS)}")
    chosen = [c for c in CHECKS if c in options.checks] or list(CHECKS)
    failed = []
    for check in chosen:
        for command in commands(check, options.slow or "some", options.fix, unknown + extra):
            print(f"$ {' '.join(command[1:])}", flush=True)
            started = time.perf_counter()
            code = subprocess.run(command, cwd=ROOT).returncode
            print(f"{check}: {'ok' if code == 0 else 'FAILED'} in {time.perf_counter() - started:.0f} s", flush=True)
            if code:
                failed.append(check)
    if failed:
        print(f"failed: {', '.join(dict.fromkeys(failed))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
