"""The pure heart: mathematics on tensors. Touches no files, terminals, clocks or global random state.

pq/          plain product quantization of one tensor
ecpq/        entropy-constrained PQ: codebooks that tensors share, entropy-coded assignments
trellis/     trellis-coded quantization
entropy/     entropy coders, and the lossless coding of what is kept
kernels/     the one hot primitive of every kind of PQ, for CPUs and GPUs
native/      the loops in C, and how Python calls them
lookahead    bounded work on threads, results in order
metrics      how far a decoded weight is from the original
rtn          four-bit integers in groups: the common form that sizes are compared with
"""
