"""Settings shared by all tests: one thread, fixed seeds, no drawing on a display.

ct_audio is not imported at the top: the jaxtyping hook has to come first.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["CT_AUDIO_CACHE_DIR"] = os.devnull  # no folder can be made there: tests leave the user's alone

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "default",
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of four short documents of noise, which tests must leave as it is."""
    from handmade_runs import noise_corpus

    return noise_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """tools/sample.py as a function of its words, which returns the exit status."""
    from handmade_runs import tool

    return tool("sample", monkeypatch)


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """tools/evaluate.py likewise."""
    from handmade_runs import tool

    return tool("evaluate", monkeypatch)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """When all tests of all processes have ended: the report of hostile input, if some test wrote a part of it."""
    if not hasattr(session.config, "workerinput"):
        from hostile_report import FOLDER, write_report

        if FOLDER.is_dir():
            write_report()


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same state of the global generators."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (third parties may draw from it)
    torch.manual_seed(0)
