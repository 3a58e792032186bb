"""JANGTQ bundles: experts rotated and coded by a Lloyd-Max codebook, the rest 8-bit affine."""
