"""Recordings and texts become a corpus."""
