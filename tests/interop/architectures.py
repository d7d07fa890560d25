"""Writes tests/fixtures/architectures: tiny random models of each supported architecture, and what transformers and PEFT make of them
in float32.

    python tests/interop/architectures.py             # all of them
    python tests/interop/architectures.py granite     # some of them

Of every model NAME there is then
    NAME/config.json             as the table below has it: transformers and nf4pack read the same keys
    NAME/model.safetensors       projections that NF4 holds exactly, so that a pack with absmax scales in float32 has the same weights
    NAME/adapter                 a PEFT adapter of all projections whose B is not zero
    NAME/expected.json           a row of tokens, its labels, and the losses of three steps with the adapter
    NAME/expected.safetensors    hidden states and logits without the adapter, and the gradients of the first loss
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

FIXTURES = Path(__file__).parent.parent / "fixtures" / "architectures"
TOKENS = 24
# The training: optimiser steps and their learning rate.
STEPS = 3
LR = 1e-3
BLOCK = 64
# The bits of NF4's 16 values in float32.
CODEBOOK = [
    0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
    0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000,
]  # fmt: skip
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"]

COMMON = {"hidden_act": "silu", "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 256}
# SmolLM3's defaults are past these vocabularies.
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# Lengths of first trainings are so short that each scaling has something to do within the row.
MODELS = {
    # Every bias there is, heads that do not add up to the hidden size.
    "llama": {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 60,
        "intermediate_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    # No bias, a size of heads that follows from the others, a window of all layers that is shorter
    # than the row.
    "mistral": {
        "model_type": "mistral",
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "sliding_window": 7,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    # Biases of queries, keys and values, a tied head, last blocks that are not full; the keys of
    # configurations before transformers 5.
    "qwen2": {
        "model_type": "qwen2",
        "vocab_size": 96,
        "hidden_size": 84,
        "intermediate_size": 96,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "max_position_embeddings": 64,
        "rope_theta": 100.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    # Biases before norms per head, as many keys as queries, a theta that has grown: the row is
    # longer than the model was made for.
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 20,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "max_position_embeddings": TOKENS // 2,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    # All four factors, biases of the projections whose outputs are scaled, a tied head.
    "granite": {
        "model_type": "granite",
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.11,
        "residual_multiplier": 0.22,
        "logits_scaling": 1.7,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    # A layer without rotary embedding between others, by the default interval of 4; a head that is
    # tied by default.
    "smollm3": {
        "model_type": "smollm3",
        **NO_SPECIAL_TOKENS,
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    },
    # Rotary embedding and windows layer by layer: the layers without rotary embedding are those
    # with a window.
    "smollm3_windows": {
        "model_type": "smollm3",
        **NO_SPECIAL_TOKENS,
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "attention_bias": True,
        "mlp_bias": True,
        "no_rope_layers": [0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 9,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    # Biases of queries, keys and values by default, none of attention's output, and those of the
    # feed-forward network.
    "seed_oss": {
        "model_type": "seed_oss",
        "vocab_size": 96,
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    # A bias of attention's output alone, which in other families has the same key as the others.
    "seed_oss_out_bias": {
        "model_type": "seed_oss",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 20,
        "attention_bias": False,
        "attention_out_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    # A window from a layer on.
    "qwen2_windows": {
        "model_type": "qwen2",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    },
    # Windows by `layer_types`. With it, `rope_scaling` counts and not `rope_parameters`, as where
    # a user adds what a model card says.
    "qwen3_windows": {
        "model_type": "qwen3",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_position_embeddings": 64,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rope_scaling": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    # Fused projections, a rotary embedding of three quarters of each head, a window of all layers.
    "phi3": {
        "model_type": "phi3",
        **NO_SPECIAL_TOKENS,
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 11,
        "partial_rotary_factor": 0.75,
        "rope_theta": 1000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    },
    # Keys of configurations before transformers 5: a base wavelength of layers with a window, a
    # scaling of the others; a pattern of windows, and a head that is tied by default.
    "gemma3": {
        "model_type": "gemma3_text",
        **NO_SPECIAL_TOKENS,
        "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "query_pre_attn_scalar": 40,
        "sliding_window": 7,
        "sliding_window_pattern": 2,
        "rope_theta": 50000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    # Parameters of each kind of layer, `layer_types`, biases, a head of its own.
    "gemma3_kinds": {
        "model_type": "gemma3_text",
        **NO_SPECIAL_TOKENS,
        "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 20000.0},
            "sliding_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        },
    },
    # The activation under the name that the first checkpoints have, biases of attention, a head
    # that is tied by default.
    "gemma": {
        "model_type": "gemma",
        **NO_SPECIAL_TOKENS,
        "hidden_act": "gelu",
        "vocab_size": 96,
        "hidden_size": 36,
        "intermediate_size": 56,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "attention_bias": True,
        "rope_theta": 1000.0,
    },
}


def exact_in_nf4(shape):
    """A matrix of NF4's values times a scale a block. The first value of each block is 1 or -1, so that its absmax is the scale."""
    rows, inputs = shape
    blocks = -(-rows * inputs // BLOCK)
    codes = torch.randint(16, (blocks, BLOCK))
    codes[:, 0] = 15 * torch.randint(2, (blocks,))
    values = torch.tensor(CODEBOOK, dtype=torch.int64).to(torch.int32).view(torch.float32)
    scales = (0.5 + torch.rand(blocks, 1)) * 2 / inputs**0.5
    return (values[codes] * scales).flatten()[: rows * inputs].reshape(shape)


def random_weight(name, shape):
    if name.split(".")[-2] in PROJECTIONS and len(shape) == 2:
        return exact_in_nf4(shape)
    if "norm" in name:
        return 1 + 0.3 * torch.randn(shape)
    return 0.5 * torch.randn(shape)


def write_model(folder, config):
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {name: random_weight(name, w.shape) for name, w in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without_adapter(model, tokens):
    """Hidden states before each layer and after the last one, and logits."""
    # transformers gives the last one after the final norm.
    last = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
    hook.remove()
    states = [*out.hidden_states[:-1], *last]
    return {f"hidden.{i}": state[0] for i, state in enumerate(states)} | {"logits": out.logits[0]}


def with_adapter(model, name, folder, tokens, labels):
    """Writes an adapter; the losses of its training on the row, and the gradients of the first one."""
    modules = {name.split(".")[-1] for name, _ in model.named_modules()}
    targets = [name for name in PROJECTIONS if name in modules]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    parameters = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    for parameter in (p for n, p in parameters.items() if "lora_B" in n):
        torch.nn.init.normal_(parameter, std=0.1)
    # Not where it lies on this machine.
    config.base_model_name_or_path = name
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    # A set, in another order each time.
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"].sort()
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    gradients, losses = None, []
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(tokens, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {n: p.grad.clone() for n, p in parameters.items()}
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
    return losses, gradients


def write_fixture(name, config):
    torch.manual_seed(list(MODELS).index(name))
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_model(folder, config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(config["vocab_size"], (1, TOKENS))
    labels = tokens.masked_fill(torch.rand(1, TOKENS) < 0.3, -100)
    expected = without_adapter(model, tokens)
    losses, gradients = with_adapter(model, name, folder / "adapter", tokens, labels)
    tensors = {n: t.contiguous() for n, t in (expected | gradients).items()}
    save_file(tensors, folder / "expected.safetensors")
    row = {"tokens": tokens[0].tolist(), "labels": labels[0].tolist(), "losses": losses}
    (folder / "expected.json").write_text(json.dumps(row) + "\n")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{name}: losses {losses}, logits up to {expected['logits'].abs().max():.1f}, {size // 1000} kB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME", help="a model; all where none is given")
    for name in parser.parse_args().names:
        write_fixture(name, COMMON | MODELS[name])


if __name__ == "__main__":
    main()
