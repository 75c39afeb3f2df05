"""Plain product quantization of one tensor: a codebook learned by EM, and an index into it for every block.

blocks     a weight cut into blocks, and put together again
em         the codebook that EM learns
packing    assignments to bits and back
pq         all of it for one tensor, and the class `PQ` with fairseq's interface
"""
