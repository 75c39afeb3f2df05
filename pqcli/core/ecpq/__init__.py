"""Entropy-constrained PQ: codebooks learned under a price for bits."""
