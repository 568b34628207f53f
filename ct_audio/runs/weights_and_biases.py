"""Weights & Biases as a second place for a run's scalars, sounds and figures. The only importer of wandb.

It is an extra (`pip install 'ct_audio[wandb]'`), and nothing of it is loaded unless `train.logger` is wandb.
Shape letters: N samples.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from ct_audio.common.errors import UserError
from ct_audio.common.files import read_json, write_json

ID_FILE = "wandb.json"


class WandbLogger:
    """A run of Weights & Biases, in the project ct_audio (or WANDB_PROJECT); a resumed run goes on with the same one.

    The x axis is `step`, a value like any other: so a resumed run may log a step again.

    Args:
        run_dir: the run's directory; its name is that of the run, and ID_FILE in it says which one it is.
        config: the run's configuration, as flat plain values.
    Raises:
        UserError: wandb is not installed, or nobody is logged in.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                f"train.logger = wandb: {error}; run: python -m pip install wandb, or write train.logger=none"
            ) from error
        file = run_dir / ID_FILE
        known = read_json(file)["id"] if file.is_file() else None
        how = {"name": run_dir.name, "dir": str(run_dir), "config": config, "id": known, "resume": "allow"}
        try:
            self._run = wandb.init(project=None if _has_project() else "ct_audio", **how)
        except wandb.Error as error:
            advice = "run: wandb login, or set WANDB_MODE=offline, or write train.logger=none"
            raise UserError(f"train.logger = wandb: {error}; {advice}") from error
        self._run.define_metric("*", step_metric="step")
        write_json(file, {"id": self._run.id})

    def scalars(self, values: dict[str, float], *, step: int) -> None:
        """Log scalars by tag."""
        self._run.log({**values, "step": step})

    def audio(self, tag: str, waveform: Float[np.ndarray, " N"], *, step: int, sample_rate_hz: int) -> None:
        """Log a sound in [-1, 1]."""
        import wandb  # pyright: ignore[reportMissingImports]

        self._run.log({tag: wandb.Audio(waveform, sample_rate=sample_rate_hz), "step": step})

    def figure(self, tag: str, figure: Figure, *, step: int) -> None:
        """Log a matplotlib figure."""
        import wandb  # pyright: ignore[reportMissingImports]

        self._run.log({tag: wandb.Image(figure), "step": step})

    def close(self) -> None:
        """End the session; the run can be resumed."""
        self._run.finish()


def _has_project() -> bool:
    return "WANDB_PROJECT" in os.environ
