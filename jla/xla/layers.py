"""The layers' norms and short convolution: the definitions, compiled by XLA."""

from jla.reference.layers import gated_norm, rms_norm, rms_norm_branch, short_convolution

__all__ = ["gated_norm", "rms_norm", "rms_norm_branch", "short_convolution"]
