"""A third codec, as small as one can be: the sign of every weight, and one scale a tensor."""

import numpy as np

from pqcli.codecs.base import Decoder, Draft, Session, StreamCodec, StreamPiece, Streams, as_matrix
from pqcli.codecs.rate.survey import survey_weights


class SignJob:
    """One tensor: its mean magnitude in float32, then a bit a weight."""

    def __init__(self, index, record, weights):
        self.index, self.record, self.weights = index, record, weights
        self.name, self.n_weights, self.n_bytes = record.name, record.info.numel, 4 * record.info.numel

    def run(self, device):
        matrix = as_matrix(self.weights.coded(self.name), self.record)
        scale = np.float32(np.mean(np.abs(matrix))).tobytes()
        return StreamPiece(self.index, scale + np.packbits(matrix.reshape(-1) < 0).tobytes())


class SignSession(Session):
    def __init__(self, survey, weights):
        self.survey, self.weights = survey, weights

    def jobs(self, level):
        return [SignJob(i, record, self.weights) for i, record in enumerate(self.survey.records)]

    def finish(self, level, pieces):
        streams = [piece.data for piece in sorted(pieces, key=lambda piece: piece.index)]
        names = [record.name for record in self.survey.records]
        return Streams(b"", streams, {name: len(data) for name, data in zip(names, streams, strict=True)})

    def draft(self, level):
        return Draft(sum(4 + -(-record.info.numel // 8) for record in self.survey.records), 0.36)


class SignDecoder(Decoder):
    def __init__(self, streams, sources):
        self.streams, self.sources = streams.streams, {source.key: (i, source) for i, source in enumerate(sources)}

    def matrix(self, key):
        i, source = self.sources[key]
        data = self.streams[i]
        if len(data) != 4 + -(-source.n_weights // 8):
            raise ValueError(f"{len(data)} bytes for {source.n_weights} signs")
        signs = 1 - 2 * np.unpackbits(np.frombuffer(data[4:], np.uint8), count=source.n_weights).astype(np.float32)
        return (signs * np.frombuffer(data[:4], "<f4")).reshape(source.rows, source.columns)

    def entropy(self, key):
        return float(self.sources[key][1].n_weights)


class SignCodec(StreamCodec):
    def survey(self, entries, weights, run):
        return survey_weights(entries, weights, run)

    def fit(self, survey, weights, recipe, first_level, tell):
        return SignSession(survey, weights)

    def decoder(self, streams, sources, *, counting=False):
        return SignDecoder(streams, sources)


CODEC = SignCodec()
