"""The layers' norms and short convolution: of the definitions XLA makes what there is to make."""

from jla.reference.layers import gated_norm, rms_norm, rms_norm_branch, short_convolution

__all__ = ["gated_norm", "rms_norm", "rms_norm_branch", "short_convolution"]
