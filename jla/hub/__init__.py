"""Checkpoints of flash-linear-attention and of Kimi Linear, in and out, to the same logits."""

from jla.hub._configs import model, read_config
from jla.hub._layers import layer_params, layer_state
from jla.hub._loading import load
from jla.hub._saving import save
from jla.models import generate

__all__ = ["generate", "layer_params", "layer_state", "load", "model", "read_config", "save"]
