"""Folders of transformers, sentence-transformers and diffusers, compressed and decoded, load untouched.

transformers takes seconds to import, which is why all that needs it stands in this one file.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pqcli

transformers = pytest.importorskip("transformers")
pytest.importorskip("pqcli.integrations.transformers")  # from here on from_pretrained takes containers

pytestmark = pytest.mark.integrations

RECIPE = pqcli.Recipe(block_size=4, n_centroids=16, n_iter=2)


def gpt2():
    config = transformers.GPT2Config(vocab_size=200, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.arange(8)[None]}


def llama():
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.arange(8)[None]}


def tied_llama():
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.arange(8)[None]}


def bert():
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config), {"input_ids": torch.arange(8)[None]}


def t5():
    config = transformers.T5Config(vocab_size=200, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    ids = torch.arange(8)[None]
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids}


def vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.ones(1, 3, 32, 32)}


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("make", [gpt2, llama, tied_llama, bert, t5, vit])
def test_a_model_of_transformers_loads_from_the_decoded_folder(tmp_path, make, sharded):
    torch.manual_seed(0)
    model, inputs = make()
    source = tmp_path / "m"
    model.save_pretrained(source, **({"max_shard_size": "30KB"} if sharded else {}))
    assert len(list(source.glob("*.safetensors"))) > 1 or not sharded
    pqcli.compress(source, recipe=RECIPE)
    decoded = pqcli.decode(tmp_path / "m.pq")
    assert sorted(path.name for path in decoded.iterdir()) == sorted(path.name for path in source.iterdir())
    back, info = type(model).from_pretrained(decoded, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    by_hand = tmp_path / "by hand"
    by_hand.mkdir()
    save_file(pqcli.load(tmp_path / "m.pq"), by_hand / "model.safetensors", {"format": "pt"})
    shutil.copy(source / "config.json", by_hand)
    with torch.no_grad():
        expected = type(model).from_pretrained(by_hand).eval()(**inputs).logits
        found = back.eval()(**inputs).logits
        assert torch.equal(expected, found)
        assert not torch.equal(found, model.eval()(**inputs).logits)
        straight, info = type(model).from_pretrained(tmp_path / "m.pq", output_loading_info=True)
        assert not info["missing_keys"] | info["unexpected_keys"]
        assert torch.equal(expected, straight.eval()(**inputs).logits)


@pytest.mark.parametrize("codec", ["pq", "trellis"])
def test_a_container_in_several_files_goes_straight_into_a_model(tmp_path, codec):
    torch.manual_seed(0)
    model, _ = tied_llama()
    model.save_pretrained(tmp_path / "m")
    recipe = pqcli.Recipe(codec="trellis", effort=4) if codec == "trellis" else RECIPE
    pqcli.compress(tmp_path / "m", recipe=recipe, shard_bytes=4096)
    assert (tmp_path / "m.pq" / "model.pq.safetensors.index.json").is_file()
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m.pq", dtype=torch.bfloat16)
    assert back.lm_head.weight is back.model.embed_tokens.weight
    for name, tensor in pqcli.load(tmp_path / "m.pq").items():
        assert torch.equal(back.state_dict()[name], tensor.bfloat16())


def test_folders_without_a_container_are_refused_as_ever_and_damage_is_told(tmp_path):
    model, _ = bert()
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModel.from_pretrained(tmp_path / "m")
    (tmp_path / "model.safetensors").rename(tmp_path / "m" / "model.safetensors")
    pqcli.compress(tmp_path / "m", recipe=RECIPE)
    shutil.copy(tmp_path / "m.pq" / "model.pq.safetensors", tmp_path / "m.pq" / "other.pq.safetensors")
    transformers.AutoModel.from_pretrained(tmp_path / "m.pq")
    (tmp_path / "m.pq" / "model.pq.safetensors").rename(tmp_path / "m.pq" / "another.pq.safetensors")
    with pytest.raises(pqcli.PQError, match="2 containers"):
        transformers.AutoModel.from_pretrained(tmp_path / "m.pq")
    (tmp_path / "m.pq" / "other.pq.safetensors").unlink()
    path = tmp_path / "m.pq" / "another.pq.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(pqcli.PQError, match="another"):
        transformers.AutoModel.from_pretrained(tmp_path / "m.pq")


def test_a_folder_of_diffusers_comes_back_as_from_pretrained_wants_it(tmp_path):
    torch.manual_seed(0)
    source = tmp_path / "pipe"
    parts = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    for part, stem in parts.items():
        (source / part).mkdir(parents=True)
        (source / part / "config.json").write_text("{}")
        save_file({"conv.weight": torch.randn(32, 16, 3, 3)}, source / part / f"{stem}.safetensors", {"format": "pt"})
        save_file({"conv.weight": torch.randn(32, 16, 3, 3)}, source / part / f"{stem}.fp16.safetensors")
    config = transformers.CLIPTextConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(source / "text_encoder")
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json", "model_index.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(json.dumps({"name": name}))
    report = pqcli.compress(source, recipe=RECIPE)
    found = sorted(path.relative_to(tmp_path / "pipe.pq").as_posix() for path in (tmp_path / "pipe.pq").rglob("*.pq.*"))
    assert found == [
        "text_encoder/model.pq.safetensors",
        "unet/diffusion_pytorch_model.pq.safetensors",
        "vae/diffusion_pytorch_model.pq.safetensors",
    ]
    assert len(report.dropped) == 2
    decoded = pqcli.decode(tmp_path / "pipe.pq")
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if ".fp16." not in path.name}
    assert {path.relative_to(decoded).as_posix() for path in decoded.rglob("*")} == names
    back = transformers.CLIPTextModel.from_pretrained(decoded / "text_encoder")
    loaded = pqcli.load(tmp_path / "pipe.pq")
    for name, tensor in back.state_dict().items():
        if f"text_encoder/{name}" in loaded:
            assert torch.equal(tensor, loaded[f"text_encoder/{name}"])


def test_minilm_gives_the_embeddings_of_its_decoded_tensors(tmp_path, minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    source = minilm.parent
    pqcli.compress(source, tmp_path / "m.pq", pqcli.Recipe(block_size=4, n_iter=5))
    decoded = pqcli.decode(tmp_path / "m.pq")
    assert pqcli.verify(tmp_path / "m.pq", source) == []
    files = {path.relative_to(source) for path in source.rglob("*")}
    assert {path.relative_to(decoded) for path in decoded.rglob("*")} == files
    sentences = ["A man plays the guitar.", "Somebody makes music."]
    model = sentence_transformers.SentenceTransformer(str(decoded), device="cpu")
    by_hand = sentence_transformers.SentenceTransformer(str(source), device="cpu")
    dense = by_hand.encode(sentences)
    loaded = pqcli.load(tmp_path / "m.pq")
    missing = by_hand[0].auto_model.load_state_dict(loaded, strict=False)
    assert not missing.missing_keys
    found = model.encode(sentences)
    assert (found == by_hand.encode(sentences)).all()
    assert not (found == dense).all()
    straight = sentence_transformers.SentenceTransformer(str(tmp_path / "m.pq"), device="cpu")
    assert (straight.encode(sentences) == found).all()
    auto = transformers.AutoModel.from_pretrained(decoded)
    for name, tensor in auto.state_dict().items():
        assert torch.equal(tensor, loaded[name]), name
    assert Path(decoded / "1_Pooling" / "config.json").read_bytes() == (source / "1_Pooling/config.json").read_bytes()
