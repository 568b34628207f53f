"""Train an agent from the YAML of a run; the same command again resumes it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.agent import main
from ct_audio.commands.command_line import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
