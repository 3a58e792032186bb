"""MLX affine and floating-point groups, as stock mlx-lm loads them."""
