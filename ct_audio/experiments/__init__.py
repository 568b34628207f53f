"""Experiments on top of training: the paper's ablation and update frequency, speed, resume after kill -9."""
