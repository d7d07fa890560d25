"""How far PEFT in bfloat16 is from PEFT in float32. Mixed precision of nf4pack has to stay within half of it.

- On tiny-qwen3 with the weights of the oracle: logits, each gradient of the first step, the losses of 20 steps and the
  adapter after them (src/tests/precision.rs).
- On the model of each architecture: hidden states and logits without the adapter, each gradient
  of the first step with it, and the losses of 20 steps (src/tests/architectures.rs).

Run by hand, not in CI; each table stands in the folder of its model:
    pip install -r tests/interop/requirements.txt
    python tests/interop/precision.py tests/fixtures/oracle/bf16.json tests/fixtures/architectures/*/bf16.json
"""
import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).parent.parent / "fixtures"
ORACLE = FIXTURES / "oracle"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The 16 values of NF4 (bitsandbytes, functional.py).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])


def weights(dtype: torch.dtype):
    """The model with the weights that the codes of the oracle represent."""
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "tiny-qwen3", dtype=torch.float32)
    stored = load_file(ORACLE / "nf4_absmax_b64.safetensors")
    for name, parameter in model.named_parameters():
        if f"{name}.absmax" in stored:
            packed = next(v for k, v in stored.items() if k.startswith(name) and v.dtype == torch.uint8).flatten()
            codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
            values = NF4[codes].view(-1, 64) * stored[f"{name}.absmax"][:, None]
            parameter.data.copy_(values.view_as(parameter))
    return model.to(dtype)


def run(dtype: torch.dtype) -> dict:
    oracle = json.loads((ORACLE / "oracle.json").read_text())
    # The adapter stays in float32, as PEFT has it by default.
    model = PeftModel.from_pretrained(weights(dtype), ORACLE / "adapter_init", is_trainable=True).to(DEVICE)
    batches = [[torch.tensor(x[i], device=DEVICE) for x in (oracle["batches"], oracle["labels"])] for i in range(4)]
    results = {"logits": {}, "gradients": {}, "losses": {}, "adapter": {}}
    with torch.no_grad():
        results["logits"]["all"] = model(batches[0][0]).logits.float().cpu()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.01)
    for step in range(20):
        tokens, labels = batches[step % 4]
        loss = model(tokens, labels=labels).loss
        loss.backward()
        if step == 0:
            results["gradients"] = {name: p.grad.float().cpu().clone() for name, p in trained.items()}
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        results["losses"][str(step)] = loss.detach().float().cpu()
    results["adapter"] = {name: p.detach().float().cpu() for name, p in trained.items()}
    return results


def run_architecture(folder: Path, dtype: torch.dtype) -> dict:
    row = json.loads((folder / "expected.json").read_text())
    tokens, labels = (torch.tensor([row[key]], device=DEVICE) for key in ("tokens", "labels"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(dtype).to(DEVICE)
    results = {"logits": {}, "gradients": {}, "losses": {}}
    with torch.no_grad():
        found = model(tokens, output_hidden_states=True)
    states = {f"hidden.{number}": state for number, state in enumerate(found.hidden_states)}
    results["logits"] = {name: x.float().cpu() for name, x in {**states, "logits": found.logits}.items()}
    model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    # A single loss may be right by chance.
    for step in range(20):
        loss = model(tokens, labels=labels).loss
        loss.backward()
        if step == 0:
            results["gradients"] = {name: p.grad.float().cpu().clone() for name, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        results["losses"][str(step)] = loss.detach().float().cpu()
    return results


def deviation(found: dict, expected: dict) -> dict:
    return {name: ((found[name] - x).norm() / x.norm()).item() for name, x in expected.items()}


def write(out: Path) -> None:
    folder = out.parent
    if folder.resolve() == ORACLE.resolve():
        exact, rounded = run(torch.float32), run(torch.bfloat16)
        losses = json.loads((ORACLE / "oracle.json").read_text())["losses"]
    else:
        exact, rounded = (run_architecture(folder, dtype) for dtype in (torch.float32, torch.bfloat16))
        losses = json.loads((folder / "expected.json").read_text())["losses"]
    worst = max(abs(exact["losses"][str(step)].item() - loss) for step, loss in enumerate(losses))
    assert worst < 1e-3, f"{out}: the float32 run is not the expected one: a loss differs by {worst}"
    table = {name: deviation(rounded[name], exact[name]) for name in exact}
    for part, values in table.items():
        short = {name: name.replace("base_model.model.model.", "").replace(".default", "") for name in values}
        table[part] = {short[name]: value for name, value in values.items()}
    for part, values in table.items():
        ordered = sorted(values.values())
        print(f"{out}, {part}: median {ordered[len(ordered) // 2]:.2e}, largest {ordered[-1]:.2e}")
    table["what"] = f"relative deviation of PEFT in bfloat16 from float32, on {DEVICE}"
    out.write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="+", help="the files to write: bf16.json in the folders of models")
    for out in parser.parse_args().out:
        write(out)


if __name__ == "__main__":
    main()
