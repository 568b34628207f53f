"""ct_audio: the Compressive Transformer (Rae et al. 2019, arXiv 1911.05507) for raw audio."""

__version__ = "0.1.0"
