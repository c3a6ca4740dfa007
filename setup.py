"""Build the source distribution with the repository's links; everything else is in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

LINKED = ("models", "passes")  # folders at the top, to which links in districompile/ lead


class SourceDistribution(sdist):
    """Write districompile/passes and districompile/models as links; as copies, they would be there twice."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Create the folder that is archived. Raises :class:`OSError` where the system has no links."""
        package = Path("districompile")
        copied = [f for f in files if not any(Path(f).is_relative_to(package / name) for name in LINKED)]
        super().make_release_tree(base_dir, copied)
        for name in LINKED:
            (base_dir / package / name).symlink_to(Path("..", name), target_is_directory=True)


setup(cmdclass={"sdist": SourceDistribution})
