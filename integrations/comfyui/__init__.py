# SPDX-License-Identifier: Apache-2.0
"""ComfyUI nodes of districompile. ComfyUI imports this folder from ``custom_nodes``."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
