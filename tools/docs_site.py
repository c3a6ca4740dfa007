# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs: adapt the pages of docs/, which are written to be read in the repository, to the built site.

- A link to a file outside of docs/ (source code, the README) becomes plain text: the site holds no such file.
- Sphinx roles of docstrings (``:class:`Program```) become code. mkdocstrings reads docstrings as Markdown.

Run ``mkdocs build --strict`` from the top of the repository (``pip install -e ".[docs]"``).
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):(?=<code>)")
_EXCLUDED = ("docs/examples/", "docs/measurements/")


class SourceFile(Protocol):
    """The part of ``mkdocs.structure.files.File`` that is read here."""

    src_uri: str


class Page(Protocol):
    """The part of ``mkdocs.structure.pages.Page`` that is read here."""

    file: SourceFile


def without_outside_links(markdown: str, page: str) -> str:
    """Replace links that lead out of the site by their text.

    ``page`` is the page's path below docs/, with forward slashes. A link to a file that does not exist is kept, so that
    mkdocs reports it.
    """

    def replace(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link[2]))
        outside = not target.startswith("docs/") or f"{target}/".startswith(_EXCLUDED)
        return link[1] if outside and (ROOT / target).exists() else link[0]

    return _LINK.sub(replace, markdown)


def without_roles(html: str) -> str:
    """Remove the names of Sphinx roles in front of code."""
    return _ROLE.sub("", html)


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Adapt a page before it is rendered."""
    return without_outside_links(markdown, page.file.src_uri)


def on_page_content(html: str, **_: object) -> str:
    """Adapt a rendered page."""
    return without_roles(html)
