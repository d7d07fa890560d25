#!/usr/bin/env python3
"""What transformers computes with dynamic scaling of the rotary embedding, by the length of each text.

Writes lengths.json into tests/fixtures/architectures/qwen3, whose model was made for fewer tokens than its row has. Each text goes
through a model of its own, because transformers keeps the frequencies of the longest text so far. A generated text uses the cache: the
prompt is rotated by the prompt's length, each later token by the length up to it, and what is in the cache stays as it is.

    python tests/interop/dynamic_rope.py
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).resolve().parent.parent / "fixtures/architectures/qwen3"
LENGTHS = [8, 12, 17, 24]
PROMPTS = [5, 16]
NEW_TOKENS = 14


def fresh():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").eval()


def loss(tokens):
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return fresh()(ids, labels=ids).loss.item()


def generate(prompt):
    """Tokens, each with its score and that of the next best, so that a test knows how clear the choice was."""
    model, cache, ids, found = fresh(), None, torch.tensor([prompt]), []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            out = model(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best = out.logits[0, -1].topk(2)
        found.append({"token": best.indices[0].item(), "score": best.values[0].item(), "margin": (best.values[0] - best.values[1]).item()})
        ids = best.indices[:1].unsqueeze(0)
    return found


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    row = json.loads((FOLDER / "expected.json").read_text())["tokens"]
    expected = {
        "losses": [{"length": length, "loss": loss(row[:length])} for length in LENGTHS],
        "generated": [{"prompt": length, "tokens": generate(row[:length])} for length in PROMPTS],
    }
    (FOLDER / "lengths.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
