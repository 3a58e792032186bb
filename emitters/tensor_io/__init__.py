"""Tensor files: rows read from shards, tensors written at their places."""
