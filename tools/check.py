# SPDX-License-Identifier: Apache-2.0
"""Run the project's checks: lint, types, docs and tests. People and CI use this one entry.

    python tools/check.py            every check; a third of the slow tests, by the date
    python tools/check.py lint       formatting and lint
    python tools/check.py types      mypy --strict; the first time, TensorRT's type stubs are put into build/typings
    python tools/check.py docs       mkdocs build --strict, into build/site; left out where mkdocs is not installed
    python tools/check.py test       pytest; further arguments go to it: tools/check.py test -k cli
    python tools/check.py --all      every check and every test
    python tools/check.py --fast     every check and no slow test
    python tools/check.py --nightly  rule properties and random networks, from a fresh seed, which is printed
    python tools/check.py --fix      reformat and repair what ruff can repair, then check

Every check runs even if one fails. The exit code is 1 if one failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ("lint", "types", "docs", "test")
PROPERTIES = ("tests/passes", "tests/test_fuzz.py")  # tests that take --fresh-seed
# Installed without dependencies: only the stubs and bindings are read, TensorRT's libraries are not needed.
REFERENCES = {
    "build/typings": "tensorrt-stubs==10.13.0.35.1",
    "build/bindings-8": "tensorrt-bindings==8.6.1",  # the last for Python 3.10
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
    """Return the command lines of a check. ``slow`` selects tests: "all", "some", "none", or "nightly"."""
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
    if check == "docs":
        if importlib.util.find_spec("mkdocs") is None:
            print('docs: left out, as mkdocs is not installed: pip install -e ".[docs]"', flush=True)
            return []
        return [[python, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", "build/site"]]
    chosen = {
        "all": ["--all"],
        "some": [],
        "none": ["-m", "not slow"],
        "nightly": ["--fresh-seed", "random", "--networks", "1200", *PROPERTIES],
    }[slow]
    return [[python, "-m", "pytest", "-q", *chosen, *extra]]


def fetch() -> None:
    """Install TensorRT's stubs and bindings into build/ if they are missing. Without a network, go on without them."""
    for folder, package in REFERENCES.items():
        if (ROOT / folder).is_dir():
            continue
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, package]
        if folder == "build/bindings-8":
            command += ["--python-version", "3.10", "--only-binary", ":all:"]
        if subprocess.run(command, cwd=ROOT).returncode:
            print(f"{package} cannot be installed into {folder}: TensorRT code is not checked against it", flush=True)
            continue
        for stub in (ROOT / folder).rglob("tensorrt.pyi"):
            text = stub.read_text()
            for wrong, right in STUB_ERRORS.items():
                text = text.replace(wrong, right)
            stub.write_text(text)


def main() -> int:
    """Run the selected checks in order; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="|".join(CHECKS), help="which checks [default: all]")
    slow = parser.add_mutually_exclusive_group()
    slow.add_argument("--all", dest="slow", action="store_const", const="all", help="run every slow test")
    slow.add_argument("--fast", dest="slow", action="store_const", const="none", help="run no slow test")
    slow.add_argument(
        "--nightly", dest="slow", action="store_const", const="nightly", help="run property tests alone, with new seeds"
    )
    parser.add_argument("--fix", action="store_true", help="let ruff change files")
    parser.set_defaults(slow="some")
    options, extra = parser.parse_known_args()
    unknown = [c for c in options.checks if c not in CHECKS]
    if unknown and options.checks[0] != "test":
        parser.error(f"no check named {unknown[0]!r}; there are: {', '.join(CHECKS)}")
    chosen = [c for c in CHECKS if c in options.checks] or list(CHECKS)
    if options.slow == "nightly" and not options.checks:
        chosen = ["test"]
    failed = [check for check in chosen if not run(check, commands(check, options.slow, options.fix, unknown + extra))]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def run(check: str, lines: list[list[str]]) -> bool:
    """Run the command lines of a check and print how long each took. Return whether all succeeded."""
    succeeded = True
    for command in lines:
        print(f"$ {' '.join(command[1:])}", flush=True)
        started = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT).returncode
        print(f"{check}: {'ok' if code == 0 else 'FAILED'} in {time.perf_counter() - started:.0f} s", flush=True)
        succeeded &= code == 0
    return succeeded


if __name__ == "__main__":
    sys.exit(main())
