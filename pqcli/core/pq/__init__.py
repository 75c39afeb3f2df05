"""Plain product quantization of one tensor: blocks, EM, packed assignments."""
