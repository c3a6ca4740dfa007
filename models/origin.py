# SPDX-License-Identifier: Apache-2.0
"""A model with what it is read by, as one text: ``weights.safetensors#config=FOLDER``, ``FOLDER#variant=fp16``,
``FOLDER/vae#part=encoder``.

A bundle keeps that text, so that every command reads the model again as ``convert`` did.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from districompile.models.errors import ModelError

_OPTIONS = re.compile(r"(.*?)#((?:config|variant|part)=.*)", re.DOTALL)
_PARTS = ("decoder", "encoder")


@dataclasses.dataclass(frozen=True)
class Origin:
    """A model's ``path`` (or hub id, or function), the ``config`` of a single file, and the ``variant`` of a folder.

    ``part`` is that of an autoencoder, by default its decoder.
    """

    path: str
    config: str | None = None
    variant: str | None = None
    part: str | None = None

    @staticmethod
    def of(model: str) -> Origin:
        """Read the text of a model. Raises :class:`ModelError` for an unknown option after ``#``."""
        found = _OPTIONS.fullmatch(model)
        if found is None:
            return Origin(model)
        options = dict(part.partition("=")[::2] for part in found[2].split("#"))
        if not options.keys() <= {"config", "variant", "part"} or options.get("part", "encoder") not in _PARTS:
            raise ModelError(
                f"unknown options of a model: {model}; give #config=FOLDER, #variant=NAME or #part=encoder"
            )
        return Origin(found[1], options.get("config"), options.get("variant"), options.get("part"))

    def __str__(self) -> str:
        options = {"config": self.config, "variant": self.variant, "part": self.part}
        return self.path + "".join(f"#{name}={value}" for name, value in options.items() if value is not None)

    @property
    def file(self) -> Path | None:
        """The model's file, where it is one."""
        path = Path(self.path).expanduser()
        return path if path.is_file() else None

    def resolved(self) -> Origin:
        """Return the model with whole paths, which hold in any folder."""
        path = Path(self.path).expanduser()
        config = None if self.config is None else str(Path(self.config).expanduser().resolve())
        return Origin(str(path.resolve()) if path.exists() else self.path, config, self.variant, self.part)
