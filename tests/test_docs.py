"""Check that the pages say what is so: links lead somewhere, names of code exist, quoted messages are in the code."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")
NAME = re.compile(r"`((?:districompile|passes|models|tests|tools)/[\w./-]*\w(?:\.py)?)(?::(\w+))?`")

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[ ]", "-", re.sub(r"[^\w\- ]", "", title).lower()) for title in titles}


@by_name
def test_links_lead_somewhere(page: Path) -> None:
    """Files and headings exist. Other sites are not asked."""
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {link}"
        assert file.is_relative_to(ROOT), f"{page.name}: {link} leads out of the repository"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}: {link}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name != "decisions"], ids=lambda page: page.name)
def test_lines_are_short(page: Path) -> None:
    """Tables and code aside, lines have fewer than 200 characters."""
    for line in prose(page).splitlines():
        assert len(line) < 200 or line.startswith("|"), line


@pytest.mark.parametrize("name", ["architecture.md", "glossary.md", "bundles.md"])
def test_names_of_code_exist(name: str) -> None:
    """Each `path` is a file or folder, and each `path:name` a name in that file."""
    found = NAME.findall((DOCS / name).read_text())
    assert found
    for path, identifier in found:
        file = ROOT / path
        assert file.exists(), path
        if identifier:
            assert re.search(rf"\b{identifier}\b", file.read_text()), f"{path}:{identifier}"


def test_the_walk_has_ten_stops_at_most() -> None:
    """Each stop of the architecture's walk names a function or class in a file."""
    walk = (DOCS / "architecture.md").read_text().split("## One value's way")[1].split("\n## ")[0]
    stops = re.split(r"^\d+\. ", walk, flags=re.MULTILINE)[1:]
    assert 0 < len(stops) <= 10
    for stop in stops:
        assert any(identifier for _, identifier in NAME.findall(stop)), stop


def strings() -> str:
    """All string constants of the packages, with a mark where a value is formatted in."""
    texts: list[str] = []
    for folder in ("districompile", "passes", "models"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values]
                    texts.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
                elif isinstance(node, ast.ClassDef):
                    texts.append(node.name)
    return "\n".join(texts)


def test_quoted_messages_are_in_the_code() -> None:
    """Every message that the page of errors quotes is one that the code can print."""
    text = (DOCS / "troubleshooting.md").read_text()
    known = strings()
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    assert len(rows) > 50
    missing = [
        part
        for row in rows
        for message in re.findall(r"`([^`]+)`", row)
        for part in re.split(r"\s*\.\.\.\s*|\(\.\.\.\)", message)
        if part.strip() and part.strip() not in known
    ]
    assert not missing


def nav_pages(node: object) -> list[str]:
    if isinstance(node, str):
        return [node]
    items = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    return [page for item in items for page in nav_pages(item)]


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = nav_pages(config["nav"])
    assert [page for page in pages if not (DOCS / page).is_file()] == []
    own = [p.relative_to(DOCS).as_posix() for p in [*DOCS.glob("*.md"), *(DOCS / "reference").glob("*.md")]]
    assert sorted(set(own) - set(pages)) == []


def test_the_reference_names_what_exists() -> None:
    for page in (DOCS / "reference").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            assert resolves(name if name.startswith("districompile") else f"districompile.{name}"), name


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or a member of one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_site_has_no_links_to_the_outside() -> None:
    """The site's hook keeps links within docs/ and links to nowhere, and turns those to other files into text."""
    hooks = runpy.run_path(str(ROOT / "tools" / "docs_site.py"))
    without_outside_links, without_roles = hooks["without_outside_links"], hooks["without_roles"]
    text = "[a](../passes/manager.py) [b](../python.md#x) [c](https://e.org) [d](../none.py) ![e](../images/demo.png)"
    assert without_outside_links(text, "reference/index.md") == text
    one = without_outside_links("[a](../passes/manager.py) [d](../none.py) [e](python.md)", "index.md")
    assert one == "a [d](../none.py) [e](python.md)"
    assert without_outside_links("[m](measurements/four-h100.jsonl)", "benchmarks.md") == "m"
    assert without_roles("see :class:<code>Program</code>") == "see <code>Program</code>"
