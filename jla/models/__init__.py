"""Whole language models (flax.linen): a config, its blocks, and generating from them."""

from jla.models.attention import Attention
from jla.models.config import Config, Layer
from jla.models.experts import Experts
from jla.models.generate import empty_cache, generate, stack, unstack
from jla.models.language_model import LanguageModel, kept
from jla.models.latent_attention import LatentAttention
from jla.models.mlp import SwiGLU

__all__ = [
    "Attention",
    "Config",
    "Experts",
    "LanguageModel",
    "LatentAttention",
    "Layer",
    "SwiGLU",
    "empty_cache",
    "generate",
    "kept",
    "stack",
    "unstack",
]
