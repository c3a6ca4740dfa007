# SPDX-License-Identifier: Apache-2.0
"""Picture files: read what ``run`` starts from, name and write what it draws. Nothing here imports PyTorch.

A picture holds how it was drawn as JSON: in PNG as the text ``districompile``, in JPEG and WebP as the EXIF comment of
the user. Only a file with that record is replaced without ``--force``.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from districompile.cli.common import UsageError
from districompile.common.outputs import check_file, write_file
from districompile.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

RECORD = "districompile"  # the name of the text in a PNG file
_EXIF_IFD, _USER_COMMENT, _SOFTWARE = 0x8769, 0x9286, 0x0131
_ASCII = b"ASCII\0\0\0"  # how a comment in EXIF begins


@dataclasses.dataclass(frozen=True)
class Targets:
    """The files that are written: one for each picture, one for all, and one for unfinished ones."""

    pictures: tuple[Path, ...]
    grid: Path | None
    preview: Path | None

    @staticmethod
    def of(out: Path, count: int, grid: bool, preview: bool) -> Targets:
        """Name the files for ``count`` pictures: NAME, NAME-1, NAME-2 and so on, NAME-grid and NAME-preview."""

        def named(suffix: str) -> Path:
            return out.with_name(f"{out.stem}-{suffix}{out.suffix}")

        pictures = (out, *(named(str(i)) for i in range(1, count)))
        return Targets(pictures, named("grid") if grid else None, named("preview") if preview else None)

    def check(self, force: bool) -> None:
        """Check that all files can be written, and that none is replaced that ``run`` did not draw.

        Raises :class:`UsageError`, or :class:`~districompile.common.outputs.OutputError`.
        """
        for path in (*self.pictures, *(p for p in (self.grid, self.preview) if p is not None)):
            check_file(path, "--out")
            if path.is_file() and not force and read_record(path) is None:
                raise UsageError(
                    f"{path} exists, and districompile run did not draw it: give --force to replace it, or another "
                    "--out"
                )


def image_format(path: Path) -> str:
    """Return Pillow's name of the format of ``path``. Raise :class:`UsageError` for an unknown suffix."""
    image = _pillow()
    known = image.registered_extensions()
    name = known.get(path.suffix.lower())
    if name is None or name not in image.SAVE:
        raise UsageError(
            f"--out {path}: the suffix {path.suffix or '(none)'!r} is no image format; use .png, .jpg or .webp"
        )
    return str(name)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as e:
        raise UsageError("images need Pillow: pip install 'districompile[diffusers]'") from e
    return Image


def read_picture(path: Path, option: str) -> Image:
    """Read a picture. ``option`` names it in errors. Raise :class:`UsageError` where it cannot be read."""
    image = _pillow()
    try:
        with image.open(path) as opened:
            opened.load()
            found: Image = opened.copy()
            return found
    except image.DecompressionBombError as e:
        raise UsageError(f"{option} {path} cannot be read: {e}") from e
    except image.UnidentifiedImageError:
        raise UsageError(f"{option} {path} cannot be read: it is no picture, or of an unknown format") from None
    except OSError as e:
        raise UsageError(f"{option} {path} cannot be read: {e.strerror or e}") from e
    except (ValueError, SyntaxError) as e:  # of a damaged file
        raise UsageError(f"{option} {path} cannot be read: {e}") from e


def check_start(image: Path | None, mask: Path | None) -> None:
    """Check that the pictures can be read, and have one size. Raise :class:`UsageError`."""
    if image is None:
        return
    size = read_picture(image, "--image").size
    if mask is not None and (other := read_picture(mask, "--mask").size) != size:
        raise UsageError(
            f"--mask {mask} is {other[0]}x{other[1]}, and --image {image} is {size[0]}x{size[1]}: give both one size"
        )


def fitted(picture: Image, size: tuple[int, int], mode: str) -> Image:
    """Scale a picture so that it covers ``size`` (width, height), and crop what is beyond it on both sides alike."""
    from PIL import ImageOps

    if picture.mode in ("RGBA", "LA", "PA") and mode == "RGB":  # what is transparent is white
        white = _pillow().new("RGBA", picture.size, "white")
        picture = _pillow().alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert(mode)
    return picture if picture.size == size else ImageOps.fit(picture, size)


PNG_LEVEL = 1
"""Compression of PNG files. Pillow's, 6, takes 2.5 times as long, and saves an eighth of a picture with grain."""


def write_picture(path: Path, picture: Image, record: Mapping[str, Any]) -> None:
    """Write a picture atomically, with ``record`` in it where the format can hold it."""
    kind = image_format(path)
    text = json.dumps({"version": __version__, **record})
    data = io.BytesIO()
    options: dict[str, Any] = {}
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("Software", f"districompile {__version__}")
        info.add_text(RECORD, text)
        options |= {"pnginfo": info, "compress_level": PNG_LEVEL}
    elif kind in ("JPEG", "WEBP"):
        exif = _pillow().Exif()
        exif[_SOFTWARE] = f"districompile {__version__}"
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII + text.encode()
        options["exif"] = exif
    picture.save(data, format=kind, **options)
    write_file(path, data.getvalue())


def read_record(path: Path) -> dict[str, Any] | None:
    """Return how ``run`` drew the picture at ``path``; None for any other file."""
    image = _pillow()
    try:
        with image.open(path) as opened:
            text = opened.info.get(RECORD) or opened.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
        if isinstance(text, bytes):
            text = text.removeprefix(_ASCII).decode()
        found = json.loads(text)
    except Exception:  # of a file that may hold anything
        return None
    return found if isinstance(found, dict) and "version" in found else None


def grid_of(pictures: Sequence[Image], columns: int) -> Image:
    """Put pictures of one size beside each other, ``columns`` in a row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet: Image = _pillow().new(pictures[0].mode, (columns * width, rows * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet
