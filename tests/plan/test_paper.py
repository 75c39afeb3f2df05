"""The papers' size accounting, through the real command line, on checkpoints with the real shapes of ResNets."""

import json

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.slow


def batch_norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.weight": (width,),
        f"{name}.bias": (width,),
        f"{name}.running_mean": (width,),
        f"{name}.running_var": (width,),
        f"{name}.num_batches_tracked": (),
    }


def resnet(depths: tuple[int, ...], *, bottleneck: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's ResNets, in its order."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7), **batch_norm("bn1", 64)}
    expansion = 4 if bottleneck else 1
    inputs = 64
    for stage, depth in enumerate(depths, start=1):
        width = 64 * 2 ** (stage - 1)
        for block in range(depth):
            prefix = f"layer{stage}.{block}"
            kernels = [(width, inputs, 1), (width, width, 3), (width * 4, width, 1)] if bottleneck else [
                (width, inputs, 3), (width, width, 3)
            ]  # fmt: skip
            for number, (out, into, size) in enumerate(kernels, start=1):
                shapes[f"{prefix}.conv{number}.weight"] = (out, into, size, size)
                shapes |= batch_norm(f"{prefix}.bn{number}", out)
            if block == 0 and (stage > 1 or bottleneck):
                shapes[f"{prefix}.downsample.0.weight"] = (width * expansion, inputs, 1, 1)
                shapes |= batch_norm(f"{prefix}.downsample.1", width * expansion)
            inputs = width * expansion
    return shapes | {"fc.weight": (1000, inputs), "fc.bias": (1000,)}


@pytest.fixture(scope="module", params=["ResNet-18", "ResNet-50"])
def checkpoint(request, tmp_path_factory):
    """A checkpoint of random weights, as 16-bit numbers: the accounting does not depend on them."""
    deep = request.param == "ResNet-50"
    shapes = resnet((3, 4, 6, 3) if deep else (2, 2, 2, 2), bottleneck=deep)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(*shape, generator=generator).half() if shape else torch.tensor(1)
        for name, shape in shapes.items()
    }
    n_weights = {"ResNet-18": 11_689_512, "ResNet-50": 25_557_032}[request.param]  # torchvision's parameter counts
    counted = sum(tensor.numel() for name, tensor in state.items() if "running" not in name and tensor.dim())
    assert counted == n_weights
    path = tmp_path_factory.mktemp("paper") / f"{request.param}.safetensors"
    save_file(state, path)
    return request.param, path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("kill-the-bits-small", {"ResNet-18": 1_615_904, "ResNet-50": 5_338_144}),
        ("kill-the-bits-large", {"ResNet-18": 1_079_328, "ResNet-50": 3_338_784}),
    ],
)
def test_report_gives_the_bytes_of_the_kill_the_bits_papers(checkpoint, preset, expected, pqcli_command):
    name, path = checkpoint
    done = pqcli_command("compress", path, "-o", "small.pq.safetensors", "--config", preset, "--n-iter", 1, "--json")
    assert done.returncode == 0, done.stderr
    report = pqcli_command.json("report", "small.pq.safetensors")
    for document in (json.loads(done.stdout), report):
        assert document["totals"]["paper_bytes"] == expected[name]
        assert document["paper_mib"] == expected[name] / 2**20
    table = pqcli_command("report", "small.pq.safetensors").stdout
    assert f"{expected[name] / 2**20:.3f} MiB" in table
