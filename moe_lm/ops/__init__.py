"""Products, passes over rows and losses with gradients of our own, and the kernels and loops that make them."""
