"""torch.compile: for every model one graph without a break, none compiled once its memory is full, equal to eager.

In processes of their own: the shape checks of the tests are not to be compiled. Inductor is slow.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY_MODELS, tiny_model
from tiny_runs import checkpoint_tensors, tiny_run

from ct_audio.common.errors import UserError
from ct_audio.runs.config import config_to_yaml, load_config
from ct_audio.runs.same_run import require_same_run
from ct_audio.training.loop import train

HERE = Path(__file__).resolve().parent
TRAINED = [name for name in TINY_MODELS if not name.startswith("linear_prediction")]
QUICK = {"compressive_transformer", "wavenet"}


def found(backend: str, *names: str) -> dict[str, dict[str, Any]]:
    """What `compiled_check.py` says of these models."""
    command = [sys.executable, str(HERE / "compiled_check.py"), backend, *names]
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return {line["model"]: line for line in map(json.loads, result.stdout.splitlines())}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in TRAINED])
def test_compiled_equals_eager_without_graph_breaks(name: str) -> None:
    """One graph for a memory that is not full and one for a full one, in how many chunks of 16 codes ever it fills."""
    line = found("aot_eager", name)[name]
    assert line["graph_breaks"] == 0
    assert line["largest_difference"] <= 1e-12
    stack = tiny_model(name).zero_memory(1).stack
    until_full = max(stack.codes_until_full) if hasattr(stack, "codes_until_full") else 0
    assert until_full <= 32
    filling = -(-until_full // 16)
    assert line["graphs"] == [1 if chunk < filling or not filling else 2 for chunk in range(4)]
    assert line["counts_equal"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["compressive_transformer", "transformer_xl", "wavenet"])
def test_inductors_machine_code_is_close_to_eager(name: str) -> None:
    line = found("inductor", name)[name]
    assert line["graph_breaks"] == 0
    assert line["largest_difference"] <= 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("value", ["true", "cuda_graphs"])
def test_a_run_is_compiled(tmp_path: Path, value: str) -> None:
    """As a user starts it; on the CPU there are no CUDA graphs, but the same copies of what a replay would write on."""
    eager = tiny_run(tmp_path, name="eager")
    (tmp_path / "run.yaml").write_text(config_to_yaml(tiny_run(tmp_path, name="compiled")), encoding="utf-8")
    assert train(eager) == 0
    command = [sys.executable, str(HERE.parent / "tools" / "train.py"), str(tmp_path / "run.yaml")]
    result = subprocess.run([*command, f"train.compile={value}"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    compiled = load_config(tmp_path / "run.yaml")
    expected, got = checkpoint_tensors(eager), checkpoint_tensors(compiled)
    assert expected.keys() == got.keys()
    weights = [name for name in expected if name.startswith("model.")]
    assert max((expected[name] - got[name]).abs().max().item() for name in weights) < 1e-9


def test_the_key_takes_truths_and_cuda_graphs_and_may_change(tmp_path: Path) -> None:
    for value in (False, True, "cuda_graphs"):
        config = tiny_run(tmp_path, train__compile=value)
        (tmp_path / "run.yaml").write_text(config_to_yaml(config), encoding="utf-8")
        assert load_config(tmp_path / "run.yaml") == config
        require_same_run(tiny_run(tmp_path), config)
    for value in (1, 0, "yes", None):
        with pytest.raises(UserError, match=r"train\.compile: expected one of false, true, cuda_graphs"):
            tiny_run(tmp_path, train__compile=value)
