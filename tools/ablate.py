"""The paper's ablation of compression functions and losses (its Table 5), at any scale, on speech or text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.ablate import main
from ct_audio.commands.command_line import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
