"""`python -m ct_audio COMMAND ...`: the program ct-audio; it also runs by its path, without installation."""

import sys
from pathlib import Path

if not __package__:  # run by its path: what is beside this file has names of its own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ct_audio.commands.program import main

if __name__ == "__main__":
    sys.exit(main())
