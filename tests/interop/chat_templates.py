"""Writes what transformers makes of conversations with the templates of tests/fixtures/templates.

    python tests/interop/chat_templates.py > tests/fixtures/templates/expected.jsonl

Of each conversation: its text; the characters that transformers' assistant mask has, where the template has {% generation %}; and
where the prompt of the last answer ends (TRL's border between prompt and completion), if the text begins with that prompt.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent.parent / "fixtures" / "templates"
EOS = {
    "llama2": "</s>", "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "mistral_v1": "</s>", "mistral_v3": "</s>", "mistral_nemo": "</s>",
    "gemma": "<end_of_turn>", "phi3": "<|endoftext|>", "deepseek_r1": "<｜end▁of▁sentence｜>", "granite": "<|end_of_text|>",
    "zephyr": "</s>", "vicuna": "</s>",
}
CALLS = {"qwen2_5", "qwen3", "mistral_v3", "deepseek_r1", "hermes_tools"}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks <up>."}}]


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def conversations(name):
    """Questions and answers in turn, for every template; then calls, for those that know them."""
    yield [say("user", "Hi"), say("assistant", "Hello.")], None
    yield [say("user", "Hello."), say("assistant", "Hello.\nHello."), say("user", "été 漢字"), say("assistant", "<b>\"bold\"</b>")], None
    yield [say("user", "One?"), say("assistant", ""), say("user", "Two?"), say("assistant", "  Second. \n")], None
    yield [say("user", "a"), say("assistant", "<|im_end|>"), say("user", "</s>"), say("assistant", "[/INST] 'x'"), say("user", "b")], None
    if name != "mistral_v1":
        yield [say("system", "Be kind."), say("user", "Hi"), say("assistant", "Ho"), say("user", "Bye"), say("assistant", "So long.")], None
    if name in {"qwen3", "qwq", "deepseek_r1"}:
        thought = "<think>\nHm.\n</think>\n\n"
        yield [say("user", "a"), say("assistant", thought + "b"), say("user", "c"), say("assistant", thought + "d")], None
    if name in CALLS:
        arguments = '{"q": "sky"}' if name == "deepseek_r1" else {"q": "sky", "n": 2, "deep": {"a": [1.5, None, True]}}
        call = {"type": "function", "id": "abcdefghi", "function": {"name": "look", "arguments": arguments}}
        calls = say("assistant", "", tool_calls=[call])
        yield [say("user", "Rain?"), calls, say("tool", "12", tool_call_id="abcdefghi"), say("assistant", "12.")], TOOLS


def tokenizer(name):
    """A token for each character, so that a mask of tokens is one of characters."""
    characters = {chr(c): c for c in range(0x3000)} | {c: 0x3000 + i for i, c in enumerate("漢字｜")}
    inner = Tokenizer(models.WordLevel(characters | {"<unk>": 0x4000}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    made.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return made


def case(name, messages, tools):
    made = tokenizer(name)
    tokens = dict(bos_token="<s>", eos_token=EOS.get(name, "<|im_end|>"), tools=tools)
    text = made.apply_chat_template(messages, tokenize=False, **tokens)
    found = {"template": name, "messages": messages, "tools": tools, "text": text}
    if "{%- generation %}" in made.chat_template:
        encoded = made.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **tokens)
        assert len(encoded["input_ids"]) == len(text)
        found["mask"] = "".join(map(str, encoded["assistant_masks"]))
    # Without a generation prompt TRL's completion begins with the header.
    if messages[-1]["role"] == "assistant" and name != "chatml_no_prompt":
        prompt = made.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True, **tokens)
        if text.startswith(prompt):
            found["prompt"] = len(prompt)
    return found


names = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
# The date is that of the day.
chosen = [(name, *conversation) for name in names if name != "granite" for conversation in conversations(name)]
cases = [case(name, messages, TOOLS if name == "hermes_tools" else tools) for name, messages, tools in chosen]
for found in cases:
    print(json.dumps(found, ensure_ascii=False))
