"""The program, run below limits, and what counts as a failure."""
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT.parent / "shared" / "attack"))
import packlib  # noqa: E402

SHARED_MODELS = ROOT.parent / "shared" / "models"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f\u0080-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# What some drivers write.
NOISE = b"error: XDG_RUNTIME_DIR is invalid or not set in the environment.\n"


class Result:
    def __init__(self, rc, out, err, cpu, rss, timed_out):
        self.rc, self.out, self.err = rc, out, err.replace(NOISE, b"")
        self.cpu, self.rss, self.timed_out = cpu, rss, timed_out


class Bench:
    """The program, a good pack, a good adapter with a checkpoint, and a folder for files."""

    def __init__(self, program: Path, work: Path):
        self.program, self.work = program, work
        self.data = ROOT / "tests" / "fixtures" / "chat.jsonl"
        self.pack = work / "tiny.nf4pack"
        subprocess.run([program, "convert", SHARED_MODELS / "tiny-qwen3", self.pack, "--quiet"], check=True)
        self.base = self.pack.read_bytes()
        self.sections, _, _, _ = packlib.parse(self.base)
        self.tokenizer, self.config = self.file(b"tokenizer.json"), self.file(b"config.json")
        self.out = work / "trained"
        trained = self.run(self.train(self.pack, self.out, 1))
        if trained.rc != 0:
            sys.exit(f"hostile: the training that the others start from failed: {trained.err[-500:]!r}")

    def file(self, name: bytes):
        return json.loads(next(section.payload for section in self.sections if section.name == name))

    def train(self, pack: Path, out: Path, steps: int, *more):
        small = ["--rank", "2", "--max-length", "32", "--micro-batch", "1"]
        return ["train", pack, "--data", self.data, "--out", out, "--steps", steps, *small, *more]

    def run(self, args, stdin=b"", timeout=60, memory=4_000_000, file_size=None) -> Result:
        """Runs the program with `memory` KB of address space."""

        def limit():
            resource.setrlimit(resource.RLIMIT_AS, (memory * 1024,) * 2)
            if file_size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size,) * 2)

        files = [os.memfd_create(name) for name in ("in", "out", "err")]
        os.write(files[0], stdin)
        os.lseek(files[0], 0, os.SEEK_SET)
        start = time.time()
        arguments = [self.program, *(str(arg) for arg in args)]
        process = subprocess.Popen(arguments, stdin=files[0], stdout=files[1], stderr=files[2], preexec_fn=limit)
        timed_out, rss = False, 0
        while True:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                rss = max([rss, *(int(kb) for kb in re.findall(r"VmHWM:\s*(\d+)", status))])
            except OSError:
                pass
            pid, code, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.time() - start > timeout:
                timed_out = True
                process.kill()
                _, code, usage = os.wait4(process.pid, 0)
                break
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(code)
        outputs = []
        for file in files[1:]:
            os.lseek(file, 0, os.SEEK_SET)
            outputs.append(os.read(file, 4 << 20))
        for file in files:
            os.close(file)
        return Result(process.returncode, *outputs, usage.ru_utime + usage.ru_stime, rss // 1024, timed_out)

    def judge(self, result: Result, expected=None) -> list:
        """What is wrong with a run. `expected` is its exit code, if only one is right."""
        found = []
        if result.timed_out:
            found.append("killed after its time")
        if result.rc < 0 or result.rc >= 101:
            found.append(f"exit code {result.rc}")
        both = (result.out + result.err).lower()
        if b"panicked" in both or b"this is a bug" in both:
            found.append("a panic")
        if result.cpu > 5:
            found.append(f"{result.cpu:.1f} s of processor time")
        if result.rss > 1000:
            found.append(f"{result.rss} MB")
        if CONTROL.search(result.err.decode("utf-8", "replace")):
            found.append("control characters")
        if expected is not None and result.rc != expected:
            found.append(f"exit code {result.rc}, not {expected}")
        if result.rc == 1 and not result.err.strip():
            found.append("no error is printed")
        last = result.err.strip()
        at = last.rfind(b"error:")
        found.append(f"= {result.rc}, {result.cpu:.1f} s, {result.rss} MB: {last[at if at >= 0 else -120:][:150]!r}")
        return found

    def report(self, name: str, found: list) -> bool:
        """Prints a case; gives whether it is as it should be. What begins with = is for the reader only."""
        wrong = [line for line in found if not line.startswith("=")]
        said = "; ".join(line[2:] for line in found if line.startswith("="))
        print("FAILED" if wrong else "ok", name, *wrong, said, sep="  ", flush=True)
        return not wrong


def leftovers(folder: Path) -> list:
    """Hidden files and folders below a folder."""
    hidden = [str(path) for path in folder.rglob(".nf4pack-*")] + [str(path) for path in folder.rglob(".tmp*")]
    return [f"left over: {hidden}"] if hidden else []


def with_header(header, body=b"") -> bytes:
    """A safetensors file."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


def replace(path: Path, what) -> None:
    """Puts something else in place of a file."""
    path.unlink()
    what(path)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to(target):
    return lambda path: path.symlink_to(target)


def sparse(path: Path) -> None:
    """A file of a terabyte."""
    with open(path, "ab") as file:
        file.truncate(1 << 40)


def copy(source: Path, to: Path, *ignored) -> None:
    shutil.copytree(source, to, ignore=shutil.ignore_patterns(*ignored))
