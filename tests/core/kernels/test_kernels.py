"""Every kernel against a slow, obvious version of the primitive: the first j that maximises x_i . c_j + b_j."""

import os
import subprocess
import sys
import threading
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pqcli.core.kernels import Pass, sweep
from pqcli.core.kernels.repeated import Repeated
from pqcli.core.native import library
from pqcli.errors import UsageError

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the Triton kernel is first imported
BACKENDS = ["reference", "cpu"] + (["cuda"] if find_spec("triton") else [])
BLOCK_SIZES = [1, 2, 3, 4, 5, 8, 9, 16, 18, 32, 40]
EPSILON, TINY = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def compiled_backend(backend):
    """Not Triton's interpreter, which is slow, not made for threads, and stops at a NaN."""
    if backend == "cuda" and not torch.cuda.is_available():
        pytest.skip("the Triton kernel is only interpreted here")
    return backend


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(n, k, d, *, seed=0, scale=1.0, dtype=torch.float32):
    g = generator(seed)
    vectors = (torch.randn(n, d, generator=g) * scale).to(dtype)
    codebook = torch.randn(k, d, generator=g) * scale
    return vectors, codebook, -codebook.square().sum(1) / 2


def check(found: Pass, vectors, codebook, bias, weights=None, ulps=4):
    """What was found is right up to the rounding of float32 scores, and consistent with itself to float64."""
    n, (k, d) = len(vectors), codebook.shape
    x, c, b = vectors.double(), codebook.double(), bias.double()
    w = torch.ones(n, dtype=torch.float64) if weights is None else weights.double()
    scores = x @ c.T + b
    rounding = torch.zeros(n, dtype=torch.float64)
    if n:
        rounding = ulps * (d + 1) * (EPSILON * (x.abs() @ c.abs().T + b.abs()).amax(1) + TINY)

    assert found.assignments.dtype == torch.int32
    assert found.assignments.shape == (n,)
    winner = found.assignments.long()
    assert ((winner >= 0) & (winner < k)).all()
    chosen = scores.gather(1, winner[:, None])[:, 0]
    assert (scores.amax(1) - chosen <= rounding).all() if n else True

    sums, counts = torch.zeros(k, d, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    for i in range(n):
        sums[winner[i]] += w[i] * x[i]
        counts[winner[i]] += w[i]
    magnitude = float((w[:, None] * x).abs().sum()) + 1e-300
    torch.testing.assert_close(found.sums, sums, rtol=1e-12, atol=1e-13 * magnitude)
    torch.testing.assert_close(found.counts, counts, rtol=1e-12, atol=0.0)
    assert found.score == pytest.approx(float(w @ chosen), abs=float(w @ rounding) + 1e-300, rel=1e-12)


@pytest.mark.parametrize("d", BLOCK_SIZES)
def test_random_vectors_get_their_best_centroid(backend, d):
    vectors, codebook, bias = problem(997, 61, d)
    check(sweep(vectors, codebook, bias, backend=backend), vectors, codebook, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 3, 8, 9, 18])
def test_half_precision_is_read_as_such_and_computed_in_float32(backend, d, dtype):
    vectors, codebook, bias = problem(500, 33, d, dtype=dtype)
    check(sweep(vectors, codebook, bias, backend=backend), vectors, codebook, bias)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18])
def test_huge_and_tiny_values_are_as_good_as_others(backend, scale):
    vectors, codebook, bias = problem(300, 40, 4, scale=scale)
    check(sweep(vectors, codebook, bias, backend=backend), vectors, codebook, bias)


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 47, 48, 49, 257, 767, 768, 769, 4609])
def test_any_number_of_vectors(backend, n):
    vectors, codebook, bias = problem(n, 19, 3, seed=n)
    check(sweep(vectors, codebook, bias, backend=backend), vectors, codebook, bias)


@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 31, 32, 33, 1000])
def test_any_number_of_centroids(backend, k):
    vectors, codebook, bias = problem(200, k, 5, seed=k)
    check(sweep(vectors, codebook, bias, backend=backend), vectors, codebook, bias)


def test_a_codebook_larger_than_the_cache_is_visited_in_tiles(compiled_backend):
    vectors, codebook, bias = problem(50, 65_536, 8)
    check(sweep(vectors, codebook, bias, backend=compiled_backend), vectors, codebook, bias)


def test_weights_multiply_sums_counts_and_score(backend):
    vectors, codebook, bias = problem(1000, 21, 6)
    weights = torch.rand(1000, generator=generator(1)) * 3
    found = sweep(vectors, codebook, bias, weights=weights, backend=backend)
    check(found, vectors, codebook, bias, weights)
    assert torch.equal(found.assignments, sweep(vectors, codebook, bias, backend=backend).assignments)


def test_bias_decides_between_centroids(backend):
    vectors, codebook, _ = problem(400, 30, 4)
    bias = torch.randn(30, generator=generator(2)) * 2
    check(sweep(vectors, codebook, bias, backend=backend), vectors, codebook, bias)


def test_a_centroid_with_bias_minus_infinity_is_never_chosen(backend):
    vectors, codebook, bias = problem(300, 30, 4)
    bias[::2] = -torch.inf
    found = sweep(vectors, codebook, bias, backend=backend)
    assert (found.assignments % 2 == 1).all()


def test_rows_may_be_apart(backend):
    matrix = torch.randn(300, 40, generator=generator())
    _, codebook, bias = problem(1, 30, 8)
    view = matrix[:, 8:16]
    check(sweep(view, codebook, bias, backend=backend), view, codebook, bias)


def test_columns_may_be_apart(backend):
    matrix = torch.randn(8, 300, generator=generator())
    _, codebook, bias = problem(1, 30, 8)
    check(sweep(matrix.T, codebook, bias, backend=backend), matrix.T, codebook, bias)


@pytest.mark.parametrize("name", BACKENDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_ties_go_to_the_smallest_index(name, data):
    # Small integers: every score is exact, and many are equal.
    n, k, d = (data.draw(st.integers(1, largest)) for largest in (200, 80, 6))
    g = generator(data.draw(st.integers(0, 2**32)))
    vectors = torch.randint(-2, 3, (n, d), generator=g).float()
    codebook = torch.randint(-2, 3, (k, d), generator=g).float()
    bias = torch.randint(-2, 3, (k,), generator=g).float()
    scores = vectors @ codebook.T + bias
    first = (scores == scores.amax(1, keepdim=True)).int().argmax(1)
    found = sweep(vectors, codebook, bias, backend=name)
    assert found.assignments.tolist() == first.tolist()
    assert found.score == scores.amax(1).sum()


def test_among_duplicated_centroids_the_first_wins(backend):
    vectors, codebook, bias = problem(500, 20, 8)
    found = sweep(vectors, codebook.repeat(7, 1), bias.repeat(7), backend=backend)
    assert found.assignments.max() < 20


def test_not_accumulating_changes_nothing_else(backend):
    vectors, codebook, bias = problem(1000, 40, 8)
    with_sums = sweep(vectors, codebook, bias, backend=backend)
    without = sweep(vectors, codebook, bias, accumulate=False, backend=backend)
    assert without.sums is None
    assert without.counts is None
    assert torch.equal(with_sums.assignments, without.assignments)
    assert with_sums.score == without.score


def test_nan_gives_some_assignment_and_no_crash(compiled_backend):
    vectors, codebook, bias = problem(100, 7, 3)
    vectors[::3] = torch.nan
    vectors[1] = torch.inf
    found = sweep(vectors, codebook, bias, backend=compiled_backend)
    assert ((found.assignments >= 0) & (found.assignments < 7)).all()


def test_the_input_is_left_alone(backend):
    vectors, codebook, bias = problem(1000, 40, 8)
    before = vectors.clone(), codebook.clone(), bias.clone()
    sweep(vectors, codebook, bias, backend=backend)
    assert all(torch.equal(old, new) for old, new in zip(before, (vectors, codebook, bias), strict=True))


@pytest.mark.parametrize(("n", "k", "d"), [(30_000, 100, 8), (5_000, 3000, 3)])
def test_the_number_of_threads_does_not_change_a_bit(n, k, d):
    """Of the CPU kernel. The reference is torch's matrix product, which rounds by the number of threads."""
    vectors, codebook, bias = problem(n, k, d)
    weights = torch.rand(n, generator=generator(1))
    threads = torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 2, 3, 8):
            torch.set_num_threads(n_threads)
            results.append(sweep(vectors, codebook, bias, weights=weights, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0].assignments, other.assignments)
        assert torch.equal(results[0].sums, other.sums)
        assert torch.equal(results[0].counts, other.counts)
        assert results[0].score == other.score


def test_python_threads_may_sweep_at_once(compiled_backend):
    problems = [problem(5000 + 100 * i, 50, 2 + i % 3, seed=i) for i in range(6)]
    alone = [sweep(*p, backend=compiled_backend) for p in problems]
    together = [None] * len(problems)

    def work(i):
        together[i] = sweep(*problems[i], backend=compiled_backend)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.assignments, b.assignments)
        assert torch.equal(a.sums, b.sums)


def test_the_budget_changes_only_the_memory(backend):
    vectors, codebook, bias = problem(300, 50, 8)
    found = sweep(vectors, codebook, bias, budget_bytes=64, backend=backend)
    check(found, vectors, codebook, bias)


def test_an_unknown_backend_is_named():
    with pytest.raises(UsageError, match="unknown kernel backend 'abacus'; use auto, reference, cpu or cuda"):
        sweep(*problem(1, 1, 1), backend="abacus")


def test_small_jobs_do_not_pay_for_triton():
    code = (
        "import sys, torch; from pqcli.core.kernels import sweep\n"
        "sweep(torch.randn(1000, 8), torch.randn(16, 8), torch.randn(16))\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("level", library.levels()[:-1])
@pytest.mark.parametrize("d", [1, 2, 5, 7, 9, 11, 13, 16, 17, 24, 31, 38])
def test_narrow_registers_give_the_same_answer(level, d):
    vectors, codebook, bias = problem(1000, 200, d)
    weights = torch.rand(1000, generator=generator(1))
    wide = sweep(vectors, codebook, bias, weights=weights, backend="cpu")
    with library.at(level):
        narrow = sweep(vectors, codebook, bias, weights=weights, backend="cpu")
    assert torch.equal(wide.assignments, narrow.assignments)
    assert torch.equal(wide.sums, narrow.sums)
    assert wide.score == narrow.score


@pytest.mark.skipif(len(library.levels()) < 2, reason="every level of this processor multiplies and adds in one step")
def test_without_the_instruction_products_are_added_with_one_rounding():
    g = generator(3)
    x, c, b = (torch.randn(3000, generator=g) * 2.0 ** torch.randint(-40, 40, (3000,), generator=g) for _ in range(3))
    x[1000:], c[1000:] = (
        1 + torch.arange(2000) * 2**-23,
        1 + torch.arange(2000).flip(0) * 2**-23,
    )  # near halves of steps
    b[2000:] = torch.tensor([2.0**-24, -(2.0**-24)] * 500)
    b[:3] = torch.tensor([torch.inf, -torch.inf, 0])

    def scores() -> list[float]:
        problems = zip(x.view(-1, 1, 1), c.view(-1, 1, 1), b.view(-1, 1), strict=True)
        return [sweep(*problem, backend="cpu", accumulate=False).score for problem in problems]

    with library.at(library.levels()[0]):
        slow = scores()
    assert slow == scores()


def test_shapes_that_do_not_fit_are_refused(backend):
    vectors, codebook, bias = problem(10, 4, 3)
    with pytest.raises(UsageError, match=r"do not fit together: \[\(10, 3\), \(4, 3\), \(4,\), \(9,\)\]"):
        sweep(vectors, codebook, bias, weights=torch.ones(9), backend=backend)
    with pytest.raises(UsageError, match="do not fit together"):
        sweep(vectors[:, :2], codebook, bias, backend=backend)


def test_double_precision_is_converted_not_misread(backend):
    vectors, codebook, bias = problem(100, 12, 5)
    weights = torch.rand(100, generator=generator(1))
    narrow = sweep(vectors, codebook, bias, weights=weights, backend=backend)
    wide = sweep(vectors.double(), codebook.double(), bias.double(), weights=weights.double(), backend=backend)
    assert torch.equal(narrow.assignments, wide.assignments)
    assert torch.equal(narrow.sums, wide.sums)


@pytest.mark.parametrize(("n", "k"), [(20, 9), (700, 100)])
def test_a_codebook_laid_out_once_finds_the_same_again_and_again(n, k):
    """Whether few vectors or many are announced; and it adds up those that it is asked to count."""
    vectors, codebook, bias = problem(n, k, 4)
    repeated, counts = Repeated(codebook.numpy(), n), torch.zeros(k, dtype=torch.float64).numpy()
    for shift, counted in ((0.0, None), (0.5, counts), (0.25, counts)):
        biases = bias * (1 + shift)
        expected = sweep(vectors, codebook, biases)
        assert repeated.assigned(vectors.numpy(), biases.numpy(), counted).tolist() == expected.assignments.tolist()
    assert counts.sum() == 2 * n
    assert repeated.sums.sum(0) == pytest.approx(2 * vectors.double().sum(0).numpy(), abs=1e-3)
