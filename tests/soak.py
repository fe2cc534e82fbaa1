"""`make soak`: fit and score, each killed (SIGKILL) ten times at random points, against runs that were not.

Every other kill waits for a file that is just being written. Prints a line a kill, and raises where the factors or the
scores differ from the uninterrupted run's by a single bit. `--csv` writes a row for each finished job: command, job,
kills, seconds (all its runs together, each from the moment when it has its stories on), uninterrupted (seconds of the
run that was not killed).
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--batch-size", "1", "--max-length", "96"]  # a block is 32 stories


def start(arguments):
    """The running command, from the moment when it has its stories on."""
    running = subprocess.Popen([sys.executable, "-m", "helpers", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"FAST": "1"})  # fmt: skip
    while "stories" not in (line := running.stderr.readline()):
        if not line:
            raise RuntimeError(f"it ended by itself, with exit status {running.wait()}")
    return running


def seconds(arguments):
    """How long an uninterrupted run works."""
    running, began = start(arguments), time.monotonic()
    said = running.communicate()[1]
    if running.returncode:
        raise RuntimeError(said)
    return time.monotonic() - began


def kill(arguments, delay, writing):
    """(whether the command could be killed after `delay` seconds, or then at the next write; its seconds)."""
    running, began = start(arguments), time.monotonic()
    while running.poll() is None and time.monotonic() < began + delay:
        time.sleep(0.001)
    while writing and running.poll() is None and not any(path.exists() for path in writing):
        pass  # a write takes a millisecond or so
    running.kill()
    running.communicate()
    if running.returncode not in (0, -9):
        raise RuntimeError(f"exit status {running.returncode} instead of a kill")
    return running.returncode == -9, time.monotonic() - began


def soak(make, folder, kills, draw, writing):
    """Kills runs of make(folder / number) `kills` times, finishes them all and returns {folder: row of the csv}.

    writing: the files aside which a kill of the second sort waits for; a job that is complete is followed by a new one.
    """
    whole, done, jobs = seconds(make(folder / "whole")), 0, {}
    print(f"{make.__name__}: {whole:.1f} s uninterrupted", flush=True)

    def another():
        job = folder / str(len(jobs))
        jobs[job] = {"command": make.__name__, "job": len(jobs), "kills": 0, "seconds": 0.0, "uninterrupted": whole}
        return job

    job = another()
    while done < kills:
        wait = [job / name for name in writing] if done % 2 else []
        delay = draw.uniform(0, whole / 3)
        killed, took = kill(make(job), delay, wait)
        jobs[job]["seconds"] += took
        if not killed:
            job = another()
            continue
        done, jobs[job]["kills"] = done + 1, jobs[job]["kills"] + 1
        left = sorted(path.name for path in job.rglob("*.partial")) if job.exists() else []
        print(f"  kill {done:2d} in job {jobs[job]['job']} at {delay:4.1f} s{' or a write' if wait else ''}; "
              f"half-written: {', '.join(left) or 'nothing'}", flush=True)  # fmt: skip
    jobs[job]["seconds"] += seconds(make(job))
    return jobs


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--limit", type=int, default=1000, help="stories: %(default)s")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--csv", help="a file for the table")
    args, folder, rows = p.parse_args(), Path(tempfile.mkdtemp()), []
    draw, small = random.Random(args.seed), ["--limit", str(args.limit), *SMALL]

    def fit(job):
        return ["fit", *small, "--out", str(job)]

    def score(job):
        return ["score", *small, "--factors", str(folder / "fit" / "whole"), "--out", str(job / "scores.npy")]

    names = [f"checkpoint/{name}.0.safetensors.partial" for name in ("second_moments", "eigenvalues")]
    for make, result, writing in ((fit, "factors.safetensors", [*names, "factors.safetensors.partial"]),
                                  (score, "scores.npy", ["scores.json.partial"])):  # fmt: skip
        jobs = soak(make, folder / make.__name__, args.kills // 2, draw, writing)
        for job in jobs:
            if (job / result).read_bytes() != (folder / make.__name__ / "whole" / result).read_bytes():
                raise AssertionError(f"{job / result} differs from the uninterrupted run's")
        rows += jobs.values()
        print(f"{make.__name__}: {args.kills // 2} kills, {len(jobs)} jobs, all as if uninterrupted", flush=True)
    if args.csv:
        pd.DataFrame(rows).round(1).to_csv(args.csv, index=False)


if __name__ == "__main__":
    main()
