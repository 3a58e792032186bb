"""Arithmetic of the formats: numba kernels over numpy arrays, arrays in, arrays out."""
