"""Statistics against a slow, obvious computation."""

import math

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


def test_a_transposed_convolution_in_groups_keeps_the_moments_of_each_group():
    model, x = nn.Sequential(nn.ConvTranspose1d(6, 9, 2, groups=3)), randn(3, 6, 5)
    with pqcli.collect(model) as stats:
        model(x)
    m, flat = stats.moments("0.weight"), x.mT.reshape(-1, 6).numpy()
    assert (m.axis, m.block_width) == (0, 2)
    for group, block in enumerate(m.blocks):
        one = flat[:, 2 * group : 2 * group + 2]
        assert block == pytest.approx(one.T @ one / len(one), rel=1e-5)


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


# --- whatever calls a weight ------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """transformers' linear layer with its weight the other way round."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(randn(inputs, outputs, seed=7)), nn.Parameter(randn(outputs, seed=8))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Experts(nn.Module):
    """Every example goes to the expert of its number; one product takes the stack as it lies, one transposed."""

    def __init__(self, experts=3, width=6, hidden=5):
        super().__init__()
        self.up, self.down = (
            nn.Parameter(randn(experts, hidden, width, seed=1)),
            nn.Parameter(randn(experts, hidden, width, seed=2)),
        )

    def forward(self, x):
        between = [F.linear(x[e], self.up[e]) for e in range(len(self.up))]
        return torch.stack([torch.matmul(b, self.down[e]) for e, b in enumerate(between)])


class Masked(nn.Module):
    """A model that is told of padding, by keyword or by position."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x, attention_mask=None):
        return self.layer(x)


def test_a_transposed_linear_layer_is_known_by_its_rows():
    model, x = nn.Sequential(Conv1D(6, 4)), randn(5, 7, 6)
    with pqcli.collect(model, gradients=True) as stats:
        stats.backward(model(x))
    m = stats.moments("0.weight")
    assert (m.axis, m.n_samples, m.row_gradient.shape) == (0, 35, (4,))
    close(m.second, second(x.flatten(0, 1)))


def test_self_attention_of_torch_is_seen_whatever_fast_path_there_is():
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    x = randn(3, 5, 8)
    with torch.no_grad(), pqcli.collect(model) as stats:
        model(x)
    close(stats.moments("self_attn.in_proj_weight").second, second(x.flatten(0, 1)))
    assert set(stats.statistics().names) == {name for name, p in model.named_parameters() if p.dim() > 1}


def test_stacked_experts_are_pooled_or_told_apart():
    model, x = Experts(), randn(3, 7, 6)
    with pqcli.collect(model, gradients=True) as stats:
        stats.backward(model(x))
    pooled = stats.moments("up")
    assert (pooled.axis, stats.moments("down").axis) == (-1, -2)
    close(pooled.second, second(x.flatten(0, 1)))
    with pqcli.collect(model, gradients=True, split_stacks=True) as stats:
        stats.backward(model(x))
    for e in range(3):
        own, down = stats.moments(f"up[{e}]"), stats.moments(f"down[{e}]")
        close(own.second, second(x[e]))
        close(down.second, second(x[e] @ model.up[e].detach().T))
        assert (own.row_gradient.shape, down.row_gradient.shape) == ((5,), (6,))


def test_a_stack_that_is_told_apart_takes_no_more_than_one_whole_matrix():
    model, x = Experts(4, 200, 5), randn(4, 3, 200)
    with pqcli.collect(model, split_stacks=True, full_width=300) as stats:
        model(x)
    assert [len(block) for block in stats.moments("up[3]").blocks] == [112, 88]
    assert stats.moments("down[3]").second.shape == (5, 5)


@pytest.mark.parametrize("by_position", [True, False])
def test_padding_is_left_out_where_the_model_is_told_of_it(by_position):
    model, x = Masked(), randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with pqcli.collect(model, gradients=True) as stats:
        stats.backward(model(x, mask) if by_position else model(x, attention_mask=mask))
    m = stats.moments("layer.weight")
    assert m.n_samples == 8
    close(m.second, second(x[mask.bool()]))
    assert stats.statistics().weights["layer.weight"].n_gradient == 8


def test_labels_are_drawn_from_the_models_own_prediction():
    """The gradient is that of the loss with these labels; over many draws its mean square is the Fisher information."""
    model, x = nn.Sequential(nn.Linear(6, 3)), randn(4000, 6) / 2
    with pqcli.collect(model, gradients=True) as stats:
        stats.backward(logits=model(x))
    p = model(x).detach().double().softmax(-1)
    expected = (p * (1 - p)).mean(0)  # E (p - onehot)^2
    assert stats.moments("0.weight").row_gradient == pytest.approx(expected.numpy(), rel=0.1)
    with pqcli.collect(model, gradients=True) as again:
        again.backward(logits=model(x))
    assert (again.moments("0.weight").row_gradient == stats.moments("0.weight").row_gradient).all()


# --- what is left behind ----------------------------------------------------------------------------------------------


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        raise ZeroDivisionError(self.layer(x))


def test_a_model_that_fails_while_it_is_watched_is_free_afterwards():
    model = Failing()
    with pytest.raises(ZeroDivisionError), pqcli.collect(model):
        model(randn(2, 6))
    assert not model._forward_pre_hooks
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_model_is_bit_for_bit_what_it_was_and_computes_what_it_did():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), Conv1D(8, 5)
    ).eval()
    x = randn(2, 3, 6, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(x)
    random_state = torch.get_rng_state()
    with pqcli.collect(model, gradients=True) as stats:
        found = model(x)
        stats.backward(logits=found)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad and p._backward_hooks is None for p in model.parameters())


def test_half_precision_of_correlations_costs_less_than_a_twentieth_of_a_decibel(tmp_path):
    """Inputs with a few strong directions, as real ones have, and next to no shrinkage."""
    x = randn(4000, 64) * torch.logspace(0, -2, 64) @ randn(64, 64, seed=3) + 3 * randn(1, 64, seed=4)
    model = nn.Sequential(nn.Linear(64, 2))
    with pqcli.collect(model) as stats:
        model(x)
    believed = {}
    for dtype in ("float16", "float32"):
        stats.save(tmp_path / dtype, dtype=dtype)
        moments = torch.from_numpy(open_stats(tmp_path / dtype).moments("0.weight").second).double()
        believed[dtype] = 0.998 * moments + 0.002 * torch.diag(moments.diagonal())
    truth = believed["float32"]

    def log_damage(moments):
        """Of errors of covariance moments^-1, which take (1/2) log2 det moments bits, where the truth is another."""
        return torch.log(torch.trace(truth @ torch.linalg.inv(moments)) / 64) + torch.logdet(moments) / 64

    excess = float(log_damage(believed["float16"]) - log_damage(truth))
    assert 0 <= 10 * excess / math.log(10) < 0.05
