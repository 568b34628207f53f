"""Check this machine and installation, and say how to repair what is broken."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.command_line import run_tool
from ct_audio.commands.doctor import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
