"""The command-line programs, one module each."""
