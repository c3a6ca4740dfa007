"""The import contract: what each part of the package may know about. Checked on the source, so that no import runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "districompile"

# part -> what it must not import. The runtime executes plans and knows neither graphs nor rules; a pass says what is
# computed, never with what; a backend sees one plain graph.
FORBIDDEN = {
    "runtime": (
        "passes",
        "models",
        "registry",
        "propagate",
        "cutter",
        "capture",
        "passmanager",
        "quality",
        "commands",
        "cli",
        "api",
    ),
    "backends": ("passes", "models", "registry", "propagate", "cutter", "runtime", "commands", "cli", "api"),
    "passes": ("backends", "runtime", "models", "bundle", "commands", "cli", "api"),
    "models": ("passes", "backends", "runtime", "bundle", "commands", "cli", "api"),
    "ir": ("passes", "runtime", "models", "bundle", "commands", "cli", "api"),
    "quality": ("passes", "commands", "cli"),
    "report.py": ("passes", "backends", "runtime", "models", "commands", "cli", "api"),
    "progress.py": ("passes", "backends", "runtime", "models", "commands", "cli", "api", "ir"),
}


def sources(part: str) -> list[Path]:
    path = PACKAGE / part
    return [path] if path.suffix == ".py" else sorted(p for p in path.resolve().rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, at any depth, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            yield str(node.module)
            # `from districompile import passes` names a part too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", sorted(FORBIDDEN))
def test_parts_keep_their_distance(part: str) -> None:
    found = sources(part)
    assert found, f"nothing to check in {part}"
    for path in found:
        for name in imported(path):
            for other in FORBIDDEN[part]:
                full = f"districompile.{other}"
                assert name != full and not name.startswith(full + "."), f"{path.relative_to(ROOT)} imports {name}"


def test_no_top_level_passes_or_models_import() -> None:
    """``passes`` and ``models`` have one name each; under a second name, rules would be registered twice."""
    for path in [*PACKAGE.rglob("*.py"), *sources("passes"), *sources("models")]:
        for name in imported(path):
            assert name.split(".")[0] not in ("passes", "models"), f"{path} imports {name}"


def test_links_are_in_place() -> None:
    for name in ("passes", "models"):
        assert (PACKAGE / name).resolve() == ROOT / name


def test_every_file_is_typed() -> None:
    """All modules postpone annotations, so that the oldest supported Python reads them."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if "# No annotations from __future__" in text:  # what is read when it runs is no annotation alone
            continue
        assert not text.strip() or "from __future__ import annotations" in text, path
