"""Train a model from a run's YAML; the same command again resumes it. Also under torchrun."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.command_line import run_tool
from ct_audio.commands.train import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
