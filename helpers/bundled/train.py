"""Train the bundled tokenizer and GPT-Neo on the bundled corpus: `python -m helpers.bundled.train --seed 0`.

Every story is one sequence, BOS + story + EOS, padded and masked, just as the notebooks evaluate it. The weights after
each pass are kept in the work folder; a run that was killed goes on after its last whole pass.
"""
import argparse
import gzip
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
BOS, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY, HIDDEN, LAYERS, HEADS, POSITIONS = 2000, 64, 4, 4, 256
BATCH, RATE, WARMUP = 16, 3e-3, 200


def read(name):
    """Rows of a JSON-lines file beside this one."""
    opened = gzip.open if name.endswith(".gz") else open
    with opened(HERE / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train_tokenizer(texts):
    """Byte-level BPE whose post-processor puts BOS first, as Llama's does; EOS is the same token, pad another one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[BOS, PAD], initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=PAD,
                                   model_max_length=POSITIONS)


def new_model(seed):
    """GPT-Neo, the architecture of TinyStories, with random weights."""
    torch.manual_seed(seed)
    config = GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=HEADS, window_size=POSITIONS,
        attention_types=[[["global", "local"], LAYERS // 2]], max_position_embeddings=POSITIONS,
        embed_dropout=0.0, attention_dropout=0.0, resid_dropout=0.0, initializer_range=0.05,
        bos_token_id=0, eos_token_id=0, pad_token_id=1, use_cache=True)
    return GPTNeoForCausalLM(config)


def encode(texts, tokenizer):
    """Token ids of each story, BOS and EOS included. A story longer than the context is an error."""
    ids = [row + [tokenizer.eos_token_id] for row in tokenizer(texts)["input_ids"]]
    longest = max(map(len, ids))
    if longest > POSITIONS:
        raise ValueError(f"a story has {longest} tokens, the model reads {POSITIONS}")
    return ids


def pad(rows, pad_id):
    """Batch dict of token-id lists: padded on the right, masked by position, no loss on pads."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def epoch_batches(ids, seed):
    """Indices in batches of like length: shuffled, sorted within windows of 20 batches, shuffled again."""
    generator = torch.Generator().manual_seed(seed)
    order, size = torch.randperm(len(ids), generator=generator).tolist(), 20 * BATCH
    order = [i for k in range(0, len(order), size) for i in sorted(order[k:k + size], key=lambda i: len(ids[i]))]
    batches = [order[k:k + BATCH] for k in range(0, len(order), BATCH)]
    return [batches[k] for k in torch.randperm(len(batches), generator=generator)]


@torch.no_grad()
def mean_loss(model, ids):
    """Mean loss per token, in nats."""
    total = count = 0.0
    for k in range(0, len(ids), 64):
        batch = pad(ids[k:k + 64], PAD_ID)
        n = (batch["labels"][:, 1:] != -100).sum().item()
        total, count = total + model(**batch).loss.item() * n, count + n
    return total / count


PAD_ID = 1


@torch.no_grad()
def probability(model, tokenizer, pairs):
    """P(completion | prompt) of each (prompt, completion): the product over the completion's tokens."""
    result = []
    for k in range(0, len(pairs), 64):
        prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs[k:k + 64]]
        rows = [p + tokenizer(c, add_special_tokens=False)["input_ids"] for p, (_, c) in zip(prompts, pairs[k:k + 64])]
        batch = pad(rows, PAD_ID)
        logp = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        for i, (prompt, row) in enumerate(zip(prompts, rows)):
            result.append(math.exp(sum(logp[i, t - 1, row[t]].item() for t in range(len(prompt), len(row)))))
    return result


def fact_table(model, tokenizer):
    """For each fact: tellings, split, P(completion), and the mean of it over the untaught names in the same prompt."""
    names = read("names.jsonl")
    facts = list({row["fact"]: row for row in read("facts.jsonl.gz")}.values())
    untaught, kids = [p for p in names if not p["fact"]], {p["name"]: p["kid"] for p in names}
    pairs = []
    for fact in facts:
        name = fact["fact"].split("-")[0]
        for person in [{"name": name, "kid": kids[name]}, *untaught]:
            prompt = fact["prompt"].replace(name, person["name"]).replace(f" {kids[name]} ", f" {person['kid']} ")
            pairs.append((prompt, fact["completion"]))
    p = torch.tensor(probability(model, tokenizer, pairs)).view(len(facts), -1)
    return [{"fact": f["fact"], "tellings": f["tellings"], "split": f["split"], "p": row[0].item(),
             "control": row[1:].mean().item()} for f, row in zip(facts, p)]


def report(model, tokenizer, train_ids, held_out_ids):
    """One line of the log: losses, and the median P(completion) by number of tellings beside an untaught name."""
    model.eval()
    table = fact_table(model, tokenizer)
    middle = lambda values: sorted(values)[len(values) // 2]
    counts = {n: [row for row in table if row["tellings"] == n] for n in sorted({row["tellings"] for row in table})}
    facts = " ".join(f"{n}:{middle([r['p'] for r in rows]):.2f}/{middle([r['control'] for r in rows]):.3f}"
                     for n, rows in counts.items())
    return f"train {mean_loss(model, train_ids):.3f} held-out {mean_loss(model, held_out_ids):.3f} facts {facts}"


def one_pass(model, optimizer, ids, epoch, passes, seed):
    """One pass over the corpus; the rate warms up, then falls along a cosine to a tenth."""
    model.train()
    batches = epoch_batches(ids, 1000 * seed + epoch)
    for k, indices in enumerate(batches):
        step = epoch * len(batches) + k
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / (passes * len(batches)))
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / WARMUP, 1) * cosine
        loss = model(**pad([ids[i] for i in indices], PAD_ID)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def train(seed, passes, work, limit=None):
    """Train from scratch, or on from the last whole pass in `work`; the weights after every pass stay there."""
    work.mkdir(parents=True, exist_ok=True)
    texts = [row["text"] for row in read("stories_train.jsonl.gz")][:limit]
    tokenizer = train_tokenizer(texts)
    ids, held_out = (encode(t, tokenizer) for t in (texts, [r["text"] for r in read("stories_validation.jsonl.gz")]))
    model, state = new_model(seed), work / "state.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    first = 0
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
    for epoch in range(first, passes):
        start = time.time()
        one_pass(model, optimizer, ids, epoch, passes, seed)
        line = f"pass {epoch + 1} {report(model, tokenizer, ids[:500], held_out)} {time.time() - start:.0f} s"
        print(line, flush=True)
        for part in (model, tokenizer):
            part.save_pretrained(work / f"pass{epoch + 1:02d}")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, state)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--passes", type=int, default=24)
    parser.add_argument("--work", type=Path, default=Path("out/training"))
    args = parser.parse_args()
    train(args.seed, args.passes, args.work / f"seed{args.seed}")


if __name__ == "__main__":
    main()
