"""The files of a training's checkpoint, changed; then --resume."""
import os

from common import copy, fifo, link_to, replace, sparse


def flip(share):
    def change(path):
        data = bytearray(path.read_bytes())
        data[int(len(data) * share)] ^= 1
        path.write_bytes(data)

    return change


def aside(path):
    """The file itself, behind a link."""
    other = path.with_name(path.name + ".o")
    path.rename(other)
    path.symlink_to(other)


CHANGES = {
    **{f"flip-{share}": flip(share) for share in (0.05, 0.5, 0.999)},
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "fifo": lambda path: replace(path, fifo),
    "zero": lambda path: replace(path, link_to("/dev/zero")),
    "sparse": sparse,
    "link": aside,
    "folder": lambda path: replace(path, lambda path: path.mkdir()),
}
METRICS = ["fifo", "zero", "sparse", "link", "folder"]
OF_METRICS = {
    "garbage": lambda path: path.write_bytes(b"\x1b[2J\n" * 1000),
    "deep": lambda path: path.write_bytes(b"[" * 1_000_000),
}


def cases(bench):
    [checkpoint] = bench.out.glob("checkpoint-*")

    def case(change, expected):
        def run(work):
            out = work / "out"
            copy(bench.out, out)
            change(out)
            return bench.judge(bench.run(bench.train(bench.pack, out, 2, "--resume")), expected)

        return run

    def of(name, change):
        return lambda out: change(out / checkpoint.name / name)

    all_cases = [
        (f"{what}-{name}", case(of(name, change), 1))
        for name in sorted(path.name for path in checkpoint.iterdir())
        for what, change in CHANGES.items()
    ]
    metrics = {name: CHANGES[name] for name in METRICS} | OF_METRICS
    for what, change in metrics.items():
        all_cases.append((f"{what}-metrics.jsonl", case(lambda out, change=change: change(out / "metrics.jsonl"), None)))
    names = {"far": "checkpoint-4294967295", "huge": "checkpoint-99999999999999999999", "escape": "checkpoint-\x1b[2J"}
    for what, name in names.items():
        all_cases.append((f"name-{what}", case(lambda out, name=name: (out / checkpoint.name).rename(out / name), 1)))
    return all_cases
