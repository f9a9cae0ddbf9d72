"""Kernels of the layers: norms and the short convolution."""
