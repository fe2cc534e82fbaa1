"""Makes tests/kronfluence_scores.safetensors: what kronfluence 1.0.1 says of the bundled model, for the test of parity.

    python tests/benchmarks/kronfluence_scores.py        in the environment that peer_kronfluence.py describes

In float64, for in float32 its rounding alone is as large as the test's 1e-5.
Empirical factors (labels="true") of 256 stories, default damping 0.1 × mean eigenvalue, MLP and attention layers,
8 held-out queries: sequence scores of 64 stories, token scores of the first 16.
"""

from pathlib import Path

import torch
from peer_kronfluence import Kronfluence
from safetensors.torch import save_file

from helpers import linear_layers, load_lm, load_stories, tokenize

TABLE = Path(__file__).parents[1] / "kronfluence_scores.safetensors"
LAYERS, FITTED, QUERIES, TRAIN, TOKEN_TRAIN = "mlp|attn", 256, 8, 64, 16


def main():
    lm = load_lm()
    stories = load_stories(limit=FITTED)["text"]
    train = tokenize(list(stories), lm.tokenizer)
    queries = tokenize(list(load_stories(split="validation", limit=QUERIES)["text"]), lm.tokenizer)
    ids = lambda batches: [row[mask.bool()] for batch in batches
                           for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
    theirs = Kronfluence(lm.model.double(), linear_layers(lm.model, LAYERS), ids(train), ids(queries))
    theirs.fit("true")
    everything, theirs.train = theirs.train, theirs.train[:TRAIN]
    sequence = theirs.scores("sequence")
    theirs.train = everything[:TOKEN_TRAIN]
    save_file({"sequence": sequence.float().contiguous(), "token": theirs.scores("token").float().contiguous()}, TABLE)
    print(f"{TABLE.name}: {TABLE.stat().st_size / 1e3:.0f} kB, torch {torch.__version__}")


if __name__ == "__main__":
    main()
