"""A second reader of `trellis` files and their kin (rows, mixing, `kept-coded`, `checksum`), after FORMAT.md alone.

Slow, plain Python. It shares no code with the package, so that whoever follows the specification gets the same tensors.
"""

import hashlib
import json
import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import zstandard
from safetensors.numpy import load_file

import pqcli
from pqcli.codecs.trellis import session
from pqcli.core.trellis.feedback import Feedback, RowSteps
from pqcli.core.trellis.params import TrellisParams
from pqcli.core.trellis.rotation import Rotations
from pqcli.core.trellis.sources import Source
from pqcli.core.trellis.trellis import decode, encode

f32, f64 = np.float32, np.float64
RATE = [655360 // (10 * n + 16) for n in range(501)]
POLYNOMIALS = {
    4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24), 128: (0o235, 0o126),
    256: (0o515, 0o362), 512: (0o1315, 0o406), 1024: (0o2513, 0o1606), 2048: (0o5303, 0o2232), 1: (0, 0),
}  # fmt: skip


class Range:
    """FORMAT.md, "Range coder"."""

    def __init__(self, data: bytes) -> None:
        self.data, self.span, self.code, self.pos = data, 1 << 48, 0, 0
        for _ in range(6):
            self.code = self.code << 8 | self.byte()

    def byte(self) -> int:
        self.pos += 1
        return self.data[self.pos - 1] if self.pos <= len(self.data) else 0

    def bit(self, p: int = 32768) -> int:
        bound = (self.span >> 16) * p
        bit = int(self.code < bound)
        if bit:
            self.span = bound
        else:
            self.span -= bound
            self.code -= bound
        if self.span < 1 << 32:
            self.span <<= 16
            self.code = (self.code << 8 | self.byte()) << 8 | self.byte()
        return bit

    def adaptive(self, model: list[int]) -> int:
        bit = self.bit(model[0])
        adapt(model, bit)
        return bit

    def raw(self, n: int, value: int = 0) -> int:
        for _ in range(n):
            value = value << 1 | self.bit()
        return value

    def integer(self, models: list[list[int]]) -> int:
        b = 0
        while b < 32 and self.adaptive(models[b]):
            b += 1
        return self.raw(b, 1) - 1

    def signed(self, models: list[list[int]]) -> int:
        u = self.integer(models)
        return -(u + 1) // 2 if u % 2 else u // 2

    def end(self) -> None:
        assert self.pos - 6 <= len(self.data) <= self.pos


def adapt(model: list[int], bit: int) -> None:
    p, n = model
    p = p + ((65535 - p) * RATE[n] >> 16) if bit else p - ((p - 1) * RATE[n] >> 16)
    model[:] = [min(max(p, 32), 65504), min(n + 1, 500)]


class Models:
    """Fresh models of one byte string."""

    def __init__(self) -> None:
        self.B = [[32768, 0] for _ in range(4)]
        self.I0, self.I1, self.I2 = ([[32768, 0] for _ in range(33)] for _ in range(3))
        self.L = [[[first_level(c, s, i) for i in range(15)] for s in range(3)] for c in range(80)]


def first_level(c: int, s: int, i: int) -> list[int]:
    h = max(0, (c - 38) >> 2)
    o, q = divmod(c, 4)
    m = (1.0905, 1.2968, 1.5422, 1.8340)[q] * 2.0 ** (o - 6 - h)
    t = m / (m + 1)
    chance = t * t
    if i == 0 and s < 2:
        chance = t * (0.4 + 0.6 * t) if s == 0 else t * (1.15 - 0.15 * t)
    return [min(max(math.floor(chance * 65536), 200), 65300), 4]


def quarter(v: int) -> int:
    v = max(v, 64)
    o = v.bit_length() - 1
    f = (v << 8) >> o
    return min(4 * (o - 6) + (f >= 304) + (f >= 362) + (f >= 430), 79)


def read_levels(coder, models, shape, labels, row_labels, run, period, scale0, n_states):
    """FORMAT.md, "Levels": levels and the set each was read from."""
    rows, columns = shape
    h0, h1 = POLYNOMIALS[n_states]
    levels, sets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    mean, cc = [0] * columns, [2] * columns
    pm, pc = [scale0] * period, [1] * period
    state = 0
    for r in range(rows):
        if r % run == 0:
            state = 0
        met = expected = 8 * scale0
        for j in range(columns):
            if j and j % 4096 == 0:
                state = 0
            if r == 0:
                mean[j] = pm[j % period]
            c = quarter(mean[j] * met // expected)
            h = max(0, (c - 38) >> 2)
            parity = state & 1
            which = parity + (parity & (labels[j] | row_labels[r]))
            n = 0
            while n < 15 and coder.adaptive(models.L[c][which][n]):
                n += 1
            magnitude = read_rest(coder, n, h, parity, which)
            level = -magnitude if magnitude and coder.bit() else magnitude
            if n_states > 1:
                state = following(level, parity, which, state, h0, h1)
            x = min(magnitude, 32768) << 12
            met = max(met + x - (met >> 8), 256)
            expected = max(expected + mean[j] - (expected >> 8), 256)
            mean[j] += (x - mean[j]) * RATE[cc[j]] >> 16
            cc[j] = min(cc[j] + 1, 250)
            p = j % period
            pm[p] += (x - pm[p]) * RATE[pc[p]] >> 16
            pc[p] = min(pc[p] + 1, 500)
            levels[r, j], sets[r, j] = level, which
    return levels, sets


def read_rest(coder, n, h, parity, which):
    """The magnitude whose unary part was n."""
    if n == 15:
        b = 0
        while coder.bit():
            b += 1
        n += coder.raw(b, 1) - 1
    n = coder.raw(h, n)
    return 2 * n if parity == 0 else 2 * n + 1 if which == 2 else max(2 * n - 1, 0)


def following(level, parity, which, state, h0, h1):
    """The trellis's next state."""
    if parity == 0:
        z = (abs(level) >> 1) & 1
    elif which == 2:
        z = ((level - 1) >> 1) & 1
    else:
        z = int(abs(level) % 4 == 1)
    return (state >> 1) ^ (h0 >> 1 if state & 1 else 0) ^ (h1 >> 1 if z else 0)


def lg(x: int) -> int:
    o = x.bit_length() - 1
    return 256 * o + LOG[((x << 8) >> o) - 256]


def power(e: int) -> int:
    """floor(2^(16 + (e mod 256) / 256)) << (e >> 8)."""
    return POWER[e % 256] << (e >> 8)


def stretch(p: int) -> int:
    q = 16 * (p >> 4) + 8
    return LARGE_LOG[q] - LARGE_LOG[65536 - q]


def squash(d: int) -> int:
    if d < 0:
        return 65536 - squash(-1 - d)
    t = power(4 * (d >> 2) + 2)
    return min((t << 16) // (t + 65536), 65504)


def floor_log(x: int, below: int = 1) -> int:
    """floor(256 log2(x / below)), by the definition: the largest l with 2^(l/256) <= x / below."""
    low = math.floor(256 * math.log2(x / below)) - 1
    return max(k for k in range(max(low, 0), low + 3) if below**256 << k <= x**256)


def floor_power(i: int) -> int:
    """floor(2^(16 + i/256))."""
    about = math.floor(2 ** (16 + i / 256))
    return max(k for k in (about - 1, about, about + 1) if k**256 <= 1 << (16 * 256 + i))


LOG = [floor_log(256 + i, 256) for i in range(256)]
POWER = [floor_power(i) for i in range(256)]
LARGE_LOG = {q: floor_log(q) for q in range(8, 65536, 16)}


def clamp(x: int, low: int, high: int) -> int:
    return min(max(x, low), high)


class Mixing:
    """FORMAT.md, "State of a stream"."""

    def __init__(self) -> None:
        self.A = [[[first_level(c, s, i) for i in range(15)] for s in range(3)] for c in range(80)]
        self.G = [[[[first_level(c, s, i) for i in range(15)] for s in range(3)] for _ in range(8)] for c in range(80)]
        self.F = [
            [[[first_level(2 * k + 1, s, i) for i in range(15)] for s in range(3)] for _ in range(32)]
            for k in range(40)
        ]
        self.S = [[[32768, 20] for _ in range(4)] for _ in range(16)]
        self.N, self.E = ([[[32768, 20] for _ in range(2)] for _ in range(27)] for _ in range(2))
        self.W = [[[22000] * 3 for _ in range(15)] for _ in range(3)]
        self.V = [22000] * 3
        self.shares = [[[65536 if i == 0 else 0] * 10 for i in range(6)] for _ in range(2)]
        self.taps = [[0] * 15 for _ in range(2)]
        self.seen = 0


def mixed(coder, a, b, c, w):
    s = [stretch(model[0]) for model in (a, b, c)]
    chance = squash(clamp(sum(x * y for x, y in zip(w, s, strict=True)) >> 16, -3072, 3071))
    bit = coder.bit(chance)
    for i in range(3):
        w[i] += ((bit * 65536 - chance) * 220 * s[i] + (1 << 23)) >> 24
    for model in (a, b, c):
        adapt(model, bit)
    return bit


def read_mixed_levels(coder, state, shape, labels, row_labels, run, period, scale0, n_states):
    """FORMAT.md, "Mixed levels": levels, the set each was read from, and guesses."""
    rows, columns = shape
    h0, h1 = POLYNOMIALS[n_states]
    levels, sets, guesses = (np.zeros(shape, np.int64) for _ in range(3))
    mean, cc = [0] * columns, [2] * columns
    pm, pc = [scale0] * period, [1] * period
    q = int(period > 1)
    shares, taps = state.shares[q], state.taps[q]
    known = {}

    def at(row, column):
        return known.get((row, column), 0) if 0 <= column < columns else 0

    above = [(scale0, scale0)] * (columns + 2)
    node = 0
    for r in range(rows):
        if r % run == 0:
            node = 0
        rate = 131 + 2622 * 40000 // (40000 + state.seen)
        state.seen = min(state.seen + columns, 1 << 40)
        met = expected = fmet = fexpected = 8 * scale0
        u, v = [scale0] * period, [scale0] * period
        here = [(scale0, scale0)] * (columns + 2)
        for j in range(columns):
            if j and j % 4096 == 0:
                node = 0
            p = j % period
            if r == 0:
                mean[j] = pm[p]
            m = max(mean[j], 16)
            a, b = (above[j][i] + 2 * above[j + 1][i] + above[j + 2][i] for i in range(2))
            x, y = here[j]
            clue = [
                lg(met) - lg(expected),
                lg(fmet + fexpected) - lg(2 * fexpected),
                lg(max(pm[p], 16)) - lg(m),
                lg(u[p] + v[p]) - lg(2 * v[p]),
                lg(2 * a + b) - lg(3 * b),
                lg(x + y) - lg(2 * y),
            ]
            row_age, column_age = min(r.bit_length(), 9), min(j.bit_length(), 9)
            ages = column_age, column_age, row_age, column_age, row_age, 0
            plain = clamp(lg(m) + clue[0], 1536, 6912)
            clue = [clamp(value, -512, 512) for value in clue]
            scale = lg(m) + sum(shares[i][ages[i]] * clue[i] >> 16 for i in range(6))
            scale = clamp(scale, 1536, 6912)
            near = [at(r, j - 8 + i) for i in range(8)] + [at(r - 1, j - 1 + i) for i in range(3)] + [at(r - 2, j)]
            if period > 1:
                near += [at(r, j - period - 1 + i) for i in range(3)]
            guess = clamp(sum(t * k for t, k in zip(taps, near, strict=False)), -127 * 65536, 127 * 65536)
            energy = 10 + sum(k * k for k in near)
            sure = lg((abs(guess) >> 4) + 1) - scale
            c = min((scale - 1536) >> 6, 79)
            h = max(0, (c - 38) >> 2)
            parity = node & 1
            which = parity + (parity & (labels[j] | row_labels[r]))
            first = state.A[min((plain - 1504) >> 6, 79)][which]
            second = state.G[c][clamp((sure >> 7) + 5, 0, 7)][which]
            third = state.F[min((scale - 1504) >> 7, 39)][p if period <= 32 else 0][which]
            n = 0
            while n < 15 and mixed(coder, first[n], second[n], third[n], state.W[which][n]):
                n += 1
            level = read_rest(coder, n, h, parity, which)
            if level:
                t = -1 if guess < 0 else 1
                three = [
                    sum(w * (t * int(np.sign(k)) + 1) for w, k in zip((9, 3, 1), places, strict=True))
                    for places in (
                        (at(r, j - 1), at(r, j - period) if q else at(r, j - 2), at(r - 1, j)),
                        (at(r, j - 2), at(r - 1, j - 1), at(r - 1, j + 1)),
                    )
                ]
                by_guess = state.S[clamp((3 * sure >> 8) + 10, 0, 15)][min(level, 4) - 1]
                differs = mixed(coder, by_guess, state.N[three[0]][q], state.E[three[1]][q], state.V)
                level = -t * level if differs else t * level
            node = following(level, parity, which, node, h0, h1)
            known[r, j] = clamp(level, -127, 127)
            g = (known[r, j] * 65536 - guess) * 2621 // energy
            for i, k in enumerate(near):
                taps[i] += (g * k) >> 16
            x, y = min(abs(level), 32768) << 12, power(scale) >> 16
            g = min(((x - y) << 16) // (y + 4096), 196608) * rate
            for i in range(6):
                shares[i][ages[i]] = clamp(shares[i][ages[i]] + (g * clue[i] >> 24), 0, 65536)
            met = max(met + x - (met >> 8), 256)
            expected = max(expected + m - (expected >> 8), 256)
            fmet = max(fmet + x - (fmet >> 4), 256)
            fexpected = max(fexpected + m - (fexpected >> 4), 256)
            u[p] += (x - u[p]) >> 2
            v[p] = max(v[p] + ((m - v[p]) >> 2), 1)
            here[j + 1] = x, m
            mean[j] += (x - mean[j]) * RATE[cc[j]] >> 16
            cc[j] = min(cc[j] + 1, 120)
            pm[p] += (x - pm[p]) * RATE[pc[p]] >> 16
            pc[p] = min(pc[p] + 1, 500)
            levels[r, j], sets[r, j], guesses[r, j] = level, which, guess
        above = here
    return levels, sets, guesses


def reflections(basis):
    """FORMAT.md, "Weights": normals and coefficients of a rotation, its vectors as rows of `basis` (f64)."""
    k, size = basis.shape
    v = [list(map(float, row)) for row in basis]
    normals, coefficients = np.zeros((k, size), f32), np.zeros(k, f32)
    for i in range(k):
        total = 0.0
        for j in range(i, size):
            total += v[i][j] * v[i][j]
        if total == 0:
            continue
        v[i][i] += -math.sqrt(total) if v[i][i] < 0 else math.sqrt(total)
        largest = abs(v[i][i])
        for j in range(i, size):
            v[i][j] /= largest
            normals[i, j] = f32(v[i][j])
        normal = list(map(float, normals[i]))
        total = 0.0
        for j in range(i, size):
            total += normal[j] * normal[j]
        c = 2 / total
        coefficients[i] = f32(c)
        for w in v[i + 1 :]:
            dot = 0.0
            for j in range(i, size):
                dot += normal[j] * w[j]
            dot *= c
            for j in range(i, size):
                w[j] -= dot * normal[j]
    return normals, coefficients


def undo(rotation, matrix):
    normals, coefficients = rotation
    k, size = normals.shape
    vectors = matrix.reshape(-1, size).copy()
    for i in reversed(range(k)):
        d = np.zeros(len(vectors), f32)
        for j in range(i, size):
            d += normals[i, j] * vectors[:, j]
        d *= coefficients[i]
        for j in range(i, size):
            vectors[:, j] -= normals[i, j] * d
    return vectors.reshape(matrix.shape)


def read_side(data, sources, n_streams):
    step = np.frombuffer(data[:4], "<f4")[0]
    n_states, stream_weights = 1 << (data[4] & 63), 1 << data[5]
    coder, models = Range(data[6:]), Models()
    fields, e = [], 0
    for _ in sources:
        e += coder.signed(models.I0)
        fields.append((e, coder.integer(models.I1), coder.adaptive(models.B[0])))
    rotations = []
    for index in range(max((rotation for _, rotation, _ in fields), default=0)):
        i = next(i for i, (_, rotation, _) in enumerate(fields) if rotation == index + 1)
        (rows, columns, kernel), transposed = sources[i], fields[i][2]
        size = kernel if kernel != 1 and not transposed else rows if transposed else columns
        k, precision, precisions = coder.integer(models.I1), 0, []
        for _ in range(k):
            precision += coder.signed(models.I1)
            precisions.append(precision)
        levels, _ = read_levels(coder, models, (k, size), [1] * size, [0] * k, k, 1, 16384, 1)
        rotations.append(reflections((levels >> 1) * 2.0 ** -np.array(precisions, f64)[:, None]))
    is_mixed = [bool(data[4] & 128 and coder.adaptive(models.B[1])) for _ in range(n_streams)]
    kinds = [coder.integer(models.I2) if data[4] & 64 else 0 for _ in sources]
    crossing = [
        read_exponents(coder, models, rows if fields[i][2] else columns) if kinds[i] == 3 else None
        for i, (rows, columns, _) in enumerate(sources)
    ]
    coder.end()
    return step, n_states, stream_weights, fields, rotations, is_mixed, kinds, crossing


def layout(shapes, stream_weights):
    """Streams as lists of (source, first row, last row + 1)."""
    streams, filling, filled = [], [], 0
    for i, (rows, columns) in enumerate(shapes):
        weights = rows * columns
        if not weights:
            continue
        if filling and (weights > stream_weights or filled + weights > stream_weights):
            streams.append(filling)
            filling, filled = [], 0
        if weights > stream_weights:
            height = -(-rows // min(rows, -(-weights // stream_weights)))
            streams += [[(i, r, min(r + height, rows))] for r in range(0, rows, height)]
        else:
            filling.append((i, 0, rows))
            filled += weights
    return streams + ([filling] if filling else [])


def read_exponents(coder, models, n):
    grain, mean, exponents = coder.integer(models.I2), 0, []
    for _ in range(n):
        q = (mean >> 8) + coder.signed(models.I2)
        exponents.append(q << grain)
        mean += ((q << 8) + 128 - mean) >> 3
    return exponents


def read_rows(coder, models, kind, n_rows):
    """FORMAT.md, "Feature trellis-rows": exponents and labels of a segment's rows."""
    exponents, labels = [0] * n_rows, [0] * n_rows
    if kind:
        exponents = read_exponents(coder, models, n_rows)
    if kind >= 2:
        bit = 0
        for r in range(n_rows):
            bit = labels[r] = coder.adaptive(models.B[2 + bit])
    return exponents, labels


def read_stream(data, is_mixed, segments, shapes, periods, n_states, kinds):
    coder, models, mixing = Range(data), Models(), Mixing()
    points = np.zeros((3, 8), f32)
    for s, magnitudes in enumerate(((2, 4, 6), (1, 3, 5, 7), (1, 3, 5, 7))):
        for magnitude in magnitudes:
            points[s, magnitude] = f32(magnitude + coder.signed(models.I1) / 256)
    g = 0
    for source, start, stop in segments:
        columns, period = shapes[source][1], periods[source]
        g += coder.signed(models.I0)
        groups, bit, bits = period if period > 1 else -(-columns // 16), 0, []
        for _ in range(groups):
            bit = coder.adaptive(models.B[bit])
            bits.append(bit)
        labels = [bits[j % period if period > 1 else j // 16] for j in range(columns)]
        o, q = divmod(g, 4)
        scale0 = ((4096, 4871, 5793, 6889)[q] << 6) >> (6 - o) if o < 6 else 4096 << o
        exponents, row_labels = read_rows(coder, models, kinds[source], stop - start)
        run = 1 if kinds[source] >= 2 else max(1, 2048 // columns)
        matrix = (stop - start, columns), labels, row_labels, run, period, scale0, n_states
        if is_mixed:
            levels, sets, guesses = read_mixed_levels(coder, mixing, *matrix)
            lean = coder.integer(models.I1)
        else:
            levels, sets = read_levels(coder, models, *matrix)
        size = np.abs(levels)
        values = np.where(size < 8, points[sets, np.minimum(size, 7)], size.astype(f32))
        values = np.where(levels < 0, -values, values).astype(f32)
        if is_mixed:
            values += f32(lean / 64) * np.clip((guesses / 65536).astype(f32) - values, f32(-1), f32(1))
        yield source, start, values, exponents
    coder.end()


def read_trellis(data, about, sources):
    ends = np.cumsum([about["shared"], *about["streams"]])
    side = read_side(data[: ends[0]], sources, len(about["streams"]))
    step, n_states, stream_weights, fields, rotations, is_mixed, kinds, crossing = side
    shapes = [(c, r) if flipped else (r, c) for (r, c, _), (_, _, flipped) in zip(sources, fields, strict=True)]
    periods = [1 if flipped else kernel for (_, _, kernel), (_, _, flipped) in zip(sources, fields, strict=True)]
    matrices = [np.zeros(shape, f32) for shape in shapes]
    exponents = [[0] * shape[0] for shape in shapes]
    streams = layout(shapes, stream_weights)
    assert len(streams) == len(about["streams"])
    for i, segments in enumerate(streams):
        stream = data[ends[i] : ends[i + 1]]
        for source, start, values, own in read_stream(stream, is_mixed[i], segments, shapes, periods, n_states, kinds):
            matrices[source][start : start + len(values)] = values
            exponents[source][start : start + len(values)] = own
    for i, (e, rotation, flipped) in enumerate(fields):
        matrix = undo(rotations[rotation - 1], matrices[i]) if rotation else matrices[i]
        rows = [eighths(eighths(step, e), own) if kinds[i] else eighths(step, e) for own in exponents[i]]
        matrix = matrix * np.array(rows, f32).reshape(-1, 1)
        if kinds[i] == 3:
            matrix = matrix * np.array([eighths(1, own) for own in crossing[i]], f32)
        matrices[i] = matrix.T if flipped else matrix
    return matrices


def eighths(step, e):
    """A step and a number of eighths of octaves."""
    return f32(f64(step) * f64(f32(2.0 ** (e % 8 / 8))) * 2.0 ** (e // 8))


def read_bundle(data, tensors):
    """FORMAT.md, "Feature kept-coded": the bytes of tensors given as (item size, elements)."""
    found, at = {}, 0
    for size in (1, 2, 4, 8, 16):
        counts = [n for item, n in tensors if item == size and n]
        if not counts:
            continue
        total, starts = sum(counts), set(np.cumsum([0, *counts[:-1]]).tolist())
        way, at = data[at], at + 1
        words = [0] * total
        for plane in range(size):
            method, at = data[at], at + 1
            length = {0: total, 3: 1}.get(method)
            if length is None:
                length, shift = 0, 0
                while True:
                    length |= (data[at] & 127) << shift
                    shift, at = shift + 7, at + 1
                    if data[at - 1] < 128:
                        break
            body, at = data[at : at + length], at + length
            plain = {
                0: lambda body: body,
                1: zstandard.ZstdDecompressor().decompress,
                2: lambda body: read_plane(body, total, starts, plane),  # noqa: B023 - called at once
                3: lambda body: body * total,  # noqa: B023
            }[method](body)
            words = [word << 8 | byte for word, byte in zip(words, plain, strict=True)]
        bits = 8 * size
        if way == 1:
            low = (1 << (bits - 9)) - 1
            words = [((w >> (bits - 9)) & 1) << (bits - 1) | (w >> (bits - 8)) << (bits - 9) | (w & low) for w in words]
        elif way == 2:
            for i in range(total):
                words[i] = words[i] if i in starts else (words[i] + words[i - 1]) % (1 << bits)
        found[size] = b"".join(word.to_bytes(size, "little") for word in words)
    assert at == len(data)
    pieces = []
    for size, n in tensors:
        pieces.append(found.get(size, b"")[: size * n])
        found[size] = found.get(size, b"")[size * n :]
    return pieces


def read_plane(body, total, starts, plane):
    coder, result = Range(body), bytearray()
    shared = [[32768, 24 if plane and node > 1 else 0] for node in range(256)]
    for i in range(total):
        if i in starts:
            local = [[32768, 0] for _ in range(256)]
        node = 1
        while node < 256:
            a = 4 + 3 * min(shared[node][1], 2)
            b = 0 if plane and node > 1 else 3 * min(local[node][1], 60)
            bit = coder.bit((a * shared[node][0] + b * local[node][0]) // (a + b))
            adapt(shared[node], bit)
            adapt(local[node], bit)
            node = 2 * node + bit
        result.append(node - 256)
    coder.end()
    return bytes(result)


def check_checksum(data, *, has_checksum):
    """FORMAT.md, "Feature checksum": every byte is hashed, those of the head apart."""
    n = int.from_bytes(data[:8], "little")
    entries = {name: about["data_offsets"] for name, about in json.loads(data[8 : 8 + n]).items() if name[0] != "_"}
    assert ("pqcli.checksum" in entries) == has_checksum
    start, stop = entries.pop("pqcli.checksum", (0, 0))
    stored = data[8 + n + start : 8 + n + stop]
    head, rest = hashlib.blake2b(data[: 8 + n], digest_size=8), hashlib.blake2b(digest_size=8)
    covered = 0
    for name, (start, stop) in sorted(entries.items(), key=lambda entry: entry[1]):
        is_head = name in {"pqcli.manifest", "pqcli.hashes", "pqcli.errors", "pqcli.entropies", "pqcli.damage"}
        (head if is_head else rest).update(data[8 + n + start : 8 + n + stop])
        covered += stop - start
    if has_checksum:
        assert stored == head.digest() + rest.digest()
        assert 8 + n + covered + 16 == len(data)


def read_file(path):
    """All tensors of a file with the features `trellis`, `trellis-mixing`, `kept-coded` and `checksum`, by name."""
    entries = load_file(path)
    manifest = json.loads(zlib.decompress(entries["pqcli.manifest"].tobytes()))
    records = manifest["tensors"]
    assert set(manifest["features"]) <= {"trellis", "trellis-mixing", "kept-coded", "checksum"}
    check_checksum(path.read_bytes(), has_checksum="checksum" in manifest["features"])
    coded = [record for record in records if record["action"] == "trellis"]
    sources = []
    for record in coded:
        rows = record.get("rows") or record["shape"][0]
        sources.append((rows, math.prod(record["shape"]) // rows, record.get("kernel", 1)))
    matrices = read_trellis(entries["pqcli.coded"].tobytes(), manifest["coded"], sources)
    found = {
        record["name"]: torch.from_numpy(matrix.reshape(record["shape"])).to(getattr(torch, record["dtype"]))
        for record, matrix in zip(coded, matrices, strict=True)
    }
    kept = [record for record in records if record["action"] == "keep"]
    spec = {r["name"]: (getattr(torch, r["dtype"]).itemsize, math.prod(r["shape"])) for r in kept}
    small = [r["name"] for r in kept if math.prod(spec[r["name"]]) <= 65536]
    data = dict(zip(small, read_bundle(entries["pqcli.kept"].tobytes(), [spec[n] for n in small]), strict=True))
    for record in kept:
        name = record["name"]
        if name not in data:
            data[name] = read_bundle(entries[f"keep/{name}"].tobytes(), [spec[name]])[0]
        words = torch.frombuffer(bytearray(data[name]), dtype=torch.uint8)
        found[name] = words.view(getattr(torch, record["dtype"])).reshape(record["shape"])
    return found


ALWAYS, NEVER = -1.0, 1.0


@pytest.mark.parametrize("gain", [ALWAYS, NEVER])
def test_the_second_reader_reads_rows_with_steps_of_their_own(gain):
    rng = np.random.default_rng(0)
    weights = {
        "fed": rng.standard_normal((50, 40)).astype(f32),
        "rows": rng.standard_normal((90, 20)).astype(f32),
        "plain": rng.standard_normal((30, 30)).astype(f32),
        "long": rng.standard_normal((4200, 2)).astype(f32),
    }
    inputs = {key: rng.standard_normal((400, weights[key].shape[1])) for key in ("fed", "long")}
    moments = {key: (x.T @ x / len(x)).astype(f32) for key, x in inputs.items()}
    second_order = {
        key: Feedback(np.exp2(rng.normal(size=len(h))), 0, rng.permutation(len(h)), h, 0.1)
        for key, h in moments.items()
    }
    second_order["rows"] = RowSteps(np.exp2(rng.normal(size=90)), 2)
    second_order["long"] = replace(second_order["long"], column_steps=np.exp2(rng.normal(size=4200)))
    sources = [Source(key, matrix.shape, *matrix.shape) for key, matrix in weights.items()]
    params = TrellisParams(0.4, n_states=16, stream_weights=1 << 10, mixing_gain=gain)
    encoded = encode(sources, weights.__getitem__, params, Rotations(), None, second_order=second_order)
    about = {"shared": len(encoded.side), "streams": [len(stream) for stream in encoded.streams]}
    data = encoded.side + b"".join(encoded.streams)
    found = read_trellis(data, about, [(s.rows, s.columns, s.kernel) for s in sources])
    for (key, expected), matrix in zip(decode(encoded, sources), found, strict=True):
        assert np.array_equal(expected, matrix), key


@pytest.mark.parametrize(
    ("quality", "effort", "gain"), [("small", 8, NEVER), ("small", 8, ALWAYS), ("near-lossless", 256, ALWAYS)]
)
def test_a_reader_written_from_the_specification_gets_the_same_tensors(tmp_path, monkeypatch, quality, effort, gain):
    monkeypatch.setattr(session, "MIXING_GAINS", ((math.inf, gain),))
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator)

    smooth = gaussian(24, 16, 1, 1) * (1 + 0.1 * gaussian(24, 16, 3, 3))
    state = {
        "smooth.weight": smooth,
        "low_rank.weight": gaussian(96, 3) @ gaussian(3, 40) + 0.05 * gaussian(96, 40),
        "flat.weight": gaussian(40, 3) @ gaussian(3, 96) + 0.05 * gaussian(40, 96),
        "wide.weight": gaussian(6, 4, 7, 7),
        "half.weight": (50 * gaussian(20, 30)).half(),
        "outlier.weight": gaussian(16, 20) * torch.where(torch.arange(320) == 7, 1e5, 1.0).reshape(16, 20),
        "zero.weight": torch.zeros(16, 16),
        "long.weight": gaussian(2, 4500),
        "norm.weight": 1 + 0.01 * gaussian(300),
        "norm.bias": gaussian(300),
        "brain.bias": gaussian(100).bfloat16(),
        "steps": torch.arange(17_000),
        "mask": torch.ones(9, dtype=torch.bool),
    }
    torch.save(state, tmp_path / "model.pt")
    path = tmp_path / "model.pq.safetensors"
    pqcli.compress(tmp_path / "model.pt", path, pqcli.Recipe(codec="trellis", quality=quality, effort=effort))
    with pqcli.open(path) as container:
        assert ("trellis-mixing" in container.manifest.features) == (gain == ALWAYS)
    expected, found = pqcli.load(path), read_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), found[name].reshape(-1).view(torch.uint8)), name
