"""Sampling from a trained model, to wav and text files."""
