"""Matrix products, passes over rows and losses with hand-written gradients, and their kernels and loops."""
