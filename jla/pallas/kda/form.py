"""What is known of a call of KDA's kernels where they are traced, and what their passes keep."""

from typing import NamedTuple

# What the forward pass keeps for the backward pass, with the names that checkpoint policies use.
# TP is T in whole chunks.
KEPT = {
    "kda_query": "B TP HV K",
    "kda_read": "B TP HV K",
    "kda_write": "B TP HV K",
    "kda_decay": "B HV N K",
    "kda_scores": "B HV N C D",
    "kda_inverse": "B HV N C D",
    "kda_key_scores": "B HV N C D",
    "kda_levels": "B HV N",
    "kda_states": "B HV N V K",
}


class Form(NamedTuple):
    """What is known where kernels are traced.

    Attributes:
      scale: of the queries.
      bounded: what the decays are made of: log decays if None, else the arguments of
        `gate.decay_operand`, and whether they have a bound.
      exact: whether decays may be too strong for `spans`.
      normalize: whether the kernels divide q and k by their lengths.
      gates: whether `prepare` makes the decays of `source`.
    """

    scale: float
    bounded: bool | None = None
    exact: bool = True
    normalize: bool = False
    gates: bool = False

    @property
    def kept(self):
        """What the forward pass keeps, as `KEPT`."""
        return KEPT | (dict(kda_norms="B HV two TP") if self.normalize else {})
