"""Trellis-coded quantization with rotations and adaptive arithmetic coding."""
