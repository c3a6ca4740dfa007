"""Where models come from: loaders by source, example inputs by class, and the demo model."""

from __future__ import annotations
