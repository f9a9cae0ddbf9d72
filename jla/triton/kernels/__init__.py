"""The kernels: `@triton.jit` functions, without JAX. `jla.triton.<mechanism>` calls them."""
