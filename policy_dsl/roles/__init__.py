"""Tensor names as roles: the tables of the architectures, and a checkpoint read by them."""
