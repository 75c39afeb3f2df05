"""Looking blocks up: forward what decoding gives, backward the mean over a centroid's members."""

import pytest
import torch

from pqcli.core.pq import packing, pq
from pqcli.core.pq.lookup import Lookup, mean_by_centroid, unpacked


@pytest.mark.parametrize("bits", range(17))
@pytest.mark.parametrize("n", [0, 1, 7, 8, 41])
def test_assignments_are_unpacked_as_numpy_does_it(bits, n):
    wanted = torch.randint(0, 1 << bits, (n,), generator=torch.Generator().manual_seed(bits))
    packed = torch.from_numpy(packing.pack(wanted.numpy(), bits))
    assert torch.equal(unpacked(packed, n, bits).long(), wanted)


def test_other_bytes_than_the_assignments_take_are_an_error():
    with pytest.raises(ValueError, match="3 bytes where 9 assignments of 3 bits take 4"):
        unpacked(torch.zeros(3, dtype=torch.uint8), 9, 3)


def drawn(k, block_size, rows, columns, seed=0):
    """A codebook, assignments that leave the last centroid without members, and both as `Lookup` takes them."""
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(k, block_size, generator=generator)
    n = rows * -(-columns // block_size)
    assignments = torch.randint(0, max(k - 1, 1), (n,), generator=generator, dtype=torch.int32)
    packed = torch.from_numpy(packing.pack(assignments.numpy(), packing.n_bits(k)))
    return codebook, assignments, packed


def zeros_of(mask, form):
    """Zeros in one of the two forms."""
    if form == "bits":
        return torch.from_numpy(packing.pack(mask.flatten().numpy().astype("int32"), 1))
    return mask.flatten().nonzero()[:, 0].int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("k", "block_size", "columns"), [(1, 4, 8), (5, 4, 8), (16, 3, 8), (300, 8, 20)])
def test_a_weight_is_what_decoding_gives_bit_for_bit(k, block_size, columns, dtype):
    codebook, assignments, packed = drawn(k, block_size, 6, columns)
    codebook[0, 0] = 6e4 if dtype == torch.float16 else 1e30
    stored = torch.float16 if k == 5 else torch.float32
    lookup = Lookup(6, columns, packing.n_bits(k), stored, dtype)
    encoded = pq.PQTensor((6, columns), dtype, (6, columns), codebook.to(stored), assignments)
    found = lookup.matrix(codebook, packed, None, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, pq.decode(encoded))


def slow_gradient(grad, assignments, k, block_size, mask):
    """Element by element, by the definition."""
    rows, columns = grad.shape
    per_row = -(-columns // block_size)
    members = [[[] for _ in range(block_size)] for _ in range(k)]
    for row in range(rows):
        for column in range(columns):
            if not mask[row, column]:
                block, value = divmod(column, block_size)
                members[int(assignments[row * per_row + block])][value].append(float(grad[row, column]))
    return torch.tensor([[sum(found) / len(found) if found else 0.0 for found in values] for values in members])


@pytest.mark.parametrize("form", ["none", "bits", "places"])
@pytest.mark.parametrize(("k", "block_size", "columns"), [(1, 4, 8), (4, 4, 8), (4, 3, 8), (40, 2, 5)])
def test_the_gradient_of_a_centroid_is_the_mean_over_its_members(k, block_size, columns, form):
    codebook, assignments, packed = drawn(k, block_size, 7, columns)
    mask = torch.rand(7, columns, generator=torch.Generator().manual_seed(1)) < 0.4
    mask = mask if form != "none" else torch.zeros_like(mask)
    zeros = None if form == "none" else zeros_of(mask, form)
    codebook.requires_grad_()
    lookup = Lookup(7, columns, packing.n_bits(k), torch.float16, torch.float32)
    weight = lookup.matrix(codebook, packed, zeros, torch.float32)
    assert torch.equal(weight == 0, mask)
    upstream = torch.randn(7, columns, generator=torch.Generator().manual_seed(2))
    (weight * upstream).sum().backward()
    assert torch.allclose(codebook.grad, slow_gradient(upstream, assignments, k, block_size, mask), atol=1e-6)
    assert k == 1 or not codebook.grad[-1].any()


def test_without_zeros_and_padding_it_is_the_sum_over_the_number_of_blocks():
    """Against automatic differentiation of the look-up itself, whose gradient is the sum."""
    codebook, assignments, _ = drawn(6, 4, 9, 12)
    codebook = codebook.double().requires_grad_()
    looked_up = codebook[assignments.long()].view(9, 12)
    upstream = torch.randn(9, 12, generator=torch.Generator().manual_seed(3)).double()
    (total,) = torch.autograd.grad((looked_up * upstream).sum(), codebook)
    n_blocks = torch.bincount(assignments, minlength=6).clamp(min=1)
    found = mean_by_centroid(upstream, assignments, codebook.shape)
    assert torch.allclose(found.double(), total / n_blocks[:, None], atol=1e-6)


def test_steps_smaller_than_the_rounding_of_a_file_add_up():
    """The codebook in float32 is what is trained; float16 is only what is seen of it."""
    _, assignments, packed = drawn(4, 4, 3, 8)
    codebook = torch.ones(4, 4, requires_grad=True)
    lookup = Lookup(3, 8, 2, torch.float16, torch.float16)
    for _ in range(20):
        (gradient,) = torch.autograd.grad(lookup.matrix(codebook, packed, None, torch.float16).float().sum(), codebook)
        with torch.no_grad():
            codebook.sub_(gradient, alpha=1e-4)
    assert bool((codebook[assignments.unique()] < 0.9985).all())
    assert bool((lookup.matrix(codebook, packed, None, torch.float16) < 1).all())
