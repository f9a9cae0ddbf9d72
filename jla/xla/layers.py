"""The layers' norms, short convolution and products: the definitions, compiled by XLA."""

from jla.reference.layers import (
    gated_norm,
    product_of_few,
    products_of_few,
    rms_norm,
    rms_norm_branch,
    short_convolution,
    swiglu_of_few,
)

__all__ = [
    "gated_norm",
    "product_of_few",
    "products_of_few",
    "rms_norm",
    "rms_norm_branch",
    "short_convolution",
    "swiglu_of_few",
]
