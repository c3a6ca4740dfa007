"""Test the import contract: the layers of the package, and what each part may import.

The imports are read from the source, so that nothing is imported here. An import inside a function counts like any
other, and so does ``importlib.import_module`` with a constant name of the package.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "districompile"

# From the bottom to the top. A module may import modules of its own layer and of the layers below.
# Names are relative to the package; the longest name that fits a module decides; "" is ``districompile`` itself.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("version", "errors", "progress"),
    ("common", "cuda"),
    ("models",),  # loads networks; knows nothing of the compiler
    ("ir",),
    ("plan",),
    ("sharding.registry", "sharding.builder", "sharding.value", "sharding.parts"),  # what rules are written with
    ("passes.rules",),
    ("sharding",),  # applies the rules
    ("frontend",),  # keeps operators that have a rule
    ("passes",),
    ("bundle",),
    ("backends",),
    ("runtime",),
    ("cost",),  # predicts from graphs and plans
    ("program", "saving"),
    ("api", "shapes"),
    ("live",),  # converts the components of a pipeline as they are called
    ("quality",),
    ("extend", "testing"),
    ("",),
    ("cli", "serve", "__main__"),
)

# Parts that must not know of each other, although the layers would allow it. The runtime executes plans and knows
# neither graphs nor rules. A pass decides what is computed, never with what. A backend sees one plain graph.
FORBIDDEN = {
    "runtime": ("passes", "models", "sharding", "frontend.capture", "frontend.decompose"),
    "backends": ("passes", "models", "sharding", "frontend"),
    "passes": ("models", "frontend", "bundle"),
    "models": ("cuda",),
    "bundle": ("passes", "sharding", "frontend", "cuda"),
    "plan": ("cuda", "models"),
    "ir": ("cuda", "models"),
    "quality": ("passes", "sharding"),
    "progress": ("errors", "version"),
}

# Imports of a higher layer for type checkers alone.
TYPING_ONLY: set[tuple[str, str]] = set()


@dataclasses.dataclass(frozen=True)
class Import:
    """An import of one module of the package by another, by their absolute names."""

    importer: str
    imported: str
    line: int
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_names() -> dict[str, Path]:
    """Return the file of every module of the package, links followed, by its absolute name."""
    found = {}
    for folder in (PACKAGE, PACKAGE / "passes", PACKAGE / "models"):
        for path in sorted(folder.resolve().rglob("*.py")):
            parts = (folder.relative_to(ROOT) / path.relative_to(folder.resolve())).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = module_names()


def import_nodes(node: ast.AST, typing_only: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every import and call below ``node``, and whether it stands in an ``if TYPE_CHECKING`` block."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom | ast.Call):
            yield child, typing_only
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in child.body:
                yield from import_nodes(ast.Module([statement], []), True)
            for statement in child.orelse:
                yield from import_nodes(ast.Module([statement], []), typing_only)
        else:
            yield from import_nodes(child, typing_only)


def imported(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Yield the name of each imported module or of its attribute, the line, and whether it is for typing alone."""
    for node, typing_only in import_nodes(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno, typing_only) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((str(a.value), node.lineno, typing_only) for a in node.args[:1] if isinstance(a, ast.Constant))


def package_imports() -> list[Import]:
    """Return all imports between modules of the package."""
    found = []
    for importer, path in MODULES.items():
        for name, line, typing_only in imported(path):
            if name.split(".")[0] != "districompile":
                continue
            # The last part of `from a.b import c` is a module or an attribute of one.
            target = name if name in MODULES else name.rpartition(".")[0]
            assert target in MODULES, f"{importer}:{line} imports {name}, which is nowhere"
            found.append(Import(importer, target, line, typing_only))
    return found


IMPORTS = package_imports()


def is_part(module: str, part: str) -> bool:
    """Whether the absolute name of a module lies in a part named relative to the package."""
    full = f"districompile.{part}" if part else "districompile"
    return module == full or module.startswith(full + ".")


def layer_of(module: str) -> int:
    """Return the layer of a module. Raises :class:`AssertionError` for one that no layer names."""
    fitting = [(len(name), i) for i, names in enumerate(LAYERS) for name in names if name and is_part(module, name)]
    if module == "districompile":
        return next(i for i, names in enumerate(LAYERS) if "" in names)
    assert fitting, f"{module} is in no layer: name it in LAYERS"
    return max(fitting)[1]


def cycles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module, and modules that import themselves."""
    after: dict[str, list[str]] = {}
    for a, b in sorted(edges):
        after.setdefault(a, []).append(b)
        after.setdefault(b, [])
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:  # Tarjan's algorithm
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in after[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = []
            while not component or component[-1] != module:
                component.append(stack.pop())
            if len(component) > 1 or (module, module) in edges:
                found.append(sorted(component))

    for module in after:
        if module not in index:
            visit(module)
    return found


def test_every_module_has_a_layer() -> None:
    assert len(MODULES) > 100
    for module in MODULES:
        layer_of(module)
    optional = {"extend", "testing"}  # single modules that other packages use
    for names in LAYERS:
        for name in {*names} - optional:
            assert any(is_part(m, name) for m in MODULES), f"no module is in the layer {name!r}"


def test_no_import_goes_upwards() -> None:
    upwards = [i for i in IMPORTS if layer_of(i.importer) < layer_of(i.imported)]
    wrong = [str(i) for i in upwards if not i.typing_only]
    assert not wrong, "imports of a higher layer:\n" + "\n".join(wrong)
    assert {(i.importer, i.imported) for i in upwards if i.typing_only} == TYPING_ONLY


def test_no_import_cycles() -> None:
    found = cycles({(i.importer, i.imported) for i in IMPORTS if not i.typing_only})
    assert not found, "modules that import each other:\n" + "\n".join(", ".join(c) for c in found)


def test_cycles_are_found() -> None:
    assert cycles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "e")}) == [["a", "b", "c"]]
    assert cycles({("a", "b"), ("a", "c"), ("b", "c")}) == []
    assert cycles({("a", "a")}) == [["a"]]


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(
        "import a\n"
        "from b import c\n"
        "if TYPE_CHECKING:\n    import d\nelse:\n    import e\n"
        "def f():\n    from g import h\n    return importlib.import_module('i')\n"
    )
    assert [(name, typing) for name, _, typing in imported(tmp_path / "example.py")] == [
        ("a", False), ("b.c", False), ("d", True), ("e", False), ("g.h", False), ("i", False),
    ]  # fmt: skip


@pytest.mark.parametrize("part", sorted(FORBIDDEN))
def test_parts_keep_their_distance(part: str) -> None:
    assert any(is_part(m, part) for m in MODULES), f"nothing to check in {part}"
    for i in IMPORTS:
        if is_part(i.importer, part):
            for other in FORBIDDEN[part]:
                assert any(is_part(m, other) for m in MODULES), f"FORBIDDEN names {other}, which is nowhere"
                assert not is_part(i.imported, other), f"{i}: {part} must not know of {other}"


def test_no_top_level_passes_or_models_import() -> None:
    """``passes`` and ``models`` have one name each; under a second name, rules would be registered twice."""
    for path in MODULES.values():
        for name, line, _ in imported(path):
            assert name.split(".")[0] not in ("passes", "models"), f"{path}:{line} imports {name}"


def test_links_are_in_place() -> None:
    for name in ("passes", "models"):
        assert (PACKAGE / name).resolve() == ROOT / name


def test_annotations_are_postponed() -> None:
    """A module with annotations postpones them, so that the oldest supported Python can import it."""
    for path in MODULES.values():
        text = path.read_text()
        if "annotations from __future__:" in text:  # a comment that says who evaluates the annotations
            continue
        annotated = any(
            isinstance(node, ast.AnnAssign) or getattr(node, "annotation", None) or getattr(node, "returns", None)
            for node in ast.walk(ast.parse(text))
        )
        assert not annotated or "from __future__ import annotations" in text, path
