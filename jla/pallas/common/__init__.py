"""What the kernels of several mechanisms share."""
