"""Codecs, audio files, the corpus on disk, contiguous lanes of it, acoustic measures."""
