"""Tensor in, tensor out: the mathematics, without files and without names."""
