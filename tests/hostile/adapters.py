"""Adapters: what is no file in place of their files, settings, patterns, headers and values that lie."""
import json
import os
import struct

from common import copy, fifo, link_to, replace, sparse, with_header

CONFIG, MATRICES = "adapter_config.json", "adapter_model.safetensors"

NO_FILES = {
    "fifo": fifo,
    "zero": link_to("/dev/zero"),
    "mem": link_to("/proc/self/mem"),
    "kmsg": link_to("/proc/kmsg"),
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path),
    "dangling": link_to("/nope\x1b[2J"),
    "sparse": sparse,
    "empty": lambda path: path.touch(),
    "terminal": link_to("/dev/ptmx"),
    "environ": link_to("/proc/self/environ"),
}
PATTERNS = {
    "nested": "(a+)+$",
    "back": "((?=.)(.*)*)*x\\1",
    "back2": "(.*)*\\1*(.*)*q",
    "huge": "(?:" + "a{1000}" * 50 + "){1000}",
    "long": "x" * 1_000_000,
    "alternatives": "|".join(["q_proj"] * 100_000),
    "deep": "(" * 5000 + ")" * 5000,
    "bad": "(\x1b[",
    "empty": "",
    "escape": "\x1b]0;\x07",
}
# The value that is right, or 1: an error.
SETTINGS = {
    **{f"r-{r}": ({"r": r}, 1) for r in [0, -1, 1.5, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 1e308, "8", None, True]},
    **{f"alpha-{str(a)[:8]}": ({"lora_alpha": a}, 1) for a in [float("nan"), float("inf"), -1, 0, "x", 10**400]},
    **{f"alpha-{a}": ({"lora_alpha": a}, None) for a in [1e308, 5e-324, None]},
    **{f"pattern-{name}": ({"target_modules": pattern}, 1) for name, pattern in PATTERNS.items()},
    "pattern-all": ({"target_modules": ".*"}, None),
    "targets-escape": ({"target_modules": ["\x1b[2J", "\u202e"] * 1000}, 1),
    "targets-many": ({"target_modules": ["q_proj"] * 1_000_000}, None),
    "targets-number": ({"target_modules": [1]}, 1),
    "targets-none": ({"target_modules": []}, 1),
    "layers-negative": ({"layers_to_transform": [-1]}, 1),
    "layers-huge": ({"layers_to_transform": [2**40]}, 1),
    "layers-many": ({"layers_to_transform": list(range(4)) * 200_000}, None),
    "layers-pattern": ({"layers_pattern": "(a+)+\\1", "layers_to_transform": [0]}, 1),
    "bias": ({"bias": "\x1b[2J"}, 1),
    "type": ({"peft_type": "\x1b]0;x\x07"}, 1),
    "exclude": ({"exclude_modules": ".*"}, 1),
    "dropout": ({"lora_dropout": 1e9}, None),
    "rank-pattern": ({"rank_pattern": {"q": 2**40}}, 1),
    "base": ({"base_model_name_or_path": "\x1b[2J\u202e"}, None),
    "init": ({"init_lora_weights": "pissa\x1b"}, 1),
}


def cases(bench):
    config = json.loads((bench.out / CONFIG).read_text())
    matrices = (bench.out / MATRICES).read_bytes()
    [length] = struct.unpack("<Q", matrices[:8])
    header, body = json.loads(matrices[8 : 8 + length]), matrices[8 + length :]
    first = next(name for name in header if name != "__metadata__")
    all_cases = []

    def add(name, change, expected=1):
        def run(work):
            adapter = work / "adapter"
            copy(bench.out, adapter, "checkpoint*", "*.html", "*tfevents*")
            change(adapter)
            arguments = ["generate", bench.pack, "--adapter", adapter, "--prompt", "ab", "--max-tokens", 1]
            return bench.judge(bench.run(arguments), expected)

        all_cases.append((name, run))

    def add_config(name, text, expected=1):
        add(f"config-{name}", lambda adapter: (adapter / CONFIG).write_text(text), expected)

    def add_matrices(name, data, expected=1):
        add(f"matrices-{name}", lambda adapter: (adapter / MATRICES).write_bytes(data()), expected)

    for file, short in [(CONFIG, "config"), (MATRICES, "matrices")]:
        for name, what in NO_FILES.items():
            add(f"{short}-{name}", lambda adapter, file=file, what=what: replace(adapter / file, what))
    add("matrices-sparse-tail", lambda adapter: sparse(adapter / MATRICES))
    add("no-config", lambda adapter: (adapter / CONFIG).unlink())
    add("bin", lambda adapter: (adapter / MATRICES).rename(adapter / "adapter_model.bin"))
    add("a-file", lambda adapter: (os.rename(adapter, f"{adapter}-"), adapter.write_text("x")))

    for name, (change, expected) in SETTINGS.items():
        add_config(name, json.dumps({**config, **change}), expected)
    start = json.dumps(config)[:-1]
    add_config("deep", "[" * 1_000_000)
    add_config("deep-object", '{"r":' + '{"a":' * 120 + "1" + "}" * 121)
    add_config("key-twice", start + ',"r":99999999}', None)
    add_config("nul", "\0" * 100)
    add_config("large", start + ',"x":"' + "a" * 200_000_000 + '"}')

    def changed(**change):
        return with_header({**header, first: {**header[first], **change}}, body)

    for name, number in {"max": 2**64 - 1, "2^63": 2**63, "0": 0}.items():
        add_matrices(f"length-{name}", lambda number=number: struct.pack("<Q", number) + b"{}")
    add_matrices("length-100m", lambda: struct.pack("<Q", 100_000_000) + b" " * 100_000_000)
    add_matrices("short", lambda: b"\x01")
    add_matrices("deep", lambda: with_header(b"[" * 100_000))
    add_matrices("deep-object", lambda: with_header(b'{"a":' * 100_000))
    twice = f',"{first}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}'.encode()
    add_matrices("name-twice", lambda: with_header(json.dumps(header).encode()[:-1] + twice, body))
    offsets = {"reversed": [10, 0], "huge": [0, 2**64 - 1], "negative": [-4, 0], "past": [0, 10**12]}
    for name, place in offsets.items():
        add_matrices(f"offsets-{name}", lambda place=place: changed(data_offsets=place))
    shapes = {"huge": [2**63, 2], "overflow": [2**32] * 2, "zero": [0], "many": [1] * 100_000, "both": [0, 2**64 - 1]}
    for name, shape in shapes.items():
        add_matrices(f"shape-{name}", lambda shape=shape: changed(shape=shape))
    for dtype in ["F64", "I8", "F8_E4M3", "BOOL", "\x1b[", "F4"]:
        add_matrices(f"type-{dtype.encode().hex()}", lambda dtype=dtype: changed(dtype=dtype))
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    add_matrices("names", lambda: with_header({**header, **{f"x\x1b{i}": empty for i in range(100_000)}}, body))
    other = "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"
    add_matrices("overlap", lambda: with_header({**header, other: header[first]}, body))
    far = {name.replace("layers.0.", "layers.4294967295."): tensor for name, tensor in header.items()}
    add_matrices("layer", lambda: with_header(far, body))
    values = {"nan": (b"\0\0\xc0\x7f", 1), "infinite": (b"\0\0\x80\x7f", 1), "largest": (b"\xff\xff\x7f\x7f", None)}
    for name, (value, expected) in values.items():
        add_matrices(name, lambda value=value: with_header(header, value * (len(body) // 4)), expected)
    add_matrices("cut", lambda: matrices[:-1])
    add_matrices("longer", lambda: matrices + b"x")
    add_matrices("zip", lambda: b"PK\x03\x04" + b"x" * 100)
    add_matrices("pickle", lambda: b"\x80\x02" + b"x" * 100)
    add_matrices("metadata", lambda: with_header({**header, "__metadata__": {"a": "\x1b" * 1_000_000}}, body), None)
    add_matrices("metadata-object", lambda: with_header({**header, "__metadata__": {"a": {"b": 1}}}, body), None)
    return all_cases
