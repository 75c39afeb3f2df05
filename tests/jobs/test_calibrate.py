"""Statistics of real Hugging Face models, tiny ones, against what obvious hooks see."""

import json
import socket

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pqcli.errors import CheckpointError, MissingExtraError, OutputError, StatsError, UsageError
from pqcli.integrations import loading, running, texts
from pqcli.jobs import calibrate
from pqcli.jobs.calibrate import Sampling
from pqcli.stats import open as open_stats

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.integrations

WORDS = [f"w{i}" for i in range(60)]
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS = {**LLAMA, "num_experts_per_tok": 2, "head_dim": 4}


def make(folder, kind, config, *, architecture=None):
    """A model of random weights and a tokenizer that knows 60 words, saved as transformers saves."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():  # far from the start of training, so that labels are not all alike
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    model.save_pretrained(folder)
    if architecture:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [architecture]}))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind.__name__.startswith("Bert"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder


def bert(folder, kind="BertModel", **more):
    config = transformers.BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=64)
    return make(folder, getattr(transformers, kind), config, **more)


def gpt2(folder):
    return make(
        folder,
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=4),
    )


def llama(folder, **more):
    return make(folder, transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA, **more))


def t5(folder):
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return make(folder, transformers.T5ForConditionalGeneration, config)


def mixtral(folder):
    config = transformers.MixtralConfig(**EXPERTS, num_local_experts=3)
    return make(folder, transformers.MixtralForCausalLM, config)


def qwen_moe(folder):
    config = transformers.Qwen2MoeConfig(
        **{**LLAMA, "head_dim": 4}, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=12, decoder_sparse_step=1,
    )  # fmt: skip
    return make(folder, transformers.Qwen2MoeForCausalLM, config)


@pytest.fixture
def text(tmp_path):
    generator = torch.Generator().manual_seed(1)
    lines = []
    for _ in range(40):
        length = int(torch.randint(3, 30, (1,), generator=generator))
        lines.append(" ".join(WORDS[i] for i in torch.randint(60, (length,), generator=generator)))
    file = tmp_path / "text.txt"
    file.write_text("\n".join(lines))
    return file


SAMPLING = Sampling(samples=6, length=12, batch=3)


# --- the slow, obvious version ----------------------------------------------------------------------------------------


def seen_by_hooks(folder, text, sampling):
    """By the name of the parameter (an expert's: with its number): its inputs as rows, or the rows looked up."""
    runnable = loading.load(folder)
    model, inputs, lookups = runnable.model, {}, {}
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}  # tied ones have one
    mask = None

    def rows(x):
        if mask is not None and x.shape[:2] == mask.shape:
            return x[mask.bool()]
        return x[mask.flatten().bool()] if mask is not None and len(x) == mask.numel() else x.flatten(0, -2)

    def watch(name):
        def hook(_module, arguments, _output):
            inputs.setdefault(name, []).append(rows(arguments[0]).double())

        return hook

    def watch_lookups(name):
        def hook(_module, arguments, _output):
            ids = arguments[0]
            ids = ids.expand(mask.shape)[mask.bool()] if mask is not None and ids.shape[1:] == mask.shape[1:] else ids
            lookups.setdefault(name, []).append(ids.flatten())

        return hook

    def watch_experts(name):
        def hook(module, arguments, _output):
            hidden, chosen, _ = arguments
            for e in range(module.num_experts):
                x = hidden[(chosen == e).any(-1)].double()
                gate, up = (x @ module.gate_up_proj[e].double().T).chunk(2, -1)
                inputs.setdefault(f"{name}.{e}.in", []).append(x)
                inputs.setdefault(f"{name}.{e}.between", []).append(torch.nn.functional.silu(gate) * up)

        return hook

    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, torch.nn.Parameter):
            module.register_forward_hook(watch_experts(name))
        elif isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(watch_lookups(first_names[id(module.weight)]))
        elif isinstance(getattr(module, "weight", None), torch.nn.Parameter) and module.weight.dim() == 2:
            module.register_forward_hook(watch(first_names[id(module.weight)]))
    examples = calibrate.drawn(runnable, [text], sampling)
    generator = torch.Generator().manual_seed(sampling.seed)
    for batch in texts.batches(examples.ids, examples.batch, 0):
        mask = None if runnable.is_pair else batch.mask
        running.output_of(runnable, batch, generator)
    return {n: torch.cat(x) for n, x in inputs.items()}, {n: torch.cat(x) for n, x in lookups.items()}


def check_inputs(stats, name, rows, axis=1):
    found = stats.moments(name)
    assert found is not None, name
    assert found.axis == axis, name
    assert found.n_samples == len(rows), name
    expected = (rows.T @ rows / max(len(rows), 1)).numpy()
    assert abs(found.second - expected).max() <= 2e-3 * abs(expected).max(), name


def written(folder, text, **options):
    done = calibrate.calibrate(folder, [text], sampling=SAMPLING, **options)
    assert done.output == str(folder.with_name(folder.name + ".stats.safetensors"))
    return open_stats(done.output), done


def weights_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = file.keys()
        return [name for name in names if len(file.get_slice(name).get_shape()) > 1]


def check_all(folder, text, own_name=lambda name: name):
    """Every matrix of the file has the statistics that hooks see; `own_name` is its name while the model runs."""
    stats, done = written(folder, text)
    inputs, lookups = seen_by_hooks(folder, text, SAMPLING)
    names = weights_of(folder)
    assert done.unseen == (("pooler.dense.weight",) if "pooler.dense.weight" in names else ())  # nobody asks it
    assert done.random == ()
    names = [name for name in names if name not in done.unseen]
    assert set(stats.names) | set(stats.aliases) == set(names)
    for name in names:
        own = own_name(name)
        assert own in inputs or own in lookups, name
        if own in lookups:
            frequency = torch.bincount(lookups[own], minlength=len(stats.moments(name).row_frequency)).double()
            assert stats.moments(name).row_frequency == pytest.approx((frequency / frequency.sum()).numpy())
        if own in inputs:
            is_conv1d = "Conv1D" in own or (folder.name == "gpt2" and ".h." in own)
            check_inputs(stats, name, inputs[own], axis=0 if is_conv1d else 1)
        gradient = stats.moments(name).gradient
        assert gradient is not None, name
    return stats


# --- names and values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_an_encoder_has_statistics_of_every_weight_and_they_are_those_that_hooks_see(tmp_path, text, kind):
    stats = check_all(bert(tmp_path / "bert", kind), text)
    if kind == "BertForMaskedLM":  # its head is the embedding
        head = stats.moments("bert.embeddings.word_embeddings.weight")
        assert head.row_frequency is not None
        assert head.second is not None


def test_a_checkpoint_with_a_prefix_keeps_its_names(tmp_path, text):
    """The file is that of a masked language model, the config says that its encoder is meant."""
    folder = bert(tmp_path / "bert", "BertForMaskedLM", architecture="BertModel")
    stats, done = written(folder, text)
    names = {name for name in weights_of(folder) if name.startswith("bert.")}
    assert set(stats.names) == {name for name in names if "pooler" not in name}
    assert all(name.startswith("cls.") for name in done.unseen)


def test_transposed_layers_of_gpt2_are_known_by_their_rows(tmp_path, text):
    check_all(gpt2(tmp_path / "gpt2"), text)


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_has_statistics_of_every_weight(tmp_path, text, tied):
    stats = check_all(llama(tmp_path / "llama", tie_word_embeddings=tied), text)
    assert (stats.moments("model.embed_tokens.weight").second is not None) == tied


def test_an_encoder_with_a_decoder_runs_both(tmp_path, text):
    check_all(t5(tmp_path / "t5"), text)


MIXTRAL_PARTS = {"w1": "in", "w3": "in", "w2": "between"}
QWEN_PARTS = {"gate_proj": "in", "up_proj": "in", "down_proj": "between"}


def test_each_expert_of_a_mixtral_has_the_inputs_that_were_sent_to_it(tmp_path, text):
    """The file holds experts one by one, transformers a stack of them with two matrices merged."""

    def own(name):
        layer, _, rest = name.partition(".block_sparse_moe.")
        if rest.startswith("experts."):
            _, e, part, _ = rest.split(".")
            return f"{layer}.mlp.experts.{e}.{MIXTRAL_PARTS[part]}"
        return name.replace("block_sparse_moe", "mlp")

    check_all(mixtral(tmp_path / "mixtral"), text, own)


def test_each_expert_of_a_qwen_has_the_inputs_that_were_sent_to_it(tmp_path, text):
    def own(name):
        layer, _, rest = name.partition(".mlp.experts.")
        if rest:
            e, part, _ = rest.split(".")
            return f"{layer}.mlp.experts.{e}.{QWEN_PARTS[part]}"
        return name

    check_all(qwen_moe(tmp_path / "qwen"), text, own)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_windows_come_from_everywhere_and_never_overlap(tmp_path):
    folder = llama(tmp_path / "llama")
    tokenizer = loading.load(folder).tokenizer
    vocabulary = tokenizer.get_vocab()
    files = []
    for i in range(2):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text(" ".join(WORDS[30 * i : 30 * i + 30]))
    found = texts.windows(tokenizer, files, 100, 7, seed=0)
    tokens = [token for window in found for token in window]
    assert {len(window) for window in found} == {7}
    assert len(set(tokens)) == len(tokens) == 56
    assert set(tokens) <= {vocabulary[word] for word in WORDS}
    assert texts.windows(tokenizer, files, 2, 7, seed=0) == found[:2]
    assert texts.windows(tokenizer, files, 100, 7, seed=1) != found
    assert [len(window) for window in texts.windows(tokenizer, files, 5, 99, seed=1)] == [30]  # one, as long as it is


def test_of_a_large_text_chunks_from_all_over_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MOST_BYTES", 1 << 10)
    monkeypatch.setattr(texts, "CHUNK_BYTES", 1 << 7)
    tokenizer = loading.load(bert(tmp_path / "bert")).tokenizer
    file = tmp_path / "large.txt"
    file.write_text("\n".join(f"w{i // 100} w{i % 60}" for i in range(6000)))
    firsts = {line[1] for line in texts.lines(tokenizer, [file], 1000, 16, seed=0)}
    assert len(firsts) == 8


def test_lines_are_different_and_cut_between_their_special_tokens(tmp_path):
    tokenizer = loading.load(bert(tmp_path / "bert")).tokenizer
    file = tmp_path / "lines.txt"
    file.write_text("w1 w2 w3 w4\n\n  w5\nw5\n")
    vocabulary = tokenizer.get_vocab()
    expected = [[1, vocabulary["w5"], 2], [1, vocabulary["w1"], vocabulary["w2"], 2]]
    assert texts.lines(tokenizer, [file], 10, 4, seed=0) == expected


# --- what the command promises ----------------------------------------------------------------------------------------


def test_nothing_is_asked_of_a_network_and_the_model_on_the_disk_is_as_it_was(tmp_path, text, monkeypatch):
    folder = llama(tmp_path / "llama")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refuse(*_arguments):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    written(folder, text)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_same_seed_gives_the_same_file_and_gradients_can_be_left_out(tmp_path, text):
    folder = llama(tmp_path / "llama")
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, gradients in zip(files, (True, True, False), strict=True):
        calibrate.calibrate(folder, [text], file, SAMPLING, gradients=gradients)
    assert files[0].read_bytes() == files[1].read_bytes()
    stats = open_stats(files[2])
    name = "model.layers.0.mlp.down_proj.weight"
    assert stats.moments(name).gradient is None
    assert (stats.moments(name).second == open_stats(files[0]).moments(name).second).all()


def test_weights_that_the_checkpoint_lacks_are_told(tmp_path, text):
    folder = llama(tmp_path / "llama", tie_word_embeddings=False)
    state = load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    _, done = written(folder, text)
    assert done.random == ("lm_head.weight",)


def test_mistakes_are_told_before_a_model_is_loaded(tmp_path, text, monkeypatch):
    folder = tmp_path / "nothing"
    with pytest.raises(CheckpointError, match="no folder"):
        calibrate.calibrate(folder, [text])
    folder.mkdir()
    save_file({"a.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    with pytest.raises(StatsError, match=r"has no config\.json"):
        calibrate.calibrate(folder, [text])
    (folder.with_name("nothing.stats.safetensors")).write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        calibrate.calibrate(folder, [text])
    with pytest.raises(UsageError, match="samples must be at least 1"):
        Sampling(samples=0)


def test_texts_that_are_none_are_named(tmp_path):
    folder = llama(tmp_path / "llama")
    for name, content, said in (("x", None, "no such file"), ("y", b"ab\0cd", "not a text"), ("z", b" \n", "no text")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(StatsError, match=said):
            calibrate.calibrate(folder, [tmp_path / name], force=True)
    (tmp_path / "t").write_text("w1 w2")
    with pytest.raises(UsageError, match="at most 64 tokens, not 100"):
        calibrate.calibrate(folder, [tmp_path / "t"], sampling=Sampling(length=100))


def test_code_in_the_folder_is_never_run(tmp_path, text):
    folder = llama(tmp_path / "llama")
    (folder / "modeling_own.py").write_text("raise SystemExit('it ran')")
    config = json.loads((folder / "config.json").read_text())
    for architecture in (["OwnModel"],):
        config |= {
            "model_type": "own",
            "architectures": architecture,
            "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(StatsError, match=r"pqcli runs no such code.*pqcli\.collect\(model\)"):
            calibrate.calibrate(folder, [text])


def test_without_transformers_the_message_says_what_to_install(tmp_path, text, monkeypatch):
    import sys

    folder = llama(tmp_path / "llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pqcli\[transformers\]'"):
        calibrate.calibrate(folder, [text])


def test_compress_says_once_what_statistics_are_for_where_they_could_be_used(tmp_path):
    """Not with plain PQ, not where they were given, and never in JSON or when quiet."""
    from typer.testing import CliRunner

    from pqcli.cli.commands import app

    folder = bert(tmp_path / "bert")
    budget = ["--target-bits", "3"]
    for options, said in ((budget, 1), ([], 0), ([*budget, "--quiet"], 0), ([*budget, "--json"], 0)):
        done = CliRunner().invoke(
            app, ["compress", str(folder), "-o", str(tmp_path / "out.pq.safetensors"), "--force", *options]
        )
        assert done.exit_code == 0, done.output
        assert done.stderr.count("pqcli calibrate") == said


def test_the_command_takes_several_texts_and_tells_what_it_wrote(tmp_path, text):
    from typer.testing import CliRunner

    from pqcli.cli.commands import app

    folder, more = bert(tmp_path / "bert"), tmp_path / "more.txt"
    more.write_text("w1 w2\nw3 w4 w5\n")
    options = ["--samples", "42", "--length", "12", "--no-gradients", "--json"]
    done = CliRunner().invoke(app, ["calibrate", str(folder), "--text", str(text), str(more), *options])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["split"], found["n_examples"], found["n_weights"]) == ("lines", 42, 16)
    assert found["output_bytes"] == (tmp_path / "bert.stats.safetensors").stat().st_size
    again = CliRunner().invoke(app, ["calibrate", str(folder), "--text", str(text)])
    assert again.exit_code == 1
    assert "exists already" in " ".join(again.output.split())
    nothing = CliRunner().invoke(app, ["calibrate", str(folder)])
    assert (nothing.exit_code, "--text FILE" in nothing.output) == (2, True)


@pytest.mark.parametrize("stage", ["loading", "naming", "calibrating"])
def test_an_interrupted_run_leaves_nothing_and_what_was_there_untouched(tmp_path, text, stage):
    folder, target = llama(tmp_path / "llama"), tmp_path / "llama.stats.safetensors"
    target.write_text("before")

    def interrupt(event):
        if event.stage == stage and (event.done or stage == "loading"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate(folder, [text], sampling=SAMPLING, force=True, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "llama.stats.safetensors", "text.txt"]
    assert target.read_text() == "before"
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_disk_that_is_too_full_is_told_after_the_first_batch(tmp_path, text, monkeypatch):
    folder = llama(tmp_path / "llama")
    done = []

    def full(target, n_bytes):
        raise OutputError(f"{target}: {n_bytes} bytes")

    monkeypatch.setattr(calibrate, "check_space", full)
    with pytest.raises(OutputError, match=r"llama\.stats\.safetensors: \d+ bytes"):
        calibrate.calibrate(
            folder,
            [text],
            sampling=SAMPLING,
            progress=lambda event: done.append(event.done) if event.stage == "calibrating" else None,
        )
    assert done == [0]
