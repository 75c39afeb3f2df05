"""Entropy coders, from bit fields to mixed predictions, and the lossless coding of kept tensors.

rangecoder    the adaptive binary range coder
mixing        one probability from several, for the range coder
ans           asymmetric numeral systems with static tables (ans_loops: its loops in C)
bitfields     variable-length integers and Rice codes
lossless      tensors that are kept, bit for bit (lossless_loops: its loop in C)
"""
