"""`python tests/victim.py KIND N ...`: `python -m helpers ...` that is killed (SIGKILL) in the middle of a write.

KIND checkpoint: when half of the N-th file that is written aside is there; scores: when nonsense is in the file of
scores instead of the N-th block. N = 0: never.
"""

import os
import signal
import sys

import numpy as np

from helpers import __main__, checkpoint, streaming


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kind, n):
    calls = []
    sync, write = checkpoint.sync, streaming.ScoreFile.write

    def sync_or_die(path):
        if path.suffix == ".partial":
            calls.append(path)
        if len(calls) == n:
            os.truncate(path, path.stat().st_size // 2)
            die()
        sync(path)

    def write_or_die(file, pieces):
        calls.append(pieces)
        if len(calls) == n:
            write(file, [(at, np.full_like(values, np.nan)) for at, values in pieces])
            die()
        write(file, pieces)

    checkpoint.SHARE = float("inf")  # every block is saved
    if kind == "checkpoint":
        checkpoint.sync = sync_or_die
    else:
        streaming.ScoreFile.write = write_or_die


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    sys.exit(__main__.main(sys.argv[3:]))
