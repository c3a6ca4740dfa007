# SPDX-License-Identifier: Apache-2.0
"""Read the pictures that clients send, with limits, and give them to the ranks in one form."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

from districompile.serve.api import ApiError

_FORMATS = ("PNG", "JPEG", "WEBP")
_MOST_PIXELS = 8192 * 8192


def load_formats() -> None:
    """Import Pillow and its formats, so that no request waits for them."""
    from PIL import Image

    Image.init()


async def prepared(image: bytes, mask: bytes | None, size: tuple[int, int] | None) -> tuple[str, str | None]:
    """Return a picture as an RGB file, and its mask as a grey one, both PNG in base64. White is drawn anew.

    Without ``mask``, the transparent part of the picture is the mask, if it has one. Raise :class:`ApiError` for a file
    that is no picture, and for one of another size than ``size`` (width, height).
    """
    return await asyncio.to_thread(_prepared, image, mask, size)


def _prepared(image: bytes, mask: bytes | None, size: tuple[int, int] | None) -> tuple[str, str | None]:
    from PIL import Image

    picture = _read("image", image, size)
    transparent = _transparency(picture)
    if mask is None:
        drawn_anew = transparent
    else:
        given = _read("mask", mask, picture.size)
        drawn_anew = _transparency(given)
        if drawn_anew is None:
            raise ApiError(400, "'mask' has no transparent part: nothing would change.", code="invalid_image",
                           param="mask")  # fmt: skip
    if transparent is not None:
        flat = Image.new("RGB", picture.size)
        flat.paste(picture.convert("RGBA"), mask=picture.convert("RGBA").getchannel("A"))
        picture = flat
    return _packed(picture.convert("RGB")), None if drawn_anew is None else _packed(drawn_anew)


def _read(name: str, data: bytes, size: tuple[int, int] | None) -> Any:
    from PIL import Image

    def refuse(message: str, code: str = "invalid_image") -> ApiError:
        return ApiError(400, message, code=code, param=name)

    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = picture.size
        if size is not None and (width, height) != size:
            raise refuse(f"{name!r} is {width}x{height}; it must be {size[0]}x{size[1]}.", "invalid_size")
        if width * height > _MOST_PIXELS:
            raise refuse(f"{name!r} has {width * height} pixels; at most {_MOST_PIXELS} are read.")
        picture.load()
    except ApiError:
        raise
    except Exception as e:  # decoders raise anything for a damaged file
        raise refuse(f"{name!r} cannot be read: it must be a PNG, JPEG or WebP file.") from e
    return picture


def _transparency(picture: Any) -> Any:
    """Return how transparent each pixel is, as a grey picture; None if none is."""
    from PIL import ImageChops

    if not picture.has_transparency_data:
        return None
    transparent = ImageChops.invert(picture.convert("RGBA").getchannel("A"))
    return None if transparent.getbbox() is None else transparent


def _packed(picture: Any) -> str:
    data = io.BytesIO()
    picture.save(data, format="PNG", compress_level=1)
    return base64.b64encode(data.getvalue()).decode()
