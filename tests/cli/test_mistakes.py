"""What a stranger may get wrong on the command line, and what is said: what is wrong, and what to do."""

import pytest
import torch

import pqcli


@pytest.fixture
def here(model, tmp_path):
    """A folder with a checkpoint, its compressed file, and things that are neither."""
    pqcli.compress(model, tmp_path / "model.pq.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("hello\n")
    return tmp_path


MISTAKES = {
    "compress modle.pt": "'modle.pt' does not exist (did you mean 'model.pt'?)",
    "decode model.pq.safetensor": "no such file (did you mean 'model.pq.safetensors'?)",
    "compress model.pt --blok-size 8": "No such option: --blok-size (Possible options: --block-size, --shard-size)",
    "compress model.pt --codec trelis": "--codec: must be 'pq', 'trellis' or 'auto'; got 'trelis' (did you mean 'tre",
    "compress model.pt --target-size 6 -o n.pq.safetensors": "--target-size 6 means 6 bytes, 6MB that many megabytes",
    "compress model.pt --target-bits 0": "--target-bits: must be a number above 0; got 0",
    "compress model.pt --target-bits two": "must be a number above 0 (such as 0.5 or 1e-6); got the text 'two'",
    "compress model.pt --min-sqnr 500": "--min-sqnr: must be at most 150; got 500: weights are coded as float32",
    "compress model.pt --max-relative-mse 1e-20": "--max-relative-mse: must be at least 1e-15; got 1e-20",
    "compress model.pt --quality high --target-bits 2": "--quality and --target-bits: each says how much to spend",
    "compress model.pt --workers two": "Invalid value for '--workers': must be a whole number",
    "compress model.pt --config folder": "recipe 'folder': is a folder, and no preset is called so",
    "compress model.pt --config ''": "no preset is called ''",
    "compress model.pt --clamp quarter": "clamp is set in a recipe: --config FILE",
    "compress model.pt out.pq.safetensors": "one input at a time, and the output is named with -o",
    "compress model.pt --include embd -o n.pq.safetensors": "close names: 'embed.weight'",
    "compress model.pt --include embed.w -o n.pq.safetensors": "'*embed.w*' matches 1 tensor",
    "compress model.pt --exclude *Embed* -o n.pq.safetensors": "upper and lower case count: '*embed*' matches 1 tensor",
    "plan model.pt --dry-run": "plan never writes; leave it out",
    "plan model.pt -o x": "plan never writes; --json prints the plan",
    "plan model.pt other.pt": "one checkpoint at a time; plan never writes",
    "decode model.pq.safetensors --dtype fp16": "'float16' or 'bfloat16'; got 'fp16' (did you mean 'float16'",
    "decode model.pq.safetensors out.pt": "one input at a time, and the output is named with -o",
    "report model.pq.safetensors --format pdf": "must be 'table', 'json', 'csv' or 'html'; got 'pdf'",
    "report model.pq.safetensors --sort size": "cannot sort by 'size' (did you mean bytes?)",
    "report model.pq.safetensors --sort rel": "cannot sort by 'rel' (did you mean relative_mse?)",
    "report model.pq.safetensors --sort relative-mse": "(did you mean relative_mse?)",
    "report model.pq.safetensors --fail-above mse=0.1": "cannot check 'mse' (did you mean relative_mse?)",
    "report model.pq.safetensors --samples 4": "--samples: how text is run goes with --model FOLDER",
    "report model.pq.safetensors --split lines --length 9": "--length and --split: how text is run",
    "report model.pq.safetensors model.pt": "the original checkpoint is named with --against",
    "inspect model.pq.safetensors --tensor embed.wieght": "no tensor 'embed.wieght' (did you mean 'embed.weight'",
    "inspect model.pq.safetensors --tensor embed": "no tensor 'embed' (did you mean 'embed.weight'",
    "inspect model.pq.safetensors embed.weight": "tensors are named with --tensor",
    "verify model.pq.safetensors model.pt": "the original checkpoint is named with --against",
    "calibrate folder --text notes.txt --dtype int8": "must be 'float32', 'bfloat16' or 'float16'; got 'int8'",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_told_with_what_to_do(here, pqcli_command, line):
    words = [word.strip("'") for word in line.split(" ")]
    done = pqcli_command(*words)
    said = " ".join(done.stderr.replace("│", " ").split())
    assert MISTAKES[line] in said
    assert done.returncode in (1, 2)
    assert "Traceback" not in said
    assert "Value error" not in said
    assert "Input should be" not in said


def test_a_terabyte_is_a_size(here, pqcli_command):
    assert pqcli_command("plan", "model.pt", "--target-size", "6TB").returncode == 0


def test_an_output_that_is_called_like_a_dense_file_is_told_of(here, pqcli_command):
    done = pqcli_command("compress", "model.pt", "-o", "out.pt")
    assert done.returncode == 0
    assert "'out.pt' will be a safetensors file; x.pq.safetensors is the name" in done.stderr


def test_a_flag_takes_the_place_of_the_same_setting_of_a_recipe_but_not_of_another_budget(here, pqcli_command):
    (here / "r.yaml").write_text("quality: tiny\n")
    assert pqcli_command("plan", "model.pt", "--config", "r.yaml", "--quality", "small").returncode == 0
    done = pqcli_command("plan", "model.pt", "--config", "r.yaml", "--target-bits", "3")
    assert done.returncode == 2
    assert "--target-bits and the quality of recipe 'r.yaml': each says how much to spend" in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.nn.Linear(2, 2), r"what was given is a whole model \(Linear\).*save\(model.state_dict\(\), ...\)"),
        ([torch.ones(2)], r"what was given is no state dict"),
        ({"a": 3}, "what was given holds no tensors"),
        ({"a": torch.nn.Linear(2, 2)}, "what was given .*is a whole model, not its state dict"),
    ],
)
def test_save_names_what_it_was_given_and_no_temporary_file(tmp_path, given, said):
    with pytest.raises(pqcli.PQError, match=said) as caught:
        pqcli.save(given, tmp_path / "a.pq.safetensors")
    assert str(tmp_path) not in str(caught.value)
    assert not list(tmp_path.iterdir())
