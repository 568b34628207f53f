"""Train agents with different memories over seeds and delays, and draw their success."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.agent_sweep import main
from ct_audio.commands.command_line import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
