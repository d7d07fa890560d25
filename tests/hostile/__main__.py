"""Gives hostile files to nf4pack, kind by kind; docs/reliability.md has the results.

Run by hand, not in CI, from the project's root (it needs ../shared/attack/packlib.py and a GPU, of software or not):
    cargo build
    python3 tests/hostile [KIND ...] [--program target/debug/nf4pack] [--only WORD] [--at-a-time 2]

A case fails where the program ends by a signal or a panic, is killed after 60 s, takes more than 5 s of processor time
or 1 GB of memory, writes control characters of the file to the terminal, leaves hidden files, takes what it should
refuse, or says nothing.
"""
import argparse
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from common import Bench

KINDS = ["tokenizer_files", "adapters", "packs", "configs", "checkpoints", "system", "templates", "two", "data"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--program", default="target/debug/nf4pack", type=Path)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--at-a-time", default=2, type=int)
    args = parser.parse_args()
    tally = []
    with TemporaryDirectory(prefix="nf4pack-hostile-") as folder:
        bench = Bench(args.program.resolve(), Path(folder))
        for kind in args.kinds or KINDS:
            cases = [(name, run) for name, run in import_module(kind).cases(bench) if args.only in name]

            def one(case, kind=kind):
                name, run = case
                work = bench.work / kind / name.replace("/", "_").replace("^", "_")
                work.mkdir(parents=True)
                try:
                    return bench.report(f"{kind}/{name}", run(work))
                finally:
                    shutil.rmtree(work, ignore_errors=True)

            with ThreadPoolExecutor(1 if kind == "two" else args.at_a_time) as pool:
                failed = list(pool.map(one, cases)).count(False)
            tally.append((kind, len(cases), failed))
    for kind, tried, failed in tally:
        print(f"{kind}: {tried} tried, {failed} failed")
    return 1 if any(failed for _, _, failed in tally) else 0


if __name__ == "__main__":
    sys.exit(main())
