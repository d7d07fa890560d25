"""JSON Lines: long lines, many messages, nesting, keys, encodings, escapes, files without end."""
import json

from common import link_to, sparse


def messages(list_of_messages, **more):
    return json.dumps({"messages": list_of_messages, **more}) + "\n"


def turns(count, content=lambda number: "x"):
    roles = ["user", "assistant"]
    return messages([{"role": roles[i % 2], "content": content(i)} for i in range(count)])


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SHOWN = ["esc-role-shown", "esc-shown", "lines-200k"]

# What a file says, and the exit code if only one is right.
CASES = {
    "text-100mb": (lambda: json.dumps({"text": "a " * 50_000_000}), 1),
    "message-100mb": (lambda: messages([{"role": "user", "content": "a " * 50_000_000}, ASSISTANT]), 1),
    "text-15mb": (lambda: json.dumps({"text": "ab c" * 3_500_000}), 1),
    "letter-15mb": (lambda: json.dumps({"text": "a" * 15_000_000}), 1),
    "text-2mb": (lambda: json.dumps({"text": "ab c" * 500_000}), None),
    "messages-10k": (lambda: turns(10_000, lambda i: f"w{i}"), None),
    "messages-20k-same": (lambda: turns(19_998), None),
    "messages-25k": (lambda: turns(25_000), 1),
    "deep-key": (lambda: messages([USER, {**ASSISTANT, "x": 1}]).replace('"x": 1', '"x":' + "[" * 120 + "]" * 120), None),
    "deep": (lambda: "[" * 1_000_000, 1),
    "deep-object": (lambda: '{"messages":' * 100_000, 1),
    "tools-deep": (lambda: messages([USER, ASSISTANT], tools=[json.loads("[" * 90 + "]" * 90)]), None),
    "tools-20k": (
        lambda: messages([USER, ASSISTANT], tools=[{"type": "function", "function": {"name": f"f{i}"}} for i in range(20_000)]),
        None,
    ),
    "keys-60k": (lambda: json.dumps({"text": "a", **{f"k\x1b{i}": i for i in range(60_000)}}), None),
    "key-1mb": (lambda: json.dumps({"text": "a", "k" * 1_000_000: 1}), None),
    "keys-unknown-form": (lambda: json.dumps({f"k{i}": i for i in range(100_000)}), 1),
    "number": (lambda: messages([{**USER, "n": 10**400}, ASSISTANT]), None),
    "nul": (lambda: "\0" * 1000, 1),
    "mark": (lambda: "\ufeff" + json.dumps({"text": "a b c"}), None),
    "utf16": (lambda: '{"text":"a"}'.encode("utf-16"), 1),
    "invalid": (lambda: b'{"text":"\xff\xfe"}', 1),
    "surrogate": (lambda: '{"text":"\\ud800 a"}', None),
    "esc-role": (lambda: messages([{"role": "\x1b]0;x\x07", "content": "a"}, {**ASSISTANT, "content": "\x1b[2J"}]), None),
    "esc-role-shown": (lambda: messages([{"role": "\u202e", "content": "a"}]), None),
    "esc-shown": (
        lambda: messages([{**USER, "content": "\x1b[2J\u202e\u009b"}, {**ASSISTANT, "content": "\x1b]0;x\x07b"}]),
        None,
    ),
    "blank-lines": (lambda: "\n" * 5_000_000, 1),
    "blanks": (lambda: b" " * 50_000_000, 1),
    "lines-200k": (lambda: '{"text":"a"}\n' * 200_000, None),
    "no-lines": (lambda: b"x" * 100_000_000, 1),
    "variables": (lambda: messages([USER, ASSISTANT], chat_template_kwargs={"messages": 1, "x": 10**30, "range": "x"}), None),
    "parts-50k": (lambda: messages([{**USER, "content": [{"type": "text", "text": "a"}] * 50_000}, ASSISTANT]), None),
    "weight": (lambda: messages([USER, {**ASSISTANT, "weight": 1e308}]), None),
    "history": (lambda: json.dumps({"instruction": "a", "output": "b", "history": [["a", "b"]] * 9999}), None),
    "damage-after-1000": (lambda: '{"text":"a"}\n' * 1000 + '{"text":"a', 1),
}
NO_FILES = {"sparse": sparse, "zero": link_to("/dev/zero")}


def cases(bench):
    def case(write, expected, show):
        def run(work):
            path = work / "data.jsonl"
            write(path)
            if show:
                arguments = ["train", bench.pack, "--data", path, "--show-batch", "--max-length", 64]
            else:
                arguments = ["eval", bench.pack, "--data", path, "--max-length", 64]
            return bench.judge(bench.run(arguments), expected)

        return run

    def text(make):
        def write(path):
            data = make()
            path.write_bytes(data if isinstance(data, bytes) else data.encode())

        return write

    files = [(name, case(text(make), expected, name in SHOWN)) for name, (make, expected) in CASES.items()]
    return files + [(name, case(what, 1, False)) for name, what in NO_FILES.items()]
