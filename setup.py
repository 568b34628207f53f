"""Package metadata and dependencies of ct_audio: ranges here, exact versions in requirements.lock.

Tool settings live in pyproject.toml. A wheel holds the recipes too, as ct_audio/recipes.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "ct_audio" / "__init__.py").read_text(encoding="utf-8"), re.M)
assert VERSION

AV = ["av>=14,<19"]  # webm, m4a and what else phones record
WANDB = ["wandb>=0.19,<1"]  # train.logger: wandb
AGENT = ["gymnasium>=1.1,<2"]  # ct-audio agent
RLLIB = ["ray[rllib]>=2.60,<2.61"]  # agents/rllib.py; not in requirements.lock: it holds gymnasium back, at 1.2.2
PLAY = ["gradio>=6,<7", "sounddevice>=0.5,<1"]  # ct-audio play
DOCS = ["mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.27,<2"]  # make docs
TEST = [
    "pytest>=9,<10",
    "pytest-timeout>=2.3,<3",
    "pytest-xdist>=3.6,<4",
    "hypothesis>=6.120,<7",
    "beartype>=0.20,<1",
    "setuptools>=70.1,<82",  # builds a wheel, for the test of one
    *AV,
    *AGENT,
]
DEV = [*TEST, "ruff==0.17.5", "pyright[nodejs]==1.1.414", "pre-commit>=4,<5"]  # nodejs: no download at run time

setup(
    name="ct_audio",
    version=VERSION[1],
    description="Reference implementation of the Compressive Transformer for raw audio",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["ct_audio", "ct_audio.*"]), "ct_audio.recipes"],
    package_dir={"ct_audio.recipes": "recipes"},
    package_data={"ct_audio": ["py.typed", "data/*.csv", "apps/*.html"], "ct_audio.recipes": ["**/*"]},
    exclude_package_data={"ct_audio.recipes": ["**/__pycache__/*"]},
    entry_points={"console_scripts": ["ct-audio = ct_audio.commands.program:main"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "torch>=2.11,<2.12",
        "torchaudio>=2.11,<2.12",  # a matched pair with torch: change both or neither
        "numpy>=2.2,<3",
        "scipy>=1.14,<2",
        "numba>=0.61,<1",  # compiles the loop of models/linear_prediction.py
        "soundfile>=0.13,<1",
        "librosa>=0.11,<0.12",
        "soxr>=0.5,<2",
        "einops>=0.8,<1",
        "pyyaml>=6.0.1,<7",
        "safetensors>=0.5,<1",
        "tokenizers>=0.21,<1",  # subwords of recipes/pg19
        "tensorboard>=2.21,<3",
        "jaxtyping>=0.3,<0.4",
        "tqdm>=4.66,<5",
        "platformdirs>=4,<5",  # the user's folder for what is measured once
        "pooch>=1.8,<2",  # downloads of preparation/download.py
        "requests>=2.32,<3",
        "urllib3>=2.7,<3",
        "matplotlib>=3.9,<4",
        "shtab>=1.7,<2",  # completion in shells
        "espeakng-loader==0.2.4",  # recipes/espeak: speech (GPL-3.0, only run, never linked); another version differs
    ],
    extras_require={
        "av": AV,
        "wandb": WANDB,
        "agent": AGENT,
        "rllib": RLLIB,
        "play": PLAY,
        "docs": DOCS,
        "test": TEST,
        "dev": DEV,
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/1911.05507"},
)
