"""Trellis-coded quantization with rotations and adaptive arithmetic coding.

trellis          many tensors as streams, and back
sources          what is known of a tensor before a weight is read
params           what the encoder is asked, and the trellises there are
streams          how tensors are cut into streams
side             the side information: steps, rotations, which streams are mixed
stream           one stream, coded and decoded
stream_fields    the fields of a stream
slots            where the models of a range coder lie
search           the encoder's search for levels and reconstruction points
viterbi          one pass of it: the cheapest walk through the trellis (viterbi_loops: its loops, in C)
rotation         rotations fitted to weights (rotation_loops: their fixed-order arithmetic)
loops            the coder of levels, and what decoding undoes, in C
mixing_loops     the second coder of levels, which predicts them
"""
