"""Statistics against a slow, obvious computation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pqcli
from pqcli.errors import StatsError
from pqcli.stats import merge
from pqcli.stats import open as open_stats


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def second(rows):
    rows = rows.double()
    return (rows.T @ rows / len(rows)).numpy()


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert abs(a - b).max() <= tolerance * abs(b).max()


def test_a_linear_layer_gets_the_second_moment_and_the_mean_of_its_input():
    model, x = nn.Sequential(nn.Linear(6, 4)), randn(5, 7, 6)
    with pqcli.collect(model) as stats:
        model(x)
        model(x[:3] + 1)
    seen = torch.cat([x.flatten(0, 1), x[:3].flatten(0, 1) + 1])
    m = stats.moments("0.weight")
    assert (m.n_samples, m.axis, m.gradient) == (56, 1, None)
    close(m.second, second(seen))
    close(m.mean, seen.double().mean(0).numpy())
    close(m.diagonal, second(seen).diagonal())


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (9,)),
        (nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=(2, 1)), (8, 7)),
        (nn.Conv2d(4, 6, 3, padding="same"), (5, 5)),
        (nn.Conv2d(4, 8, 3, groups=2), (6, 6)),
        (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (3, 4, 3)),
    ],
)
def test_patches_times_the_flattened_weight_are_the_convolutions_output(layer, size):
    """The energy of the output, computed from the moments, is that of the real output."""
    x = randn(3, layer.in_channels, *size)
    layer.bias = None
    with pqcli.collect(nn.Sequential(layer)) as stats:
        output = layer(x)
    m = stats.moments("0.weight")
    W = layer.weight.detach().double().flatten(1)
    H = torch.from_numpy(m.second).double()
    if layer.groups == 1:
        assert m.n_samples == output[:, 0].numel()
        close(
            ((W @ H) * W).sum(1).numpy(), output.detach().double().square().transpose(0, 1).flatten(1).mean(1).numpy()
        )
    else:
        patches = F.unfold(x, 3).view(3, 2, 18, -1).permute(0, 3, 1, 2).reshape(-1, 18)
        close(m.second, second(patches))


def test_a_transposed_convolution_has_the_moments_of_its_channels_for_its_rows():
    model, x = nn.Sequential(nn.ConvTranspose2d(4, 5, 2, stride=2)), randn(3, 4, 5, 5)
    with pqcli.collect(model) as stats:
        model(x)
    m = stats.moments("0.weight")
    assert m.axis == 0
    close(m.second, second(x.permute(0, 2, 3, 1).reshape(-1, 4)))


def test_an_embedding_counts_its_rows_without_padding():
    state = {"table": randn(10, 4)}
    ids, mask = torch.tensor([[1, 2, 2], [3, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    with pqcli.collect(state) as stats, stats.masked(mask):
        F.embedding(ids, state["table"])
    m = stats.moments("table")
    assert m.n_lookups == 4
    assert m.row_frequency.tolist() == [0, 0.25, 0.5, 0.25, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("bias", [True, False])
def test_multi_head_attention_is_seen_inside_and_computes_the_same(bias):
    model = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
    x, y = randn(3, 5, 8), randn(3, 4, 8, seed=1)
    before = model(x, y, y)[0]
    with pqcli.collect(model) as stats:
        after = model(x, y, y)[0]
    assert torch.allclose(before, after, atol=1e-6)
    close(
        stats.moments("in_proj_weight").second, second(torch.cat([x.flatten(0, 1), y.flatten(0, 1), y.flatten(0, 1)]))
    )
    assert stats.moments("out_proj.weight").n_samples == 15


def test_gradients_are_those_of_the_loss_and_no_parameter_takes_any():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    x = randn(20, 6)
    with pqcli.collect(model, gradients=True, seed=5) as stats:
        stats.backward(model(x))
    assert all(p.grad is None for p in model.parameters())
    direction = torch.randn(20, 3, generator=torch.Generator().manual_seed(5))
    hidden = model[0](x).detach().requires_grad_()
    (model[2](hidden.tanh()) * direction).sum().backward()
    assert stats.moments("0.weight").gradient == pytest.approx(hidden.grad.square().mean().item(), rel=1e-5)
    assert stats.moments("2.weight").gradient == pytest.approx(direction.square().mean().item(), rel=1e-5)


def test_an_exception_leaves_no_hook_behind():
    model = nn.Linear(3, 3)
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError), pqcli.collect(model):
        raise ZeroDivisionError
    assert not model._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert not torch.overrides._get_current_function_mode_stack()


def test_layers_that_share_an_input_are_stored_once(tmp_path):
    model, x = nn.ModuleDict({name: nn.Linear(6, 4) for name in "qkv"}), randn(9, 6)
    with pqcli.collect(model) as stats:
        for _ in range(3):
            x = x + 1
            for layer in model.values():
                layer(x)
    stats.save(tmp_path / "a.stats.safetensors")
    back = open_stats(tmp_path / "a.stats.safetensors")
    assert back.n_sites == 1
    assert back.moments("k.weight").n_samples == 27


def test_a_weight_that_stops_sharing_goes_on_alone():
    model, x, y = nn.ModuleDict({name: nn.Linear(6, 4) for name in "ab"}), randn(9, 6), randn(9, 6, seed=1)
    with pqcli.collect(model) as stats:
        model["a"](x), model["b"](x)
        model["a"](y), model["b"](y + 1)
    close(stats.moments("a.weight").second, second(torch.cat([x, y])))
    assert stats.statistics().n_sites == 2


def test_a_file_gives_back_what_was_collected_and_two_add_up_to_one_run(tmp_path):
    model, x = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4)), torch.arange(36).view(4, 9) % 9
    files = []
    for part in (x[:2], x[2:], x):
        with pqcli.collect(model, gradients=True) as stats:
            stats.backward(model(part))
        files.append(tmp_path / f"{len(files)}.stats.safetensors")
        stats.save(files[-1], dtype="float32")
    merged, whole = merge([open_stats(file) for file in files[:2]]), open_stats(files[2])
    a, b = merged.moments("1.weight"), whole.moments("1.weight")
    assert a.n_samples == b.n_samples
    close(a.second, b.second)
    close(a.halves, b.halves)
    close(b.second, stats.moments("1.weight").second)
    assert (merged.moments("0.weight").row_frequency == whole.moments("0.weight").row_frequency).all()


def test_wide_inputs_keep_blocks(tmp_path):
    model, x = nn.Sequential(nn.Linear(10, 2)), randn(30, 10)
    with pqcli.collect(model, full_width=8, block_width=4) as stats:
        model(x)
    stats.save(tmp_path / "s", dtype="float32")
    m = open_stats(tmp_path / "s").moments("0.weight")
    assert m.second is None
    assert [len(block) for block in m.blocks] == [4, 4, 2]
    close(m.blocks[2], second(x)[8:, 8:])


def test_noise_is_high_for_independent_columns_and_low_for_dependent_ones():
    model, x = nn.Sequential(nn.Linear(20, 2)), randn(2000, 20)
    with pqcli.collect(model) as stats:
        model(x)
    assert stats.moments("0.weight").noise > 0.6
    with pqcli.collect(model) as stats:
        model(x @ randn(20, 20, seed=3))
    assert stats.moments("0.weight").noise < 0.1


def test_a_file_that_is_cut_short_or_none_is_named(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4))
    with pqcli.collect(model) as stats:
        model(randn(8, 6))
    stats.save(tmp_path / "s")
    data = (tmp_path / "s").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-5])
    (tmp_path / "counts").write_bytes(
        data.replace(b"[4.0, 4.0]", b"[4.0, -4.]").replace(b'"columns\\": 6', b'"columns\\": 7')
    )
    for name in ("cut", "counts", "nowhere"):
        with pytest.raises(StatsError, match=name):
            open_stats(tmp_path / name).moments("0.weight")
