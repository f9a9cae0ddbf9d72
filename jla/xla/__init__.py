"""Chunkwise forms in plain jnp, for every device."""
