"""Show that `kill -9` does no harm: kill a training run many times and compare it with one left alone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.command_line import run_tool
from ct_audio.commands.kill_test import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
