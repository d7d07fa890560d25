"""Loads an adapter that `nf4pack train` wrote with PEFT on the exported base, and compares logits with nf4pack's own.

    nf4pack export PACK BASE --dtype f32
    python tests/interop/peft_adapter.py ids BASE TEXT ids.txt          # the tokens of a text file
    cargo run --release --example logits -- PACK ADAPTER ids.txt logits.f32
    python tests/interop/peft_adapter.py compare BASE ADAPTER ids.txt logits.f32

Exit code 0 where the largest difference is at most 2e-4, else 1. What `nf4pack merge` wrote differs by bfloat16's rounding: about as
much as PEFT's merge in float32 after all weights were rounded (0.5 to 1.6 % RMS on the fixtures of architectures):

    nf4pack merge PACK --adapter ADAPTER --base dequant --out MERGED
    python tests/interop/peft_adapter.py merged BASE ADAPTER MERGED ids.txt logits.f32
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

BOUND = 2e-4
MERGED_BOUND = 1.05
TOKENS = 256


def ids(base, text, out):
    tokens = AutoTokenizer.from_pretrained(base)(Path(text).read_text())["input_ids"][:TOKENS]
    Path(out).write_text(" ".join(map(str, tokens)))


def load(folder, ids_file):
    tokens = torch.tensor([[int(i) for i in Path(ids_file).read_text().split()]])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval(), tokens


def read_logits(file, shape):
    return torch.frombuffer(bytearray(Path(file).read_bytes()), dtype=torch.float32).view(shape)


def compare(base, adapter, ids_file, logits_file):
    model, tokens = load(base, ids_file)
    with torch.no_grad():
        plain = model(tokens).logits[0]
        tuned = PeftModel.from_pretrained(model, adapter).eval()(tokens).logits[0]
    ours = read_logits(logits_file, tuned.shape)
    change = (tuned - plain).abs().max().item()
    difference = (tuned - ours).abs().max().item()
    print(f"{tokens.numel()} tokens: the adapter changes logits by up to {change:.4f}; nf4pack and PEFT differ by up to {difference:.2e}")
    # An adapter that changes nothing would prove nothing.
    return 0 if difference <= BOUND < change else 1


def merged(base, adapter, folder, ids_file, logits_file):
    model, tokens = load(folder, ids_file)
    exact = PeftModel.from_pretrained(load(base, ids_file)[0], adapter).merge_and_unload()
    exact.load_state_dict({name: weights.bfloat16().float() for name, weights in exact.state_dict().items()})
    with torch.no_grad():
        found, rounded = (model(tokens).logits[0] for model in (model, exact))
    ours = read_logits(logits_file, found.shape)
    rms = lambda x: x.square().mean().sqrt().item()
    relative, expected = (rms(logits - ours) / rms(ours) for logits in (found, rounded))
    print(f"{tokens.numel()} tokens: merged and adapted logits differ by {relative:.3%} RMS, up to {(found - ours).abs().max().item():.4f}; "
          f"an exact merge, rounded to bfloat16, by {expected:.3%}")
    return 0 if relative <= MERGED_BOUND * expected else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, help, *arguments):
        subparser = commands.add_parser(function.__name__, help=help)
        for argument in arguments:
            subparser.add_argument(argument)
        subparser.set_defaults(function=function)

    command(ids, "writes the tokens of a text file", "base", "text", "out")
    command(compare, "PEFT's logits against nf4pack's", "base", "adapter", "ids_file", "logits_file")
    command(merged, "a merged snapshot's logits against those of the adapter", "base", "adapter", "folder", "ids_file", "logits_file")
    arguments = vars(parser.parse_args())
    return arguments.pop("function")(**arguments)


if __name__ == "__main__":
    sys.exit(main())
