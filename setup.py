"""Metadata of the distribution; tools are configured in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "boltzgen/__init__.py").read_text(encoding="utf-8"))
if VERSION is None:
    raise RuntimeError("boltzgen/__init__.py states no __version__")

setup(
    name="openmm-boltzgen",
    version=VERSION.group(1),
    description="Boltzmann generators beside OpenMM: exactly reweighted samples and free energies from trained flows",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Chemistry",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["boltzgen", "boltzgen.*"]),
    package_data={"boltzgen": ["py.typed"], "boltzgen.report": ["*.j2", "*.css"]},
    install_requires=[
        "click>=8.1",
        "distributed>=2024.1",
        "e3nn>=0.6",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "mdtraj>=1.10",
        "nflows>=0.14",
        "numpy>=1.26",
        "openmm>=8.6",
        "openmmtools>=0.25",
        "pydantic>=2.7",
        "pymbar>=4.0.3",
        "PyYAML>=6.0",
        "safetensors>=0.4",
        "scipy>=1.11",
        "torch>=2.5",
        "torchdiffeq>=0.2.5",
        "tqdm>=4.65",
    ],
    extras_require={
        "slurm": ["dask-jobqueue>=0.8"],
        "tica": ["deeptime>=0.4.4"],
        "dev": [
            "import-linter>=2.0",
            "ipykernel>=6",
            "mypy>=1.10",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
        ],
    },
    entry_points={"console_scripts": ["boltzgen=boltzgen.cli:main"]},
)
