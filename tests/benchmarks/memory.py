"""Memory of `python -m helpers score` as the stories grow, and time of fit and score in 1 and 2 processes.

`python tests/benchmarks/memory.py` writes memory.csv beside this file, a row a run: what, per, stories, processes (of
one thread each), seconds (as the command says itself, so without Python's start), cpu_seconds (of all processes, that
start included), peak_mb (largest resident memory of a process), anonymous_mb (of this, what is not pages of a file),
scores_mb (the file of scores). Runs of 10,000 stories, which compare processes, are medians of three. "in memory" is
the same from Python, with all batches and all scores at once. The stories are those of the bundled corpus, again and
again, cut to MAX_LENGTH tokens; the layers are one block's MLP. A run whose row is there is skipped.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from helpers import load_stories

TABLE = Path(__file__).with_suffix(".csv")
COLUMNS = ("what", "per", "stories", "processes", "seconds", "cpu_seconds", "peak_mb", "anonymous_mb", "scores_mb")
ROOT = Path(__file__).resolve().parents[2]
RUNS = [("score", "sequence", 1000, 1), ("score", "sequence", 3000, 1), ("score", "sequence", 10000, 1),
        ("score", "sequence", 30000, 1), ("score", "token", 1000, 1), ("score", "token", 30000, 1),
        ("in memory", "sequence", 1000, 1), ("in memory", "sequence", 30000, 1), ("in memory", "token", 1000, 1),
        ("in memory", "token", 30000, 1), ("fit", "", 1000, 1), ("fit", "", 10000, 1), ("fit", "", 30000, 1),
        ("fit", "", 10000, 2), ("score", "sequence", 10000, 2)]
COMPARED, ROUNDS = [run for run in RUNS if run[2] == 10000], 3  # by time: in turn, so often; medians
MAX_LENGTH = 32  # tokens of a story, so that 30,000 of them take minutes
LAYERS = r"h\.3\.mlp"
PAIRS = [("One day, Lily went to the", " park."), ("Tom was sad because his", " toy was lost."),
         ("The dog ran and", " jumped."), ("Once upon a time, there was a", " girl named Anna.")]  # fmt: skip
IN_MEMORY = """
import json, sys, time
from helpers import *
stories, folder, per, pairs, length = sys.argv[1:]
lm, pairs = load_lm(), json.loads(pairs)
factors = EKFACFactors.load(folder)
began = time.perf_counter()
train = tokenize(load_stories(stories)["text"], lm.tokenizer, int(length))
influence(lm.model, factors, completions(pairs, lm.tokenizer), train, per=per, progress=False)
print(f"in memory: {time.perf_counter() - began:.1f} s")
"""


def write_stories(path, n):
    """n stories as JSON lines."""
    texts = load_stories()["text"]
    pd.DataFrame({"text": [texts[i % len(texts)] for i in range(n)]}).to_json(path, orient="records", lines=True)


def command(what, per, stories, processes, factors, out):
    """The command line of one run."""
    if what == "in memory":
        return [sys.executable, "-c", IN_MEMORY, str(stories), str(factors), per, json.dumps(PAIRS), str(MAX_LENGTH)]
    python = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                      "--nproc-per-node", str(processes)]  # fmt: skip
    python += ["-m", "helpers", what, "--stories", str(stories), "--max-length", str(MAX_LENGTH), "--out"]
    if what == "fit":
        return [*python, str(out), "--layers", LAYERS]
    queries = [text for pair in PAIRS for text in ("--query", *pair)]
    return [*python, str(out / "s.npy"), "--factors", str(factors), "--per", per, *queries]


def status(pid, field):
    """A field of /proc/PID/status in MB; 0 where the process is gone."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        found = None
    return int(found[1]) / 1024 if found else 0.0


def measure(arguments):
    """(seconds as it says itself, CPU seconds, peak MB and peak anonymous MB of the largest of its processes)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    running = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    peak = anonymous = 0.0
    while running.poll() is None:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        for pid in (running.pid, *(children.read_text().split() if children.exists() else ())):
            peak, anonymous = max(peak, status(pid, "VmHWM")), max(anonymous, status(pid, "RssAnon"))
        time.sleep(0.02)
    said, errors = running.communicate()
    if running.returncode:
        raise RuntimeError(errors)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return float(re.search(r": ([\d.]+) s\s*$", said)[1]), cpu, peak, anonymous


def main():
    rows = pd.read_csv(TABLE, keep_default_na=False).to_dict("records") if TABLE.exists() else []
    done = {tuple(row[name] for name in COLUMNS[:4]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        stories = {n: folder / f"stories{n}.jsonl" for n in {run[2] for run in RUNS} | {500}}
        for n, path in stories.items():
            write_stories(path, n)
        factors = folder / "factors"
        measure(command("fit", "", stories[500], 1, None, factors))
        todo = [run for run in RUNS if run not in done]
        turns = [run for run in todo if run not in COMPARED] + [run for run in COMPARED if run in todo] * ROUNDS
        found = {run: [] for run in todo}
        for number, run in enumerate(turns):
            out = folder / str(number)
            taken = measure(command(run[0], run[1], stories[run[2]], run[3], factors, out))
            size = (out / "s.npy").stat().st_size / 2**20 if (out / "s.npy").exists() else 0.0
            found[run].append((*taken, size))
            print(*run, found[run][-1], flush=True)
            if len(found[run]) == turns.count(run):
                rows.append(dict(zip(COLUMNS, (*run, *pd.DataFrame(found[run]).median().round(1)))))
                pd.DataFrame(rows).to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
