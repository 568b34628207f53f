"""What a trained Compressive Transformer or Transformer-XL does with its memory: tables and pictures."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.analyse import main
from ct_audio.commands.command_line import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(main))
