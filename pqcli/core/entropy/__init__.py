"""Entropy coders: range coder, mixing, ANS, bit fields, lossless coding of kept tensors."""
