"""Damages real files at random and reads them: each must end in a result or a one-line error.

    PYTHONPATH=. python tests/long/fuzz.py --inputs 100000 --seed 0 [--readers photo,labels] [--workers 2]

Input i goes to reader i modulo their number and depends on (seed, i) only: `--first I --inputs 1` repeats one. Readers
run in processes of their own, so that a crash is seen and counted; one that takes longer than 20 s on an input hangs.
The whole files are made before the first input, so their making counts for none. The process may take 3 GB more than it
has then. Exit code 1 if anything but a result or an error of ours came out, if a result differs from the undamaged one,
or if a file outside the scratch folder was written.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))
from audit import audited
from fuzz_folders import READERS as READERS_OF_FOLDERS
from fuzz_folders import folders
from fuzz_readers import READERS, Corpus, SilentChange
from fuzz_runs import READERS as READERS_OF_RUNS
from fuzz_runs import strangers

from slotscops.core.errors import RunError, UserError

READERS |= READERS_OF_RUNS | READERS_OF_FOLDERS
HANGS_AFTER_S = 20
STARTS_WITHIN_S = 600  # imports and the making of the whole files, on a busy machine
INPUTS_OF_A_PROCESS = 5_000
MEMORY_BYTES = 3_000_000_000  # an input may take so much beyond what the process has at its start
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # in memory, where no fsync waits for a disk
WRITES = ("open", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate")


def main() -> int:
    options = parse()
    if options.child is not None:
        work(options)
        os._exit(0)  # a server that one of the readers started runs in a thread, for which a normal exit would wait
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    peaks = [0]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        corpus = options.corpus or make_corpus(Path(folder) / "shards")
        last = options.first + options.inputs
        starts = range(options.first, last, INPUTS_OF_A_PROCESS)
        chunk = partial(run_chunk, options, corpus, Path(folder), outcomes, failures, peaks)
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(chunk, starts, [min(start + INPUTS_OF_A_PROCESS, last) for start in starts]))
    for failure in failures[:50]:
        print(failure)
    for (reader, outcome), count in sorted((name.split(": "), count) for name, count in outcomes.items()):
        print(f"{reader:10} {outcome:14} {count:8,}")
    print(f"{time.monotonic() - began:,.0f} s; an input took at most {max(peaks) / 1e6:,.0f} MB more than the start")
    print(f"{sum(outcomes.values()):,} inputs, seed {options.seed}: {len(failures)} failures")
    return 1 if failures or sum(outcomes.values()) != options.inputs else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="toy shards with features and photos/ (default: drawn now)")
    parser.add_argument("--readers", default=",".join(READERS), help="which to ask, by name (default: all)")
    parser.add_argument("--real", type=Path, help="folder of real .mat files to damage beside the toy's")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # file to write the present input's number to
    return parser.parse_args()


def make_corpus(out: Path) -> Path:
    from slotscops.shard import __main__ as shard

    small = ["--toy", "--toy-train", "6", "--toy-val", "2", "--size", "32", "--samples-per-shard", "4"]
    shard.main([*small, "--out", str(out), "--teacher-weights", "random:0", "--workers", "1"])
    return out


def run_chunk(
    options: argparse.Namespace, corpus: Path, folder: Path, outcomes: Counter[str], failures: list[str],
    peaks: list[int], first: int, last: int,
) -> None:  # fmt: skip
    """Reads inputs `first` to `last` in a child process. If an input ends the child, a new one continues after it."""
    progress = folder / f"{first}.progress"
    while first < last:
        progress.write_text("")
        command = [sys.executable, __file__, "--child", str(progress), "--corpus", str(corpus)]
        command += ["--seed", str(options.seed), "--first", str(first), "--inputs", str(last - first)]
        command += ["--readers", options.readers]
        command += ["--real", str(options.real)] if options.real else []
        with (folder / f"{first}.out").open("w+") as out, subprocess.Popen(command, stdout=out) as process:
            hangs = not wait(process, progress)
            out.seek(0)
            for line in out.read().splitlines():
                told = json.loads(line)
                outcomes.update(told.get("outcomes", {}))
                failures += told.get("failures", [])
                peaks.append(told.get("peak_bytes", 0))
        if process.returncode == 0 and not hangs:
            return
        number_text = progress.read_text()
        if not number_text or (not hangs and process.returncode > 0):
            raise SystemExit(f"the harness itself failed, exit code {process.returncode}")
        number = int(number_text)
        readers = options.readers.split(",")
        reader = readers[number % len(readers)]
        what = "hang" if hangs else "crash"
        outcomes[f"{reader}: {what}"] += 1
        failures.append(f"input {number}, {reader}: {what}, exit code {process.returncode}")
        first = number + 1


def wait(process: subprocess.Popen[bytes], progress: Path) -> bool:
    """Waits for the process; ends it and returns False if it stays at its start or at one input for too long."""
    seen, since = "", time.monotonic()
    while True:
        try:
            process.wait(timeout=1)
            return True
        except subprocess.TimeoutExpired:
            now = progress.read_text()
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > (3 * HANGS_AFTER_S if seen else STARTS_WITHIN_S):
                process.kill()
                process.wait()
                return False


def work(options: argparse.Namespace) -> None:
    """In the child: reads the inputs one after the other, and tells of each hundred what came out."""
    readers = options.readers.split(",")
    with (
        tempfile.TemporaryDirectory(dir=SCRATCH) as scratch,
        os.fdopen(os.open(options.child, os.O_WRONLY), "w") as progress,
    ):
        corpus = Corpus(options.corpus, Path(scratch), options.real)
        if READERS_OF_RUNS.keys() & set(readers):
            strangers(corpus)
        if READERS_OF_FOLDERS.keys() & set(readers):
            folders(corpus)
        tempfile.tempdir = scratch
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, resource.RLIM_INFINITY))
        at_start = peak_bytes()
        with audited(*WRITES, describe=partial(written_outside, scratch)) as writes:
            for number in range(options.first, options.first + options.inputs):
                os.pwrite(progress.fileno(), str(number).encode(), 0)
                reader = readers[number % len(readers)]
                start = time.monotonic()
                outcome, failure = read_one(corpus, reader, np.random.default_rng([options.seed, number]))
                if time.monotonic() - start > HANGS_AFTER_S:
                    outcome, failure = "hang", "took too long"
                if outside := sorted(set(filter(None, writes))):
                    outcome, failure = "wrote outside", ", ".join(outside)
                writes.clear()
                # What has been reported is kept if a later input ends this process.
                failures = [f"input {number}, {reader}: {failure}"] if failure else []
                told = {"outcomes": {f"{reader}: {outcome}": 1}, "failures": failures}
                print(json.dumps(told | {"peak_bytes": peak_bytes() - at_start}), flush=True)


def peak_bytes() -> int:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def written_outside(scratch: str, event: str, arguments: tuple[object, ...]) -> str:
    """The file that is about to be written, if it lies outside the scratch folder; otherwise an empty text."""
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return ""
    else:
        path = arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]
    if not isinstance(path, str | bytes | os.PathLike) or os.fsdecode(path) == os.devnull:
        return ""  # a descriptor, whose opening has been looked at
    real = os.path.realpath(os.fsdecode(path))
    return "" if real.startswith(f"{os.path.realpath(scratch)}{os.sep}") else f"{event} {real}"


def read_one(corpus: Corpus, reader: str, generator: np.random.Generator) -> tuple[str, str]:
    """The kind of result, and what is wrong with it."""
    try:
        READERS[reader](corpus, generator)
    except (UserError, RunError) as error:
        message = str(error)
        return ("refused", "") if message.isprintable() and message else ("several lines", repr(message))
    except SilentChange as error:
        return "silent change", str(error)
    except BaseException as error:
        return "other error", f"{type(error).__name__}: {error}"
    return "read", ""


if __name__ == "__main__":
    sys.exit(main())
