"""The Compressive Transformer (Rae et al. 2019): begin with `paper.py`, its two algorithms as plain loops."""
