"""Backend options on the command line: typed by the constructor; a mistake is one clear error."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, Literal

import pytest

from districompile.cli import backend_options, main
from districompile.cli.backend_options import BackendOption, help_lines, options_of, parse_options
from districompile.cli.common import UsageError


class Typed:
    """A constructor with every type that an option may have."""

    OPTION_HELP: ClassVar[dict[str, str]] = {"mode": "What to do."}

    def __init__(
        self, level: int = 3, *, mode: Literal["fast", "small"] = "fast", exact: bool = True,
        scale: float | None = None, targets: tuple[str, ...] = (),
        parts: str | Collection[Literal["a", "b"]] | None = None, hooks: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.given = (level, mode, exact, scale, targets, parts, hooks)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> dict[str, BackendOption]:
    monkeypatch.setattr(backend_options, "get_backend", lambda name: Typed())
    return options_of(Typed)


def test_types(typed: dict[str, BackendOption]) -> None:
    assert list(typed) == ["level", "mode", "exact", "scale", "targets", "parts"]  # a dict is no option
    texts = ["level=7", "mode=small", "exact=no", "scale=1e-3", "targets=sm80, sm90", "parts=a,b"]
    assert parse_options("typed", texts) == {
        "level": 7, "mode": "small", "exact": False, "scale": 1e-3, "targets": ("sm80", "sm90"), "parts": ("a", "b"),
    }  # fmt: skip
    assert typed["mode"].type_text == "fast|small" and typed["exact"].type_text == "true|false"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=7", "the backend typed has no option speed; its options: level, mode, exact, scale, targets, parts"),
        ("level=many", "level accepts int, not 'many'"),
        ("level=1.5", "level accepts int, not '1.5'"),
        ("mode=slow", r"mode accepts fast\|small, not 'slow'"),
        ("exact=maybe", r"exact accepts true\|false, not 'maybe'"),
        ("scale=x", "scale accepts float, not 'x'"),
        ("level", "write it as KEY=VALUE"),
        ("=7", "write it as KEY=VALUE"),
    ],
)
def test_mistakes(typed: dict[str, BackendOption], text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"--backend-option {text}: .*{message}".replace("--", "-.")):
        parse_options("typed", [text])


def test_an_option_is_given_once(typed: dict[str, BackendOption]) -> None:
    with pytest.raises(UsageError, match="level is given twice"):
        parse_options("typed", ["level=1", "level=2"])


def test_help(typed: dict[str, BackendOption]) -> None:
    text = "\n".join(help_lines("typed"))
    assert "  -o mode=fast|small\n      What to do. Default: fast." in text
    assert "  -o exact=true|false\n      Default: true." in text
    assert max(map(len, text.splitlines())) <= 80


def test_every_option_of_the_built_in_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["convert", "--help-backend"]) == 0
    text = capsys.readouterr().out
    for name in backend_options.BUILT_IN:
        assert f"{name}:" in text
    assert "max_autotune=true|false" in text
    assert main.main(["convert", "--backend", "eager", "--help-backend"]) == 0
    assert capsys.readouterr().out == "eager: no options\n"
    assert main.main(["convert", "--backend", "fast", "--help-backend"]) == 2
    assert "no backend named 'fast'" in capsys.readouterr().err


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["convert", "demo", "--backend", "eager", "-o", "speed=7"]) == 2
    assert capsys.readouterr().err.startswith("error: --backend-option speed=7: the backend eager has no option speed")
