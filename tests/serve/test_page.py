"""The page at ``/`` in a real browser, where playwright and a Chromium are installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_serve import Running, file_of, running, until

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
TOKEN = "correct horse battery"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except sync_api.Error as e:
            pytest.skip(f"no Chromium can be started: {str(e).splitlines()[0]}")
        yield found
        found.close()


def opened(browser: Any, server: Running) -> tuple[Any, list[str]]:
    """Open the page. Return it with the errors that it logs and the addresses of other hosts that it asks."""
    page = browser.new_page()
    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith((server.url, "data:")) else wrong.append(r.url))
    page.goto(server.url)
    return page, wrong


def test_a_person_draws_cancels_and_edits(browser: Any, tmp_path: Path) -> None:
    with running(hosts=frozenset({"127.0.0.1"})) as server:
        page, wrong = opened(browser, server)
        status = page.locator("#status")
        sync_api.expect(status).to_have_text("2 ranks are ready.")
        assert page.locator("#size option").all_inner_texts() == ["64x48"]
        page.fill("#prompt", "a star")
        page.fill("#seed", "7")
        page.fill("#n", "2")
        page.click("#draw")
        sync_api.expect(status).to_contain_text("Drawn in")
        assert page.locator("figcaption").all_inner_texts() == ["seed 8", "seed 7"]
        assert page.evaluate("[...document.images].map((i) => i.naturalWidth)") == [64, 64]
        assert [(j.prompt, j.previews) for j in server.artists.jobs] == [("a star", 3)] * 2

        server.artists.hold = True
        page.click("#draw")
        until(lambda: server.app.state.dispatcher.running is not None)
        page.click("#cancel")
        sync_api.expect(status).to_have_text("Cancelled.")
        until(lambda: server.artists.stopped)
        server.artists.hold = False

        (tmp_path / "a.png").write_bytes(file_of(3))
        page.set_input_files("#image", tmp_path / "a.png")
        page.fill("#n", "1")
        page.click("#draw")
        sync_api.expect(status).to_contain_text("Drawn in")
        assert server.artists.jobs[-1].image is not None
        assert not wrong
        page.fill("#prompt", "")
        page.click("#draw")
        sync_api.expect(status).to_contain_text("'prompt' is required")


def test_the_page_asks_for_the_token(browser: Any) -> None:
    with running(token=TOKEN) as server:
        page, _ = opened(browser, server)
        sync_api.expect(page.locator("#status")).to_have_text("Enter the token.")
        page.fill("#token", TOKEN)
        page.locator("#token").blur()
        sync_api.expect(page.locator("#status")).to_have_text("2 ranks are ready.")
        page.click("#draw")
        sync_api.expect(page.locator("#status")).to_contain_text("Drawn in")
