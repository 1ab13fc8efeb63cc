"""Copies `data/` into the wheel as `advisor/_data`; everything else is in pyproject.toml."""

from pathlib import Path
from shutil import copytree

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithData(build_py):
    """The usual build step, plus the catalogue's data files."""

    def run(self) -> None:
        """Build the packages, then copy the data beside them; an editable install reads the checkout instead."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "advisor" / "_data"
            copytree(Path(__file__).parent / "data", target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithData})
