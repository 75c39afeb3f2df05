"""Compress trained checkpoints by product quantization, and get the same checkpoint back."""
