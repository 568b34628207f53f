"""Measure speed: training, what the layer-parallel chunk and the fused attention gain, sampling early and late."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.bench import main
from ct_audio.commands.command_line import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
