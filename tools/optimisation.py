"""The optimisation experiment of Rae et al. 2019, section 5.5.1 and Figure 3, with any model and corpus."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ct_audio.commands.command_line import run_tool
from ct_audio.commands.optimisation import main

if __name__ == "__main__":
    sys.exit(run_tool(main))
