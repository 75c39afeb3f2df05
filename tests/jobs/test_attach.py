"""`attach` and `export`: a model computes with what the file decodes to, trains its codebooks, and is written back."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import pqcli
from pqcli.container.folder import compressed_folder
from pqcli.errors import ContainerError, OutputError, UsageError
from tests.conftest import REPOSITORY
from tests.golden.make_plain_v1 import digests

GOLDEN = REPOSITORY / "tests" / "golden"
RECIPE = pqcli.Recipe(block_size=4, n_centroids=16, n_iter=2)


class Net(nn.Module):
    """One of each module that has a weight, tied weights, a row of zeros, and what is kept."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32, padding_idx=0)
        self.bag = nn.EmbeddingBag(50, 32)
        self.fc = nn.Linear(32, 48)
        self.norm = nn.BatchNorm1d(48)
        self.conv = nn.Conv1d(3, 20, 5)
        self.conv2 = nn.Conv2d(6, 12, 3, groups=2)
        self.conv3 = nn.Conv3d(3, 8, 2)
        self.up = nn.ConvTranspose2d(8, 6, 3)
        self.fp16 = nn.Linear(32, 20).half()
        self.own = nn.Parameter(torch.randn(16, 24))
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.arange(5))

    def forward(self, ids):
        return self.head(self.embed(ids) + self.bag(ids % 50)[:, None])


def compressed(model, path, recipe=RECIPE):
    torch.save(model.state_dict(), path.with_suffix("").with_suffix(".pt"))
    pqcli.compress(path.with_suffix("").with_suffix(".pt"), path, recipe)
    return path


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.fc.weight[torch.rand(48, 32) < 0.3] = 0
        model.own[torch.rand(16, 24) < 0.02] = 0
    return compressed(model, tmp_path / "m.pq.safetensors")


@pytest.fixture
def attached(file):
    torch.manual_seed(1)
    model = Net()
    pqcli.attach(model, file)
    return model


def value(model, name):
    """A tensor of the model by its ordinary name."""
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def same(model, file):
    decoded = pqcli.load(file)
    return all(
        value(model, name).dtype == tensor.dtype and torch.equal(value(model, name), tensor)
        for name, tensor in decoded.items()
    )


def train(model, steps=3):
    """Descend a little, by hand: importing an optimizer of torch's takes seconds."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for i in range(steps):
        ids = torch.arange(i, i + 20).view(4, 5) % 64
        loss = model(ids).square().mean() + model.fc.weight.square().mean() + model.norm.weight.sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(gradient, alpha=0.1)


def resident(model):
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


# --- attach -----------------------------------------------------------------------------------------------------------


def test_an_attached_model_computes_with_what_the_file_decodes_to(file):
    model = Net()
    found = pqcli.attach(model, file)
    assert same(model, file)
    assert (found.frozen, found.missing, found.unexpected) == ((), (), ())
    assert {"embed.weight", "head.weight", "own", "up.weight", "fp16.weight"} <= set(found.attached)
    assert isinstance(model.fc, nn.Linear)
    assert parametrize.is_parametrized(model.fc, "weight")
    assert model.fc.parametrizations.weight.original.dtype == torch.float32
    assert model.fp16.parametrizations.weight.original.dtype == torch.float32
    assert "fc.weight, 48x32, 4 bits an assignment" in repr(model)


def test_tied_weights_share_one_codebook_that_counts_once(attached):
    original = attached.embed.parametrizations.weight.original
    assert attached.head.parametrizations.weight.original is original
    assert sum(parameter is original for parameter in attached.parameters()) == 1
    assert torch.equal(attached.head.weight, attached.embed.weight)


def test_a_model_on_the_meta_device_gets_only_what_the_file_has(file):
    model = Net().to("meta")
    pqcli.attach(model, file, device="cpu")
    assert same(model, file)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_weights_follow_the_dtype_of_the_model_and_codebooks_stay_exact(file):
    model = Net()
    pqcli.attach(model, file, dtype=torch.bfloat16)
    assert torch.equal(model.fc.weight, pqcli.load(file)["fc.weight"].bfloat16())
    assert model.fc.parametrizations.weight.original.dtype == torch.float32
    assert model.norm.weight.dtype == torch.bfloat16
    other = Net()
    pqcli.attach(other, file)
    other.to(torch.float64)
    assert torch.equal(other.fp16.weight, pqcli.load(file)["fp16.weight"].double())


def test_memory_is_that_of_the_file(tmp_path):
    model = nn.Sequential(nn.Linear(512, 2048, bias=False))
    path = compressed(model, tmp_path / "m.pq.safetensors", pqcli.Recipe(block_size=8, n_iter=1))
    dense = resident(model)
    pqcli.attach(model, path)
    assert resident(model) < 1.1 * path.stat().st_size < dense / 25


def test_copies_and_state_dicts_of_an_attached_model_are_attached(attached, file):
    train(attached)
    twin = copy.deepcopy(attached)
    assert torch.equal(twin.fc.weight, attached.fc.weight)
    assert twin.head.parametrizations.weight.original is twin.embed.parametrizations.weight.original
    torch.save(attached.state_dict(), file.with_name("state.pt"))
    other = Net()
    pqcli.attach(other, file)
    other.load_state_dict(torch.load(file.with_name("state.pt"), weights_only=True))
    assert all(torch.equal(value(other, name), value(attached, name)) for name in pqcli.load(file))
    before = attached.fc.weight.clone()
    train(twin)
    assert torch.equal(attached.fc.weight, before)
    assert not torch.equal(twin.fc.weight, before)
    pqcli.export(other, file, file.with_name("of-state.pq.safetensors"))
    pqcli.export(attached, file, file.with_name("of-model.pq.safetensors"))
    assert (
        file.with_name("of-state.pq.safetensors").read_bytes() == file.with_name("of-model.pq.safetensors").read_bytes()
    )


def test_training_moves_codebooks_and_leaves_zeros_and_unused_centroids(attached, file):
    before = {name: tensor.clone() for name, tensor in pqcli.load(file).items()}
    codebook = attached.embed.parametrizations.weight.original.detach().clone()
    train(attached)
    assert not torch.equal(attached.embed.weight, before["embed.weight"])
    assert not attached.embed.weight[0].any()
    for name in ("fc.weight", "own"):
        assert torch.equal(value(attached, name) == 0, before[name] == 0)
    rows = (attached.embed.parametrizations.weight.original != codebook).any(1)
    assert rows.any()


def test_frozen_parameters_stay_frozen(file):
    model = Net()
    model.fc.weight.requires_grad_(False)
    pqcli.attach(model, file)
    assert not model.fc.parametrizations.weight.original.requires_grad
    assert model.embed.parametrizations.weight.original.requires_grad


def test_embeddings_with_sparse_gradients_and_layers_with_fast_paths_are_trained_too(tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(64, 32, sparse=True), layer)
    path = compressed(model, tmp_path / "m.pq.safetensors")
    dense = copy.deepcopy(model)
    pqcli.load_into(dense, path)
    assert "1.self_attn.in_proj_weight" in pqcli.attach(model, path).attached
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(model(ids), dense(ids))
    model(ids).square().sum().backward()
    dense(ids).square().sum().backward()
    assert model[0].parametrizations.weight.original.grad.any()
    assert model[1].self_attn.parametrizations.in_proj_weight.original.grad.any()
    assert torch.equal(model[1].norm1.weight.grad, dense[1].norm1.weight.grad)
    with torch.inference_mode():
        assert torch.equal(model.eval()(ids), dense.eval()(ids))


@pytest.mark.slow  # transformers takes seconds to import
def test_transformers_own_linear_layer_is_attached_as_any_other(tmp_path):
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(pytorch_utils.Conv1D(48, 32))
    path = compressed(model, tmp_path / "m.pq.safetensors")
    x = torch.randn(2, 32)
    dense = copy.deepcopy(model)
    pqcli.load_into(dense, path)
    pqcli.attach(model, path)
    assert torch.equal(model(x), dense(x))


def test_what_cannot_stay_compressed_is_dense_and_frozen(tmp_path):
    model = nn.ModuleDict({"rnn": nn.GRU(32, 32), "fc": nn.Linear(32, 32)})
    path = compressed(model, tmp_path / "m.pq.safetensors")
    found = pqcli.attach(model, path)
    assert found.attached == ("fc.weight",)
    assert found.frozen == ("rnn.weight_ih_l0", "rnn.weight_hh_l0")
    assert not model.rnn.weight_ih_l0.requires_grad
    assert model.rnn.bias_ih_l0.requires_grad
    assert same(model, path)
    with torch.no_grad():
        model.rnn.weight_ih_l0.add_(1)
    with pytest.raises(ContainerError, match=r"'rnn.weight_ih_l0' is quantized and not attached"):
        pqcli.export(model, path, tmp_path / "o.pq.safetensors")
    assert not (tmp_path / "o.pq.safetensors").exists()


def test_copies_in_the_file_share_a_codebook_and_kept_ones_may_part(tmp_path):
    model = nn.ModuleDict({name: nn.Linear(32, 300) for name in "ab"})
    model.b.load_state_dict(model.a.state_dict())
    path = compressed(model, tmp_path / "m.pq.safetensors")
    with pqcli.open(path) as container:
        assert {r.name for r in container.records if r.action == "copy"} == {"b.weight", "b.bias"}
    pqcli.attach(model, path)
    assert model.a.parametrizations.weight.original is model.b.parametrizations.weight.original
    with torch.no_grad():
        model.b.bias.add_(1)
        model.a.parametrizations.weight.original.add_(1)
    pqcli.export(model, path, tmp_path / "o.pq.safetensors")
    assert same(model, tmp_path / "o.pq.safetensors")
    with pqcli.open(tmp_path / "o.pq.safetensors") as container:
        assert {r.name: (r.action, r.trained) for r in container.records} == {
            "a.weight": ("pq", True), "a.bias": ("keep", False),
            "b.weight": ("copy", False), "b.bias": ("keep", True),
        }  # fmt: skip
        assert container.is_trained("b.weight")
    assert pqcli.verify(tmp_path / "o.pq.safetensors", tmp_path / "m.pt") == []


def test_files_that_cannot_be_attached_are_refused_before_a_weight_is_touched(file, tmp_path):
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {name: t + 1e-3 if t.is_floating_point() else t for name, t in torch.load(tmp_path / "m.pt").items()}
    torch.save(changed, tmp_path / "fine.pt")
    pqcli.compress(tmp_path / "fine.pt", tmp_path / "d.pq.safetensors", RECIPE, base=tmp_path / "m.pt")
    with pytest.raises(ContainerError, match=r"d.pq.safetensors: it holds differences to a base"):
        pqcli.attach(model, tmp_path / "d.pq.safetensors")
    pqcli.compress(tmp_path / "m.pt", tmp_path / "e.pq.safetensors", pqcli.Recipe(exclude=("*",)))
    with pytest.raises(ContainerError, match="none of its tensors is plain PQ and a parameter of the model"):
        pqcli.attach(model, tmp_path / "e.pq.safetensors")
    del model.conv
    with pytest.raises(ContainerError, match="no place for 2 of its tensors"):
        pqcli.attach(model, file)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert pqcli.attach(model, file, strict=False).unexpected == ("conv.weight", "conv.bias")
    with pytest.raises(UsageError, match="attached to a file already"):
        pqcli.attach(model, file)


def test_weights_that_only_the_model_ties_are_refused(tmp_path):
    model = nn.ModuleDict({name: nn.Linear(32, 32, bias=False) for name in "ab"})
    path = compressed(model, tmp_path / "m.pq.safetensors")
    model.b.weight = model.a.weight
    with pytest.raises(ContainerError, match=r"the model ties 'b.weight' to another tensor"):
        pqcli.attach(model, path)


# --- export -----------------------------------------------------------------------------------------------------------


def test_an_unchanged_model_exports_to_the_same_bytes(attached, file):
    target = file.with_name("o.pq.safetensors")
    assert pqcli.export(attached, file, target) == target
    assert target.read_bytes() == file.read_bytes()


def test_what_was_trained_is_written_with_the_same_assignments_in_the_same_size(attached, file):
    attached.train()
    attached.norm(torch.randn(8, 48))
    train(attached)
    target = file.with_name("o.pq.safetensors")
    pqcli.export(attached, file, target)
    assert same(attached, target)
    assert abs(target.stat().st_size - file.stat().st_size) < 100
    assert pqcli.verify(target) == []
    with pqcli.open(file) as before, pqcli.open(target) as after:
        for record in after.records:
            if record.action == "pq":
                assert (before.packed_assignments(record.name) == after.packed_assignments(record.name)).all()
        trained = {record.name for record in after.records if record.trained}
    assert {"embed.weight", "fc.weight", "norm.weight", "norm.running_mean", "norm.num_batches_tracked"} <= trained
    assert "conv.weight" not in trained
    assert torch.equal(torch.load(pqcli.decode(target), weights_only=True)["fc.weight"], attached.fc.weight)


def test_errors_of_trained_tensors_are_unknown_until_they_are_measured(attached, file):
    train(attached)
    target = file.with_name("o.pq.safetensors")
    pqcli.export(attached, file, target)
    told = {tensor.name: tensor for tensor in pqcli.report(target).tensors}
    assert told["fc.weight"].trained
    assert told["fc.weight"].relative_mse is None
    assert told["fc.weight"].scheme == "PQ 4x16, trained"
    assert (
        told["conv.weight"].relative_mse == {t.name: t for t in pqcli.report(file).tensors}["conv.weight"].relative_mse
    )
    assert pqcli.report(target).relative_mse is None
    measured = {tensor.name: tensor for tensor in pqcli.report(target, file.with_name("m.pt")).tensors}
    original = torch.load(file.with_name("m.pt"), weights_only=True)["fc.weight"]
    error = float((attached.fc.weight.detach() - original).square().sum() / original.square().sum())
    assert measured["fc.weight"].relative_mse == pytest.approx(error, rel=1e-4)
    assert pqcli.verify(target, file.with_name("m.pt")) == []


def test_a_trained_file_is_attached_and_trained_again(attached, file):
    train(attached, steps=1)
    first, second = file.with_name("o1.pq.safetensors"), file.with_name("o2.pq.safetensors")
    pqcli.export(attached, file, first)
    model = Net()
    pqcli.attach(model, first)
    assert same(model, first)
    pqcli.export(model, first, second)
    assert second.read_bytes() == first.read_bytes()
    train(model, steps=1)
    pqcli.export(model, first, second, force=True)
    assert same(model, second)


def test_only_the_file_that_was_attached_is_exported_to(attached, file, tmp_path):
    with pytest.raises(UsageError, match="attached to no file"):
        pqcli.export(Net(), file, tmp_path / "o.pq.safetensors")
    other = pqcli.compress(tmp_path / "m.pt", tmp_path / "other.pq.safetensors", pqcli.Recipe(block_size=8)).output
    with pytest.raises(UsageError, match="attached to another file"):
        pqcli.export(attached, other, tmp_path / "o.pq.safetensors")
    with pytest.raises(OutputError, match="is the input"):
        pqcli.export(attached, file, file, force=True)
    (tmp_path / "o.pq.safetensors").write_bytes(b"")
    with pytest.raises(OutputError, match="exists"):
        pqcli.export(attached, file, tmp_path / "o.pq.safetensors")
    attached.fc.parametrizations.weight[0].packed[0] ^= 1
    with pytest.raises(ContainerError, match=r"the assignments of 'fc.weight' in the model are others"):
        pqcli.export(attached, file, tmp_path / "o.pq.safetensors", force=True)
    assert (tmp_path / "o.pq.safetensors").read_bytes() == b""


@pytest.mark.parametrize(("number", "what"), [(float("nan"), "not finite"), (1e5, "too large for float16")])
def test_a_codebook_that_training_has_broken_is_not_written(attached, file, number, what):
    with torch.no_grad():
        attached.fc.parametrizations.weight.original[0, 0] = number
    with pytest.raises(ContainerError, match=f"the codebook of 'fc.weight' holds values that are {what}"):
        pqcli.export(attached, file, file.with_name("o.pq.safetensors"))
    assert not file.with_name("o.pq.safetensors").exists()


def test_a_wrapper_and_a_conversion_of_the_model_are_no_training(attached, file):
    target = file.with_name("o.pq.safetensors")
    pqcli.export(nn.DataParallel(attached), file, target)
    assert target.read_bytes() == file.read_bytes()
    model = Net()
    pqcli.attach(model, file, dtype=torch.bfloat16)
    pqcli.export(model.half(), file, target, force=True)
    with pqcli.open(target) as container:
        assert {r.name for r in container.records if r.trained and r.action == "keep"} <= {
            name
            for name, tensor in pqcli.load(file).items()
            if not torch.equal(tensor.bfloat16().half(), tensor.half())
        }


def test_a_folder_becomes_a_folder_with_all_that_lies_beside_the_container(attached, file, tmp_path):
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "tokens.txt").write_text("a b")
    file.rename(folder / "model.pq.safetensors")
    train(attached)
    pqcli.export(attached, folder, tmp_path / "g")
    assert compressed_folder(tmp_path / "g").side == {"sub/tokens.txt": 3}
    assert same(attached, tmp_path / "g" / "model.pq.safetensors")
    assert pqcli.verify(tmp_path / "g") == []
    with pytest.raises(OutputError, match="not empty"):
        pqcli.export(attached, folder, tmp_path / "g")
    pqcli.export(attached, folder, tmp_path / "g", force=True)


def nested(tensors):
    """A module that has these tensors under their names: floating matrices as parameters, all else as buffers."""
    model = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        if tensor.is_floating_point() and tensor.dim() > 1:
            module.register_parameter(leaf, nn.Parameter(tensor))
        else:
            module.register_buffer(leaf, tensor)
    return model


@pytest.mark.parametrize("name", ["plain-checksum", "plain", "files", "moments", "copy", "damage", "trained", "shards"])
def test_every_kind_of_file_comes_out_as_it_went_in(tmp_path, name):
    source = tmp_path / "in"
    source.mkdir()
    if name == "shards":
        shutil.copytree(GOLDEN / "shards-v1", source, dirs_exist_ok=True)
    else:
        shutil.copy(GOLDEN / f"{name}-v1.pq.safetensors", source / "model.pq.safetensors")
    with pqcli.open(source) as container:
        roles = {record.name: record.info.role for record in container.records}
    tensors = {name: tensor for name, tensor in pqcli.load(source).items() if roles[name] == "model"}
    model = nested({name: t for name, t in tensors.items() if name.split(".")[0] not in dir(nn.Module)})
    pqcli.attach(model, source, strict=False)
    pqcli.export(model, source, tmp_path / "out")
    if name == "plain":  # of a pqcli that wrote no checksum yet
        assert digests(pqcli.load(source)) == digests(pqcli.load(tmp_path / "out"))
    elif name == "shards":
        assert pqcli.verify(tmp_path / "out") == []
        sizes = [[path.stat().st_size for path in folder.glob("*-of-*")] for folder in (source, tmp_path / "out")]
        assert len(sizes[1]) > 1
        assert max(sizes[1]) == max(sizes[0])
    else:
        files = [sorted(folder.iterdir()) for folder in (source, tmp_path / "out")]
        assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


@pytest.mark.slow  # the coder of streams has to be compiled
def test_beside_a_codec_with_streams_and_training_state_all_else_stays(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(256, 250)})
    with torch.no_grad():
        model.b.weight.copy_(0.0173 * torch.randint(-1, 2, (250, 256)))
    state = {"model": model.state_dict(), "optimizer": {"state": {0: {"exp_avg": torch.randn(64, 64)}}}}
    torch.save(state, tmp_path / "m.pt")
    path = tmp_path / "m.pq.safetensors"
    pqcli.compress(tmp_path / "m.pt", path, pqcli.Recipe(codec="trellis", quality="small"))
    with pqcli.open(path) as container:
        assert {r.action for r in container.records} == {"trellis", "pq", "keep"}
    found = pqcli.attach(model, path)
    assert (found.attached, found.frozen) == (("b.weight",), ("a.weight",))
    pqcli.export(model, path, tmp_path / "same.pq.safetensors")
    assert (tmp_path / "same.pq.safetensors").read_bytes() == path.read_bytes()
    with torch.no_grad():
        model.b.parametrizations.weight.original.mul_(2)
        model.a.bias.add_(1)
    pqcli.export(model, path, tmp_path / "o.pq.safetensors")
    before, after = pqcli.load(path), pqcli.load(tmp_path / "o.pq.safetensors")
    assert torch.equal(after["b.weight"], 2 * before["b.weight"])
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"b.weight", "a.bias"}


def test_training_regains_what_compression_lost_at_the_same_bytes(tmp_path):
    """The whole way, from a dense network to a decoded file, with the dense one for a teacher."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 96), nn.Tanh(), nn.Linear(96, 16))
    path = compressed(dense, tmp_path / "m.pq.safetensors")
    x = torch.randn(256, 16)
    wanted = dense(x).detach()
    model = copy.deepcopy(dense)
    pqcli.attach(model, path)
    before = (model(x) - wanted).square().mean().item()
    parameters = list(model.parameters())
    for _ in range(60):
        gradients = torch.autograd.grad((model(x) - wanted).square().mean(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=4.0)
    pqcli.export(model, path, tmp_path / "o.pq.safetensors")
    decoded = copy.deepcopy(dense)
    decoded.load_state_dict(pqcli.load(tmp_path / "o.pq.safetensors"))
    assert (decoded(x) - wanted).square().mean().item() < 0.7 * before
    assert abs((tmp_path / "o.pq.safetensors").stat().st_size - path.stat().st_size) < 50


def test_what_was_compressed_in_an_earlier_stage_is_found_again_without_error(attached, file):
    """Where there are neither exact zeros nor padding, which make more distinct blocks than there are centroids."""
    train(attached)
    pqcli.export(attached, file, file.with_name("o.pq.safetensors"))
    again = file.with_name("again.pq.safetensors")
    report = pqcli.save(pqcli.load(file.with_name("o.pq.safetensors")), again, RECIPE)
    errors = {tensor.name: tensor.relative_mse for tensor in report.quantized}
    assert all(errors[name] == 0 for name in ("bag.weight", "conv3.weight", "up.weight", "fp16.weight"))


def test_the_command_line_tells_what_was_trained(attached, file, pqcli_command):
    train(attached)
    target = pqcli.export(attached, file, file.with_name("o.pq.safetensors"))
    told = pqcli_command("report", target).stdout
    assert "PQ 4x16, trained" in told
    assert "trained   3 quantized tensors and 1 kept one since they were compressed" in told
    assert "relative MSE" not in told.splitlines()[0]
    measured = pqcli_command("report", target, "--against", file.with_name("m.pt")).stdout
    assert "relative MSE" in measured.splitlines()[0]
    verified = pqcli_command("verify", target, "--against", file.with_name("m.pt"))
    assert "not compared, because they were trained since they were compressed: embed.weight" in verified.stderr
    assert "every tensor decodes to the bytes that were written" in verified.stderr
    assert pqcli_command("report", target, "--fail-above", "relative_mse=1").returncode != 0


@pytest.mark.slow  # transformers takes seconds to import
def test_a_model_of_transformers_is_attached_and_trained(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=200, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    model, dense = (transformers.BertForMaskedLM(config).eval() for _ in range(2))
    path = compressed(model, tmp_path / "m.pq.safetensors")
    pqcli.load_into(dense, path)
    pqcli.attach(model, path)
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(model(ids).logits, dense(ids).logits)
    tied = model.cls.predictions.decoder.parametrizations.weight.original
    assert tied is model.bert.embeddings.word_embeddings.parametrizations.weight.original
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    pqcli.export(model, path, tmp_path / "o.pq.safetensors")
    pqcli.load_into(dense, tmp_path / "o.pq.safetensors")
    assert torch.equal(model(ids).logits, dense(ids).logits)


@pytest.mark.slow  # torch.compile takes seconds to import
def test_an_attached_model_is_compiled_without_a_break(attached):
    def run():
        return attached.fc(attached.own @ attached.fc.weight[:24])

    gradients = []
    for runs in (run, torch.compile(run, backend="eager", fullgraph=True)):
        attached.zero_grad()
        runs().sum().backward()
        gradients.append(attached.fc.parametrizations.weight.original.grad.clone())
    assert torch.equal(*gradients)
