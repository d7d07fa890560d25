"""Packs with a bit flipped in each part, cut, or longer; each under eight commands."""
import random

from common import leftovers

COMMANDS = ["inspect", "verify", "export", "generate", "eval", "train", "merge", "doctor"]
# They read no payload.
LAZY = ["inspect", "doctor"]


def command(bench, name, pack, out):
    more = {
        "inspect": ["--tensors"],
        "verify": [],
        "export": [out],
        "generate": ["--prompt", "a", "--max-tokens", 1],
        "eval": ["--data", bench.data, "--max-length", 32],
        "merge": ["--adapter", bench.out, "--base", "dequant", "--out", out, "--no-compare"],
        "doctor": [],
    }
    return bench.train(pack, out, 1) if name == "train" else [name, pack, *more[name]]


def cases(bench):
    rng = random.Random(5)
    of_kind = lambda kind: [section for section in bench.sections if section.kind == kind]
    file = lambda name: next(section for section in of_kind(4) if section.name == name)
    places = {"header": rng.randrange(8, 128), "magic": 3, "index": rng.randrange(128, 4000)}
    parts = {
        "file-config": file(b"config.json"),
        "file-tokenizer": file(b"tokenizer.json"),
        "codes": of_kind(1)[0],
        "scales": of_kind(2)[0],
        "raw": of_kind(3)[0],
        "codes-last": of_kind(1)[-1],
    }
    places |= {name: section.off + len(section.payload) // 2 for name, section in parts.items()}

    def case(pack, name, expected):
        def run(work):
            path, out = work / "p.nf4pack", work / "out"
            path.write_bytes(pack)
            found = bench.judge(bench.run(command(bench, name, path, out)), expected) + leftovers(work)
            # A training leaves its report.
            files = [path.name for path in out.iterdir()] if out.exists() and name != "train" else []
            return found + ([f"written: {files}"] if expected == 1 and files else [])

        return run

    all_cases = []
    for part, at in places.items():
        flipped = bytearray(bench.base)
        flipped[at] ^= 1 << rng.randrange(8)
        for name in COMMANDS:
            expected = None if name in LAZY and part in parts else 1
            all_cases.append((f"flip-{part}/{name}", case(bytes(flipped), name, expected)))
    whole = len(bench.base)
    for cut in [0, 1, 100, 128, 5000, whole // 2, whole - 1]:
        all_cases += [(f"cut-{cut}/{name}", case(bench.base[:cut], name, 1)) for name in COMMANDS]
    return all_cases + [(f"longer/{name}", case(bench.base + b"x", name, 1)) for name in COMMANDS]
