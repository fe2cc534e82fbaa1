"""What all sides of peers.py share: the problem, read from a folder, and the loop that does and times what it is told.

A side is a program of its own, because each library wants other versions: it reads one JSON order a line from its
standard input, `{"do": "problem", "folder": another}`, `{"do": "stories", "folder": another}`, which keeps the factors,
`{"do": "fit", "labels": "true"}` or `{"do": "sequence", "save": path or null}` ("token" likewise), and answers one JSON
line: seconds `s`, processor time `cpu`, `mib` that memory rose above what was in use before; or the `error`.
"""

import json
import os
import re
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

BATCH = 16


@dataclass(frozen=True)
class Problem:
    """A model's folder, names of its studied layers, and unpadded token ids of stories and queries."""

    folder: Path
    layers: list
    train: list
    queries: list

    def model(self):
        dtype = json.loads((self.folder / "problem.json").read_text())["dtype"]
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=getattr(torch, dtype)).eval()


def write_problem(folder, model, pattern, train, queries):
    """Writes the model and the token ids ([T] tensors) to `folder`; layers are linear modules found by `pattern`."""
    folder = Path(folder)
    model.save_pretrained(folder)
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and re.search(pattern, n)]
    dtype = str(model.dtype).removeprefix("torch.")
    (folder / "problem.json").write_text(json.dumps({"layers": layers, "dtype": dtype}))
    for name, ids in (("train", train), ("queries", queries)):
        save_file({"ids": torch.cat(ids), "lengths": torch.tensor([len(x) for x in ids])}, folder / f"{name}.ids")


def read_problem(folder):
    folder = Path(folder)
    parts = {}
    for name in ("train", "queries"):
        stored = load_file(folder / f"{name}.ids")
        parts[name] = list(stored["ids"].split(stored["lengths"].tolist()))
    return Problem(folder, json.loads((folder / "problem.json").read_text())["layers"], **parts)


def batches(ids, size=BATCH, width=0):
    """Hugging Face batches of at most `size` examples in the order given, padded on the right."""
    return [collate(ids[start:start + size], width) for start in range(0, len(ids), size)]


def collate(ids, width=0):
    """One batch, as wide as its longest example or, if that is more, as `width`."""
    width = max(width, *(len(x) for x in ids))
    pad = lambda x, value: torch.nn.functional.pad(x, (0, width - len(x)), value=value)
    return {"input_ids": torch.stack([pad(x, 0) for x in ids]),
            "attention_mask": torch.stack([pad(torch.ones_like(x), 0) for x in ids]),
            "labels": torch.stack([pad(x, -100) for x in ids])}


def memory(what):
    """VmRSS or VmHWM of this process in MiB."""
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measured(function, *args):
    """(result, {"s": seconds, "cpu": of processor time, "mib": rise of memory})."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, start, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    result = function(*args)
    return result, {"s": time.perf_counter() - start, "cpu": time.process_time() - cpu, "mib": memory("VmHWM") - before}


def serve(make):
    """make(problem): an object with fit(labels) and scores(per) -> [query, train (, token)]. argv: folder, threads."""
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # libraries print
    os.dup2(2, 1)
    torch.set_num_threads(int(sys.argv[2]))
    side = make(read_problem(sys.argv[1]))
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if order["do"] == "problem":
                side, answer = make(read_problem(order["folder"])), {}
            elif order["do"] == "stories":
                side.train, answer = make(read_problem(order["folder"])).train, {}
            elif order["do"] == "fit":
                _, answer = measured(side.fit, order["labels"])
            else:
                scores, answer = measured(side.scores, order["do"])
                if order.get("save"):
                    save_file({"scores": scores.double().contiguous()}, order["save"])
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(json.dumps(answer), file=answers, flush=True)
