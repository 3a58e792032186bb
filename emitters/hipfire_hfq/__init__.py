"""HFQ containers for hipfire: one file, experts in blocks of 256 rotated values."""
