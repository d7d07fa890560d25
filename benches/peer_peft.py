"""The peer of `nf4pack bench train`: PEFT with bitsandbytes on the same shape, on a CUDA GPU.

    python benches/peer_peft.py [--checkpoint] BxS...

The model has random weights in the shape of Qwen3-4B, quantised to NF4 with double quantisation;
rank 16, all seven targets, bfloat16, scaled-dot-product attention, AdamW. A step is forward,
backward and update. Prints the median of tokens/s and the peak of the allocated memory. Needs torch,
transformers, peft and bitsandbytes.
"""
import argparse
import statistics
import time

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def quantised(model):
    """Replaces the projections of the layers."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name.endswith("lm_head"):
            continue
        linear = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        linear.weight = bnb.nn.Params4bit(
            module.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear
        ).to("cuda")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
        module.weight = None
    model.is_loaded_in_4bit = True
    return model


def model(checkpoint):
    config = Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        base = Qwen3ForCausalLM(config)
    base.requires_grad_(False)
    base = quantised(base)
    if checkpoint:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    adapted = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    adapted.train()
    return adapted


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", metavar="BxS", help="batch and tokens of a sample")
    parser.add_argument("--checkpoint", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default 5)")
    args = parser.parse_args()
    adapted = model(args.checkpoint)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    for shape in args.shapes:
        batch, length = map(int, shape.split("x"))
        tokens = torch.randint(0, 151936, (batch, length), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        times = []
        for step in range(args.steps + 2):
            torch.cuda.synchronize()
            began = time.perf_counter()
            adapted(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            # The first two compile and allocate.
            if step >= 2:
                times.append(time.perf_counter() - began)
        rate = batch * length / statistics.median(times)
        peak = torch.cuda.max_memory_allocated() / 2**30
        mode = "checkpointed" if args.checkpoint else "all kept"
        print(f"{shape}, {mode}: {rate:,.0f} tokens/s, {peak:.1f} GiB", flush=True)


if __name__ == "__main__":
    main()
