"""The primitive on a CPU: one pass over the vectors, no score ever in memory.

How a core is kept busy with multiply-adds
- Vectors run along the SIMD lanes. A block of vectors is transposed into a scratch buffer; then 3 registers hold
  coordinate t of 48 vectors (with 16 lanes), and each coordinate of a centroid is broadcast to all lanes. A tile of 4
  centroids x 3 registers makes 12 independent sums, enough to hide the latency of a multiply-add.
- Only the maximum is kept in the inner loop: one `max` for d multiply-adds. Which centroid it was is found later: the
  loop remembers for each vector which *chunk* of 16 centroids (as many as there are lanes) held the best score, a
  compare and two selects per chunk, and at the end that one chunk is scored again, with centroids along the lanes.
  The same multiply-adds in the same order give the same bits, so the first lane that equals the maximum is the answer,
  and ties go to the smallest index.
- The vector is in cache when its winner is known, so that is when it is added to the sums.
- Centroids are visited in parts that fit in the L1 cache, for a block of vectors at a time.

What binds: the d multiply-adds of a score share two ports with 1 max and 3/16 of bookkeeping, so d / (d + 1.2)
of the multiply-add peak is the roof: 87 % at d = 8, 77 % at d = 4.

One answer: the vectors are cut into slabs by n, k and d alone, each slab has its own sums, and these are added in
order: the number of threads does not change a bit of the result. (The width of the registers changes only the last bits
of the score.)
"""

from __future__ import annotations

import _thread
import ctypes
import functools
import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.core.compiled.ir import Code, Compiled, compile_function, host_lanes
from pqcli.core.kernels import Pass

_GROUP = 3  # registers of vectors in a tile
_TILE = 4  # centroids in a tile
_BLOCK_GROUPS = 16  # groups of vectors transposed at a time: 24 KiB at d = 8
_CODEBOOK_TILE_BYTES = 24 << 10  # half of an L1 cache
_SLAB_UNIT = 768  # whole blocks, whatever the lanes
_SLAB_UNITS = 6
_MAX_SLABS = 256
_MAX_PARTIAL_BYTES = 64 << 20  # of all slabs' sums together

Array = NDArray[np.float32]
_ELEMENT = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "i16"}
_PTR, _INT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: tuple[tuple[str, Any], ...] = (
    ("vectors", _PTR),  # of the slab
    ("stride", _INT),  # elements from row to row
    ("n", _INT),  # vectors in the slab, at least 1
    ("rows", _PTR),  # codebook, padded to whole chunks: (n_chunks * lanes, d)
    ("bias", _PTR),  # (n_chunks * lanes,), the padding is -inf
    ("columns", _PTR),  # the same once more with centroids along the lanes: (n_chunks, d + 1, lanes), bias last
    ("n_chunks", _INT),
    ("tile", _INT),  # chunks visited for a block of vectors at a time
    ("k", _INT),
    ("scratch", _PTR),  # (groups, d, group) coordinates of a block of vectors
    ("best", _PTR),  # (groups * group,) float
    ("chunk", _PTR),  # (groups * group,) i32
    ("weights", _PTR),  # readable for a whole register, whatever n
    ("weight_step", _INT),  # 0: the same register of weights for all
    ("assignments", _PTR),
    ("accumulate", _INT),
    ("sums", _PTR),
    ("counts", _PTR),
    ("score", _PTR),  # (lanes,) double
)


def sweep(
    vectors: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor,
    weights: torch.Tensor | None,
    accumulate: bool,
    *,
    is_slab: bool = False,
) -> Pass:
    """`kernels.sweep` in main memory, on `torch.get_num_threads()` threads, for d small enough to unroll.

    With `is_slab` the vectors are one slab of some larger whole, and are not cut again.
    """
    n, (k, d) = len(vectors), codebook.shape
    lanes = host_lanes()
    rows, padded_bias, columns = layouts(codebook, bias, lanes)
    kernel = compiled(d, vectors.dtype, lanes)
    weight_step = 0 if weights is None else 1
    padded_weights = torch.ones(lanes) if weights is None else torch.cat([weights, torch.ones(lanes)])

    bounds = [0, n] if is_slab else slabs(n, k, d)
    n_slabs = len(bounds) - 1
    n_threads = max(1, min(torch.get_num_threads(), n_slabs))
    block = block_vectors(lanes)
    assignments = torch.empty(n, dtype=torch.int32)
    scratch = torch.empty(n_threads, block * (d + 2))
    partial = np.zeros((n_slabs, k * (d + 1) if accumulate else 0))
    scores = np.zeros((n_slabs, lanes))

    # Plain integers: a tensor's slice and its address cost a microsecond each, which a small sweep would feel.
    at_vectors, row_bytes = vectors.data_ptr(), vectors.stride(0) * vectors.itemsize
    at_weights, at_assignments = padded_weights.data_ptr(), assignments.data_ptr()
    at_partial, at_scores = partial.ctypes.data, scores.ctypes.data
    codebook_arguments = (
        rows.ctypes.data,
        padded_bias.ctypes.data,
        columns.ctypes.data,
        len(columns),
        chunks_in_cache(d, lanes),
        k,
    )
    queue = itertools.count()
    done: list[int] = []

    def work(thread: int) -> None:
        at_scratch = scratch[thread].data_ptr()
        scratch_arguments = at_scratch, at_scratch + 4 * block * d, at_scratch + 4 * block * (d + 1)
        while (slab := next(queue)) < n_slabs:
            start, stop = bounds[slab], bounds[slab + 1]
            at_sums = at_partial + 8 * slab * k * (d + 1)
            kernel.call(
                at_vectors + start * row_bytes, vectors.stride(0), stop - start, *codebook_arguments,
                *scratch_arguments, at_weights + 4 * start * weight_step, weight_step, at_assignments + 4 * start,
                accumulate, at_sums, at_sums + 8 * k * d, at_scores + 8 * slab * lanes,
            )  # fmt: skip
            done.append(slab)

    def help_out(thread: int, finished: _thread.LockType) -> None:
        try:
            work(thread)
        finally:
            finished.release()

    # Threads live for one sweep: 30 microseconds each, and no pool to share, to fork or to shut down. Not threading's:
    # its start() waits for the new thread to run, which just then begins to work: a millisecond when cores are busy.
    locks = [_thread.allocate_lock() for _ in range(1, n_threads)]
    for thread, finished in enumerate(locks, start=1):
        finished.acquire()
        _thread.start_new_thread(help_out, (thread, finished))
    work(0)
    for finished in locks:
        finished.acquire()
    if len(done) != n_slabs:
        raise RuntimeError(f"{n_slabs - len(done)} of {n_slabs} slabs were lost by a failing thread")

    score = float(scores.sum())
    if not accumulate:
        return Pass(assignments, None, None, score)
    total = torch.from_numpy(
        np.add.reduce(partial, axis=0)
    )  # one slab after the other; torch may split it over threads
    return Pass(assignments, total[: k * d].view(k, d), total[k * d :], score)


def chunks_in_cache(d: int, lanes: int) -> int:
    """Chunks of centroids that are visited for a block of vectors at a time."""
    return max(1, _CODEBOOK_TILE_BYTES // (4 * lanes * (d + 1)))


def block_vectors(lanes: int) -> int:
    """Vectors that are transposed at a time; scratch memory is for so many."""
    return _BLOCK_GROUPS * _GROUP * lanes


def slabs(n: int, k: int, d: int) -> list[int]:
    """Where slabs begin and end; a slab is one thread's turn, and owns k * (d + 1) sums."""
    most = min(_MAX_SLABS, max(8, _MAX_PARTIAL_BYTES // (8 * k * (d + 1))))
    n_units = -(-n // _SLAB_UNIT)
    n_slabs = min(most, -(-n_units // _SLAB_UNITS))
    return [min(n, n_units * slab // n_slabs * _SLAB_UNIT) for slab in range(n_slabs + 1)] if n_slabs else [0]


def layouts(codebook: torch.Tensor, bias: torch.Tensor, lanes: int) -> tuple[Array, Array, Array]:
    """rows, bias and columns, as described at _ARGUMENTS; in numpy, whose small operations take a third of the time."""
    k, d = codebook.shape
    n_chunks = -(-k // lanes)
    rows, padded_bias = codebook.contiguous().numpy(), bias.contiguous().numpy()
    if padding := n_chunks * lanes - k:
        rows = np.concatenate([rows, np.zeros((padding, d), np.float32)])
        padded_bias = np.concatenate([padded_bias, np.full(padding, -np.inf, np.float32)])
    columns = torch.empty(n_chunks, d + 1, lanes).numpy()  # torch's memory begins at a multiple of 64 bytes
    columns[:, :d] = rows.reshape(n_chunks, lanes, d).transpose(0, 2, 1)
    columns[:, d] = padded_bias.reshape(n_chunks, lanes)
    return rows, padded_bias, columns


@functools.cache
def compiled(d: int, dtype: torch.dtype, lanes: int) -> Compiled:
    """The machine code for block size d, made at its first use (about 0.1 s)."""
    return compile_function(_module(d, _ELEMENT[dtype], lanes), "sweep", [kind for _, kind in _ARGUMENTS])


def _module(d: int, element: str, lanes: int) -> str:
    """LLVM IR of the function that sweeps one slab, a block of vectors at a time."""
    code = Code(lanes)
    block = _BLOCK_GROUPS * _GROUP * lanes
    wanted = code.let("icmp ne i64 %accumulate, 0")
    with code.loop(0, "%n", block, [(f"<{lanes} x double>", "zeroinitializer")]) as blocks:
        left = code.let(f"sub i64 %n, {blocks.index}")
        n_block = code.least(left, str(block))
        vectors = code.at(element, "%vectors", code.let(f"mul i64 {blocks.index}, %stride"))
        _transpose(code, d, element, vectors, n_block)
        with code.loop(0, "%n_chunks", "%tile") as tiles:
            last = code.least(code.let(f"add i64 {tiles.index}, %tile"), "%n_chunks")
            _visit(code, d, n_block, tiles.index, last)
        _settle(code, d, n_block, blocks.index)
        blocks.following.append(_score(code, n_block, blocks.index, blocks.carried[0]))
        with code.when(wanted):
            _add_up(code, d, element, vectors, n_block, blocks.index)
    code.store(f"<{lanes} x double>", blocks.following[0], "%score", 8)
    code.do("ret void")

    arguments = ", ".join(f"{'ptr' if kind is _PTR else 'i64'} %{name}" for name, kind in _ARGUMENTS)
    floats = f"<{lanes} x float>"
    return "\n".join(
        [
            f"declare {floats} @llvm.fma.v{lanes}f32({floats}, {floats}, {floats})",
            "declare i64 @llvm.smin.i64(i64, i64)",
            f"declare i{lanes} @llvm.cttz.i{lanes}(i{lanes}, i1)",
            # Spilled vectors must not straddle cache lines: without alignstack the loop loses a fifth of its speed.
            f"define void @sweep({arguments}) alignstack(64) {{",
            *code.lines,
            "}\n",
        ]
    )


def _transpose(code: Code, d: int, element: str, vectors: str, n_block: str) -> None:
    """Fill scratch, best and chunk for a block; the last vector is repeated to fill its group."""
    lanes, group = code.lanes, _GROUP * code.lanes
    floats, ints = f"<{lanes} x float>", f"<{lanes} x i32>"
    last = code.let(f"sub i64 {n_block}, 1")
    lowest = code.splat("float", "0xFFF0000000000000")
    with code.loop(0, n_block, group) as groups:
        target = code.at("float", "%scratch", code.let(f"mul i64 {groups.index}, {d}"))
        with code.loop(0, group, lanes) as registers:
            first = code.let(f"add i64 {groups.index}, {registers.index}")
            code.store(floats, lowest, code.at("float", "%best", first), 64)
            code.store(ints, "zeroinitializer", code.at("i32", "%chunk", first), 64)
            members = [code.least(code.let(f"add i64 {first}, {lane}"), last) for lane in range(lanes)]
            rows = [code.at(element, vectors, code.let(f"mul i64 {member}, %stride")) for member in members]
            target_lanes = code.at("float", target, registers.index)
            t = 0
            for width in _powers_of_two(d, lanes):
                sources = [code.at(element, row, t) for row in rows]
                columns = _columns(code, element, sources, width)
                for offset, column in enumerate(columns):
                    code.store(floats, column, code.at("float", target_lanes, (t + offset) * group), 64)
                t += width


def _powers_of_two(d: int, largest: int) -> list[int]:
    """Widths that add up to d, wide ones first: 18 is 16 + 2."""
    widths = [largest] * (d // largest)
    while largest > 1:
        largest //= 2
        if d & largest:
            widths.append(largest)
    return widths


def _columns(code: Code, element: str, rows: list[str], width: int) -> list[str]:
    """The `width` columns, as registers, of as many rows as there are lanes; width is a power of two, at most that.

    Rows half the list apart are interleaved, again and again, until all are in one vector: that is the transpose.
    """
    kind = f"<{width} x {element}>"
    vectors = [[_as_float(code, element, code.load(kind, row, _bytes(element)), width)] for row in rows]
    while len(vectors) > 1:
        half = len(vectors) // 2
        low = range(width // 2) if width == code.lanes else range(width)
        high = range(width // 2, width) if width == code.lanes else range(0)
        vectors = [
            [
                code.shuffle(a, b, width, [index for i in part for index in (i, i + width)])
                for a, b in zip(first, second, strict=True)
                for part in (low, high)
                if part
            ]
            for first, second in zip(vectors[:half], vectors[half:], strict=True)
        ]
        width = min(2 * width, code.lanes)
    return vectors[0]


def _visit(code: Code, d: int, n_block: str, start: str, stop: str) -> None:
    """Update best and chunk of every vector in a block with the centroids of chunks start to stop."""
    lanes, group = code.lanes, _GROUP * code.lanes
    floats, ints = f"<{lanes} x float>", f"<{lanes} x i32>"
    lowest = code.splat("float", "0xFFF0000000000000")
    with code.loop(0, n_block, group) as groups:
        coordinates = code.at("float", "%scratch", code.let(f"mul i64 {groups.index}, {d}"))
        best_at = code.at("float", "%best", groups.index)
        chunk_at = code.at("i32", "%chunk", groups.index)
        bests = [code.at("float", best_at, p * lanes) for p in range(_GROUP)]
        chunks = [code.at("i32", chunk_at, p * lanes) for p in range(_GROUP)]
        state = [(floats, code.load(floats, at, 64)) for at in bests] + [
            (ints, code.load(ints, at, 64)) for at in chunks
        ]
        with code.loop(start, stop, 1, state) as visit:
            first = code.let(f"mul i64 {visit.index}, {lanes}")
            end = code.let(f"add i64 {first}, {lanes}")
            with code.loop(first, end, _TILE, [(floats, lowest)] * _GROUP) as tiles:
                tiles.following = _tile_maximum(code, d, coordinates, tiles.index, tiles.carried)
            name = code.splat("i32", code.let(f"trunc i64 {visit.index} to i32"))
            new = [
                code.select_greater(score, best, (floats, score, best), (ints, name, chunk))
                for score, best, chunk in zip(
                    tiles.following, visit.carried[:_GROUP], visit.carried[_GROUP:], strict=True
                )
            ]
            visit.following = [best for best, _ in new] + [chunk for _, chunk in new]
        for p in range(_GROUP):
            code.store(floats, visit.following[p], bests[p], 64)
            code.store(ints, visit.following[_GROUP + p], chunks[p], 64)


def _tile_maximum(code: Code, d: int, coordinates: str, first: str, maximum: list[str]) -> list[str]:
    """The maximum, per register of vectors, of what it was and the scores of _TILE centroids from `first` on."""
    floats = f"<{code.lanes} x float>"
    rows = code.at("float", "%rows", code.let(f"mul i64 {first}, {d}"))
    bias = code.at("float", "%bias", first)
    scores = [[code.splat("float", code.load("float", code.at("float", bias, j)))] * _GROUP for j in range(_TILE)]
    for t in range(d):
        x = [code.load(floats, code.at("float", coordinates, (t * _GROUP + p) * code.lanes), 64) for p in range(_GROUP)]
        for j in range(_TILE):
            c = code.splat("float", code.load("float", code.at("float", rows, j * d + t)))
            scores[j] = [code.fma(c, x[p], scores[j][p]) for p in range(_GROUP)]
    for j in range(_TILE):
        maximum = [
            code.select_greater(scores[j][p], maximum[p], (floats, scores[j][p], maximum[p]))[0] for p in range(_GROUP)
        ]
    return maximum


def _settle(code: Code, d: int, n_block: str, first: str) -> None:
    """Turn the chunk of every vector in a block into its assignment."""
    lanes, group = code.lanes, _GROUP * code.lanes
    floats = f"<{lanes} x float>"
    assignments = code.at("i32", "%assignments", first)
    largest = code.let("sub i64 %k, 1")
    with code.loop(0, n_block, group) as groups:
        scratch = code.at("float", "%scratch", code.let(f"mul i64 {groups.index}, {d}"))
        n_group = code.least(code.let(f"sub i64 {n_block}, {groups.index}"), str(group))
        with code.loop(0, n_group, 1) as members:
            i = code.let(f"add i64 {groups.index}, {members.index}")
            coordinates = code.at("float", scratch, members.index)
            chunk = code.let(f"zext i32 {code.load('i32', code.at('i32', '%chunk', i))} to i64")
            columns = code.at("float", "%columns", code.let(f"mul i64 {chunk}, {(d + 1) * lanes}"))
            score = code.load(floats, code.at("float", columns, d * lanes), 64)
            for t in range(d):
                x = code.splat("float", code.load("float", code.at("float", coordinates, t * group)))
                score = code.fma(code.load(floats, code.at("float", columns, t * lanes), 64), x, score)
            best = code.splat("float", code.load("float", code.at("float", "%best", i)))
            equal = code.let(f"fcmp oeq {floats} {score}, {best}")
            bits = code.let(f"bitcast <{lanes} x i1> {equal} to i{lanes}")
            lane = code.let(f"call i{lanes} @llvm.cttz.i{lanes}(i{lanes} {bits}, i1 false)")
            lane = code.let(f"zext i{lanes} {lane} to i64")
            index = code.let(f"add i64 {code.let(f'mul i64 {chunk}, {lanes}')}, {lane}")
            winner = code.least(index, largest)  # a NaN equals nothing: then any index will do, but it must be one
            code.store("i32", code.let(f"trunc i64 {winner} to i32"), code.at("i32", assignments, i))


def _score(code: Code, n_block: str, first: str, before: str) -> str:
    """The sum, lane by lane, of weight * best over all blocks so far."""
    lanes = code.lanes
    floats, doubles, longs = f"<{lanes} x float>", f"<{lanes} x double>", f"<{lanes} x i64>"
    weights = code.at("float", "%weights", code.let(f"mul i64 {first}, %weight_step"))
    ends = code.splat("i64", n_block)
    with code.loop(0, n_block, lanes, [(doubles, before)]) as registers:
        i = registers.index
        best = code.let(f"fpext {floats} {code.load(floats, code.at('float', '%best', i), 64)} to {doubles}")
        weight = code.load(floats, code.at("float", weights, code.let(f"mul i64 {i}, %weight_step")))
        product = code.let(f"fmul {doubles} {best}, {code.let(f'fpext {floats} {weight} to {doubles}')}")
        numbers = ", ".join(f"i64 {lane}" for lane in range(lanes))
        member = code.let(f"add {longs} {code.splat('i64', i)}, <{numbers}>")
        present = code.let(f"icmp slt {longs} {member}, {ends}")
        product = code.let(f"select <{lanes} x i1> {present}, {doubles} {product}, {doubles} zeroinitializer")
        registers.following.append(code.let(f"fadd {doubles} {registers.carried[0]}, {product}"))
    return registers.following[0]


def _add_up(code: Code, d: int, element: str, vectors: str, n_block: str, first: str) -> None:
    """Add the vectors of a block to the sums of their centroids.

    A loop of its own: the processor must know where the last vector went before it may load the next sum, and here
    it reads that from memory well ahead.
    """
    doubles = f"<{d} x double>"
    weights = code.at("float", "%weights", code.let(f"mul i64 {first}, %weight_step"))
    assignments = code.at("i32", "%assignments", first)
    with code.loop(0, n_block, 1) as members:
        i = members.index
        weight_at = code.at("float", weights, code.let(f"mul i64 {i}, %weight_step"))
        weight = code.let(f"fpext float {code.load('float', weight_at)} to double")
        winner = code.let(f"zext i32 {code.load('i32', code.at('i32', assignments, i))} to i64")
        count_at = code.at("double", "%counts", winner)
        code.store("double", code.let(f"fadd double {weight}, {code.load('double', count_at, 8)}"), count_at, 8)
        source = code.at(element, vectors, code.let(f"mul i64 {i}, %stride"))
        x = _as_float(code, element, code.load(f"<{d} x {element}>", source, _bytes(element)), d)
        x = code.let(f"fpext <{d} x float> {x} to {doubles}")
        x = code.let(f"fmul {doubles} {x}, {code.splat('double', weight, d)}")
        sum_at = code.at("double", "%sums", code.let(f"mul i64 {winner}, {d}"))
        code.store(doubles, code.let(f"fadd {doubles} {x}, {code.load(doubles, sum_at, 8)}"), sum_at, 8)


def _as_float(code: Code, element: str, value: str, n: int = 0) -> str:
    """An element (or a vector of n) as float32."""
    of, to, wide = (f"<{n} x {kind}>" if n else kind for kind in (element, "float", "i32"))
    if element == "half":
        return code.let(f"fpext {of} {value} to {to}")
    if element == "i16":  # bfloat16 is the upper half of a float32
        shift = code.splat("i32", "16", n) if n else "16"
        wider = code.let(f"shl {wide} {code.let(f'zext {of} {value} to {wide}')}, {shift}")
        return code.let(f"bitcast {wide} {wider} to {to}")
    return value


def _bytes(element: str) -> int:
    return 4 if element == "float" else 2
