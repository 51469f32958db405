"""Equation 1: tokens to their experts and back, on a CPU, a GPU and over processes."""
