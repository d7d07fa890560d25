"""Mean log-loss of snapshot folders on a text, by transformers in float32: does an export load, and what did 4 bits cost?

Run by hand, not in CI:
    pip install -r tests/interop/requirements.txt
    nf4pack export model.nf4pack model-nf4
    python tests/interop/loss.py --text held-out.txt original model-nf4
"""
import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 512


def mean_loss(folder: str, text: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    total = count = 0
    with torch.no_grad():
        for start in range(0, ids.shape[1] - 1, WINDOW):
            window = ids[:, start : start + WINDOW + 1]
            logits = model(window[:, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
            count += window.shape[1] - 1
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True)
    parser.add_argument("--bytes", type=int, default=30_000, help="how much of the text is used")
    parser.add_argument("folders", nargs="+", help="the first one is what the others are compared with")
    args = parser.parse_args()
    text = open(args.text, encoding="utf-8").read(args.bytes)
    base = None
    for folder in args.folders:
        loss = mean_loss(folder, text)
        base = loss if base is None else base
        print(f"{folder}: loss {loss:.5f}, {loss - base:+.5f}")


if __name__ == "__main__":
    main()
