"""Entropy-constrained PQ: codebooks that all tensors share, learned under a price for bits, and coded assignments.

ecpq       the verbs: draw a sample, fit a model, estimate, encode, decode
payload    the bytes of one tensor, and decoding them: numpy alone
model      what the tensors of a file share: codebooks of magnitudes and the probabilities of their entries
fit        learning a codebook by EM
lattice    where EM starts: points of the best lattices
search     the E-step, and the scales of rows and columns
loops      the loops in C
"""
