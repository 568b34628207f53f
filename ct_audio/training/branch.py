"""Branches of a run: a new run that goes on from another's last checkpoint with other settings of the optimizer.

Weights, Adam's moments, memories, generators and the place in the corpus are those of the source, so that branches of
one run see the same codes in the same order and differ by their settings alone. A branch's curves begin with those of
its source. The source is left as it is.

    runs/<branch>/branch.json    where it branched off: name of the source, its step, the hash of its weights
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json, switch_link, write_file, write_json
from ct_audio.runs.checkpoint_files import digest, find_checkpoint, read_state
from ct_audio.runs.config import RunConfig, config_to_yaml, load_config
from ct_audio.runs.metrics import read_metrics, write_metrics
from ct_audio.runs.same_run import require_same_run

FORMAT = "ct_audio branch"
FORMAT_VERSION = 1
BRANCH_FILE = "branch.json"
_POINT = {"source": str, "step": int, "weights_sha256": str}


def branch_run(source: Path, config: RunConfig) -> None:
    """Make the run of `config` begin at the last checkpoint of another; nothing is done if it has begun there already.

    Args:
        source: directory of the run to branch off.
        config: of the branch; it may differ in `optim` and in what a resumed run may change.
    Raises:
        UserError: the source has no checkpoint or a damaged metrics.jsonl, another key has changed (the message names
            it), or the run began elsewhere (see `require_branch_point`).
        OSError: it cannot be written; there is no half-made run then.
    """
    checkpoint = find_checkpoint(source, "last")
    if checkpoint is None:
        raise UserError(f"{source}: no checkpoint to branch off; train that run first")
    state = read_state(checkpoint)
    weights = state["files"]["model.safetensors"]["sha256"]
    if require_branch_point(config.run_dir, source=source.name, step=state["step"], weights_sha256=weights):
        return
    before = load_config(checkpoint / "config.yaml")
    require_same_run(before, dataclasses.replace(config, optim=before.optim))
    lines = [line for line in read_metrics(source) if line["step"] <= state["step"]]
    beside = config.run_dir.with_name(f"{config.run_dir.name}.branching")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        root = beside / "checkpoints"
        shutil.copytree(checkpoint, root / checkpoint.name)
        write_file(root / checkpoint.name / "config.yaml", config_to_yaml(config).encode())
        state["files"]["config.yaml"] = digest(root / checkpoint.name / "config.yaml")
        state.get("progress", {})["best_valid_nll_nats"] = None  # the source's best is not the branch's
        write_json(root / checkpoint.name / "state.json", state)
        switch_link(root / "last", checkpoint.name)
        point = {"source": source.name, "step": state["step"], "weights_sha256": weights}
        write_json(beside / BRANCH_FILE, {"format": FORMAT, "format_version": FORMAT_VERSION} | point)
        write_metrics(beside, lines)
        beside.rename(config.run_dir)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def require_branch_point(run_dir: Path, *, source: str, step: int, weights_sha256: str | None = None) -> bool:
    """Check where a branch began that may be there already: before anything is trained, if the step alone is known.

    Args:
        source: name of the run that it has to branch off.
        step: of that run, at which it has to begin.
        weights_sha256: of that run at that step; None where they are not known yet.
    Returns:
        whether there is such a run.
    Raises:
        UserError: it began at another step, run or weights, or does not say where.
    """
    if find_checkpoint(run_dir, "last") is None:
        return False
    advice = f"choose another name or --out, or delete {run_dir} and its other branches, and run the command again"
    expected: dict[str, Any] = {"source": source, "step": step}
    if weights_sha256 is not None:
        expected["weights_sha256"] = weights_sha256
    where = f"expected a branch of {_describe(expected)}"
    try:
        found = _read_point(run_dir)
    except FileNotFoundError as error:
        what = f"there is no {BRANCH_FILE} that says where it began: it is no branch"
        raise UserError(f"{run_dir}: {where}, but {what}; {advice}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir}: {where}, but {BRANCH_FILE} cannot be read: {error}; {advice}") from error
    if any(found[key] != value for key, value in expected.items()):
        raise UserError(f"{run_dir}: {where}, got one of {_describe(found)}; {advice}")
    return True


def branch_points(run_dir: Path) -> list[dict[str, Any]]:
    """Where a run branched off, and where its source did, as far as sources lie beside it; the newest first.

    Returns:
        of each branch `source`, `step` and `weights_sha256`; nothing for a run that began by itself.
    Raises:
        UserError: a `branch.json` cannot be read.
    """
    points: list[dict[str, Any]] = []
    seen: set[str] = set()
    while run_dir.name not in seen and (path := run_dir / BRANCH_FILE).exists():
        seen.add(run_dir.name)
        try:
            points.append(_read_point(run_dir))
            run_dir = run_dir.with_name(points[-1]["source"])
        except (OSError, ValueError) as error:
            advice = "move it away to do without"
            raise UserError(
                f"{path}: expected where the run branched off, but it cannot be read: {error}; {advice}"
            ) from error
    return points


def _read_point(run_dir: Path) -> dict[str, Any]:
    """What branch.json says; raises OSError or ValueError where it says nothing."""
    found = read_json(run_dir / BRANCH_FILE)
    if not isinstance(found, dict) or (found.get("format"), found.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"it is not of {FORMAT}, version {FORMAT_VERSION}")
    if missing := [key for key, kind in _POINT.items() if type(found.get(key)) is not kind]:
        raise ValueError(f"{', '.join(missing)}: missing, or not of the kind expected")
    return {key: found[key] for key in _POINT}


def _describe(point: dict[str, Any]) -> str:
    weights = f" with weights {str(point['weights_sha256'])[:12]}" if "weights_sha256" in point else ""
    return f"{str(point.get('source'))[:80]} at step {str(point.get('step'))[:20]}{weights}"
