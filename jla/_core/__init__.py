"""What the parts of jla share. It knows no implementation and imports jax only."""
