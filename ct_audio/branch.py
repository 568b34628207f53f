"""Branches of a run: a new run that goes on from another's last checkpoint with other settings of the optimizer.

Weights, Adam's moments, memories, generators and the place in the corpus are those of the source, so that branches of
one run see the same codes in the same order and differ by their settings alone. The source is left as it is.
"""

import dataclasses
import shutil
from pathlib import Path

from ct_audio.checkpoint_files import digest, find_checkpoint, read_state
from ct_audio.config import RunConfig, config_to_yaml, load_config
from ct_audio.errors import UserError
from ct_audio.files import write_file, write_json
from ct_audio.session import require_same_run


def branch_run(source: Path, config: RunConfig) -> None:
    """Make the run of `config` begin at the last checkpoint of another; nothing is done if it has begun already.

    Args:
        source: directory of the run to branch off.
        config: of the branch; it may differ in `optim` and in what a resumed run may change.
    Raises:
        UserError: the source has no checkpoint, or another key has changed; the message names it.
        OSError: it cannot be written; there is no half-made run then.
    """
    if find_checkpoint(config.run_dir, "last") is not None:
        return
    checkpoint = find_checkpoint(source, "last")
    if checkpoint is None:
        raise UserError(f"{source}: no checkpoint to branch off; train that run first")
    state, before = read_state(checkpoint), load_config(checkpoint / "config.yaml")
    require_same_run(before, dataclasses.replace(config, optim=before.optim))
    beside = config.run_dir.with_name(f"{config.run_dir.name}.branching")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        root = beside / "checkpoints"
        shutil.copytree(checkpoint, root / checkpoint.name)
        write_file(root / checkpoint.name / "config.yaml", config_to_yaml(config).encode())
        state["files"]["config.yaml"] = digest(root / checkpoint.name / "config.yaml")
        state.get("progress", {})["best_valid_nll_nats"] = None  # the source's best is not the branch's
        write_json(root / checkpoint.name / "state.json", state)
        (root / "last").symlink_to(checkpoint.name, target_is_directory=True)
        beside.rename(config.run_dir)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
