# SPDX-License-Identifier: Apache-2.0
"""The operator of the package beside this file, for those who try it without an installation: ``--rules sharpen``.

PYTHONPATH=docs/examples districompile convert sharpen:network --rules sharpen --gpus 3 --out sharpened
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "districompile-example"))

from districompile_example.sharpen import *  # noqa: F403
