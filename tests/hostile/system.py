"""Limits of the size of a file, signals and kills in what writes; modes of packs."""
import os
import shutil
import signal
import subprocess
import time

from common import SHARED_MODELS, leftovers

COMMANDS = ["convert", "export", "merge", "train"]


def command(bench, name, out):
    return {
        "convert": ["convert", SHARED_MODELS / "tiny-qwen3", out],
        "export": ["export", bench.pack, out],
        "merge": ["merge", bench.pack, "--adapter", bench.out, "--base", "dequant", "--out", out, "--no-compare"],
        "train": bench.train(bench.pack, out, 2, "--save-every", "1"),
    }[name]


def cases(bench):
    def limited(name, limit):
        def run(work):
            out = work / "o"
            result = bench.run(command(bench, name, out), file_size=limit)
            found = bench.judge(result, 1 if limit <= 4_000_000 else None) + leftovers(work)
            if limit == 0:
                # The error goes to a file, which has the same limit.
                found = [line for line in found if line != "no error is printed"]
            partial = name != "train" and result.rc != 0 and out.exists()
            return found + (["a part of the output"] if partial else [])

        return run

    def killed(name, after, number):
        def run(work):
            out = work / "o"
            args = [bench.program, *(str(arg) for arg in command(bench, name, out))]
            process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(after)
            process.send_signal(number)
            process.wait()
            found = [] if number == signal.SIGKILL else leftovers(work)
            if name in ("export", "merge") and out.exists():
                return [*found, "= it was complete"]
            again = [*command(bench, name, out), *(["--force"] if name == "convert" else [])]
            return found + bench.judge(bench.run(again)) + leftovers(work)

        return run

    def mode(of_source, mask):
        def run(work):
            source, pack = work / "s", work / "o.nf4pack"
            shutil.copytree(SHARED_MODELS / "tiny-qwen3", source)
            for file in source.iterdir():
                file.chmod(0o644)
            next(source.iterdir()).chmod(of_source)
            before = os.umask(mask)
            result = bench.run(["convert", source, pack, "--quiet"])
            os.umask(before)
            if result.rc != 0:
                return bench.judge(result, 0)
            found = pack.stat().st_mode & 0o777
            return [f"mode {found:o}"] if found & ~(of_source & 0o644) & 0o077 else [f"= mode {found:o}"]

        return run

    all_cases = [
        (f"size-{limit}/{name}", limited(name, limit))
        for name in COMMANDS
        for limit in (0, 1, 4096, 102_400, 500_000, 900_000)
    ]
    all_cases += [
        (f"{number.name}-{after}/{name}", killed(name, after, number))
        for name in COMMANDS
        for after in (0.02, 0.05, 0.1, 0.4)
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    ]
    # The mask of the process is one for all threads, so these run with a mask of 0 alone.
    return all_cases + [(f"mode-{m:o}", mode(m, 0)) for m in (0o600, 0o640, 0o644, 0o400, 0o660, 0o604)]
