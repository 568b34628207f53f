"""Models that are handed on: writing the folder of `runs/exported.py` with its card, and using it from a program."""
