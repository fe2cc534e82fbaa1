"""load_lm, load_stories and load_facts: the hub through a local server, folders of every kind, and what is refused."""

import gzip
import json
import os
import secrets
import socket
import subprocess
import sys

import pandas as pd
import pytest
import torch
from local_hub import serve
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Tokenizer, GPTNeoConfig, GPTNeoForCausalLM

from helpers.batches import tokenize
from helpers.sources import BUNDLED, FACT_COLUMNS, HUB_LIMIT, ROOT, SUFFIXES, load_facts, load_lm, load_stories

DATA = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not DATA.exists(), reason=f"the public model and stories are not in {DATA}")
STORIES = ["Tom had a cat.\nIt was red.", 'Sue liked "jam".', "A bee sang — loud."]
WORDS = 280
IDS = torch.arange(6)[None]


def config(**changes):
    """The architecture of TinyStories-1M."""
    shape = dict(hidden_size=64, num_layers=8, num_heads=16, vocab_size=50257, max_position_embeddings=2048)
    return GPTNeoConfig(**shape | {"attention_types": [[["global", "local"], 4]], "window_size": 256} | changes)


def tiny(layers=2):
    return config(hidden_size=8, num_heads=2, vocab_size=WORDS, num_layers=layers, max_position_embeddings=24,
                  attention_types=[[["global"], layers]], bos_token_id=0, eos_token_id=0)  # fmt: skip


def save_tokenizer(folder):
    """A small byte-level BPE tokenizer in the files of GPT-2's: 256 bytes, the end-of-text token, some merges."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(STORIES * 3, vocab_size=WORDS, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    about = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder, made once: tiny GPT-Neo with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    GPTNeoForCausalLM(tiny()).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


# The hub -------------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys, torch
from helpers.sources import load_lm, load_stories

def refusal(load, *arguments):
    try:
        return f"not refused: {load(*arguments)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

lm = load_lm("hub")
own = load_lm("someone/tiny")
print(json.dumps({
    "name": lm.name, "dtype": str(lm.model.dtype), "training": lm.model.training, "context":
    lm.tokenizer.model_max_length, "ids": lm.tokenizer(sys.argv[1]).input_ids,
    "logits": lm.model(torch.arange(6)[None]).logits[0, -1, :50].tolist(),
    "own": [own.name, own.tokenizer.model_max_length, len(own.tokenizer)],
    "train": load_stories("hub", limit=20)["text"][:], "default": len(load_stories("hub")),
    "validation": load_stories("hub", "validation")["text"][:],
    "someone": load_stories("someone/rows", limit=2)["text"][:],
    "split": refusal(load_stories, "hub", "test"), "column": refusal(load_stories, "someone/notext"),
    "model": refusal(load_lm, "no/body"), "data": refusal(load_stories, "no/body"),
    "tokenizer": refusal(load_lm, "someone/untold"),
}))
"""


def run(script, *arguments, endpoint, home, **environment):
    """What a fresh Python prints, as JSON: huggingface_hub reads its endpoint on import. Leaves this one untouched."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=keep | environment, cwd=home, text=True,
                          capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, folder):
    """Folders as they stand on the hub. The model repository has no tokenizer; the weights come in two forms."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(1)
    model = GPTNeoForCausalLM(config())
    model.save_pretrained(root / "safetensors")
    model.config.save_pretrained(root / "bin")
    # The published file is of 2023 and still holds the attention's masks, which are no longer parameters.
    mask = {f"transformer.h.{i}.attn.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8) for i in range(8)}
    torch.save(model.state_dict() | mask, root / "bin" / "pytorch_model.bin")
    save_tokenizer(root / "gpt-neo-125M")
    config().save_pretrained(root / "gpt-neo-125M")
    GPTNeoForCausalLM(tiny()).save_pretrained(root / "untold")
    many = [f"Story {i}. {secrets.token_hex(1000)}" for i in range(36_000)]
    for name, column, texts in [
        ("TinyStories/data/train-00000-of-00001", "text", many),
        ("TinyStories/data/validation-00000-of-00001", "text", STORIES),
        ("notext/train", "story", STORIES),
    ]:
        file = root / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({column: texts}).to_parquet(file, row_group_size=1000, compression=None)
    (root / "rows").mkdir()
    (root / "rows" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    shelf = {"roneneldan/TinyStories-1M": root / "bin", "EleutherAI/gpt-neo-125M": root / "gpt-neo-125M"}
    shelf |= {"someone/tiny": folder, "someone/untold": root / "untold", "datasets/someone/rows": root / "rows"}
    shelf |= {"datasets/roneneldan/TinyStories": root / "TinyStories", "datasets/someone/notext": root / "notext"}
    return root, model.eval(), shelf


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_the_hub_by_the_libraries_own_code(weights, repositories, tmp_path):
    root, model, shelf = repositories
    with serve(shelf | {"roneneldan/TinyStories-1M": root / weights}) as hub:
        got = run(SCRIPT, STORIES[0], endpoint=hub.url, home=tmp_path)
    assert (got["name"], got["dtype"], got["training"]) == ("roneneldan/TinyStories-1M", "torch.float32", False)
    assert got["context"] == 2048 and got["own"] == ["someone/tiny", 24, WORDS]
    reference = GPT2Tokenizer(str(root / "gpt-neo-125M" / "vocab.json"), str(root / "gpt-neo-125M" / "merges.txt"))
    assert got["ids"] == reference(STORIES[0]).input_ids
    torch.testing.assert_close(torch.tensor(got["logits"]), model(IDS).logits[0, -1, :50])
    assert [text.split(".")[0] for text in got["train"]] == [f"Story {i}" for i in range(20)]
    assert got["default"] == HUB_LIMIT and got["validation"] == STORIES and got["someone"] == STORIES[:2]
    for what, said in {"split": "Available splits", "column": "no string in a column 'text'", "model": "no/body",
                       "data": "doesn't exist on the Hub", "tokenizer": "has no tokenizer"}.items():  # fmt: skip
        assert said in got[what], got[what]
    assert "HF_ENDPOINT" in got["model"] and "source='bundled'" in got["data"]
    asked = [request[1] for request in hub.requests]
    assert any(
        f"TinyStories-1M/resolve/{'0' * 39}1/{'pytorch_model.bin' if weights == 'bin' else 'model.s'}" in path
        for path in asked
    )
    assert not any("discussions" in path or "commits" in path for path in asked), "asked for a conversion"


def test_stories_are_streamed(repositories, tmp_path):
    root, _, shelf = repositories
    whole = (root / "TinyStories/data/train-00000-of-00001.parquet").stat().st_size
    with serve(shelf) as hub:
        script = "from helpers import sources; print(len(sources.load_stories('hub', limit=2001)))"
        assert run(script, endpoint=hub.url, home=tmp_path) == 2001
    sent = sum(size for _, path, _, size in hub.requests if "train-00000" in path)
    assert 1_000_000 < sent < whole / 2, f"{sent:,} of {whole:,} bytes were sent"
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 1_000_000


def test_without_network_one_error_says_what_to_do(tmp_path):
    script = (
        "import json, sys; from helpers import sources\n"
        "try: getattr(sources, sys.argv[1])('hub')\n"
        "except OSError as error: print(json.dumps(str(error)))"
    )
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    for load, environment in (("load_lm", {"HF_HUB_OFFLINE": "1"}), ("load_stories", {})):  # the second one retries
        said = run(script, load, endpoint=endpoint, home=tmp_path, **environment)
        assert f"could not be loaded from {endpoint}" in said
        assert "Without network use source='bundled' or a folder; for a mirror set HF_ENDPOINT" in said


# Folders -------------------------------------------------------------------------------------------------------------


def test_a_model_folder(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    lm = load_lm(os.path.relpath(folder, ROOT))  # from the repository root: nothing is there from here
    assert lm.name == "tiny" and not lm.model.training and lm.tokenizer.model_max_length == 24
    assert lm.tokenizer.decode(lm.tokenizer(STORIES[2]).input_ids) == STORIES[2]
    assert load_lm(folder).model.dtype == torch.float32
    assert capfd.readouterr() == ("", ""), "loading a folder must leave a notebook's output clean"
    half = tmp_path / "half"
    lm.model.to(torch.bfloat16).save_pretrained(half)
    save_tokenizer(half)
    assert load_lm(half).model.dtype == torch.float32


def test_models_that_are_refused(folder, tmp_path, monkeypatch):
    here = tmp_path / "some" / "model"
    GPTNeoForCausalLM(tiny()).save_pretrained(here)
    monkeypatch.chdir(tmp_path)
    for source, error, said in [
        ("bundeld", FileNotFoundError, f"'bundeld': {tmp_path}/bundeld and {ROOT}/bundeld does not exist.*a folder"),
        ("../no/such/folder", FileNotFoundError, "does not exist"),
        ("some/model", ValueError, "has no tokenizer"),  # from the current folder, and no hub id
        (str(folder / "config.json"), FileNotFoundError, "is no folder"),
        (str(tmp_path), OSError, f"the model in {tmp_path} could not be loaded"),
        (str(here), ValueError, "has no tokenizer; put its tokenizer.json"),
    ]:
        with pytest.raises(error, match=said):
            load_lm(source)
    with pytest.raises(ValueError, match="checkpoint='early' is for source='bundled' only"):
        load_lm(folder, checkpoint="early")
    with pytest.raises(FileNotFoundError, match="checkpoint='nope' does not exist; there are"):
        load_lm(checkpoint="nope")


def test_weights_that_do_not_cover_the_model(folder, tmp_path):
    GPTNeoForCausalLM(tiny()).save_pretrained(tmp_path)
    tiny(layers=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of GPTNeoForCausalLM, such as transformer.h.2"):
        load_lm(tmp_path)


def test_code_of_a_model_is_never_run(folder, tmp_path):
    about = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "own.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(OSError, match="could not be loaded"):
        load_lm(tmp_path)


def write(path, texts=STORIES):
    """A file of stories in the form that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "n": n} for n, text in enumerate(texts)]
    forms = {
        ".jsonl": "\n".join(map(json.dumps, rows)),
        ".json": json.dumps(rows),
        ".txt": "<|endoftext|>\n".join(texts),
    }
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8").write(
            forms["." + path.name.split(".")[1]]
        )
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_stories_in_every_form(suffix, tmp_path, capfd):
    write(tmp_path / f"train{suffix}")
    write(tmp_path / f"validation{suffix}", STORIES[1:])
    (tmp_path / "README.md").write_text("about")
    assert load_stories(tmp_path)["text"][:] == STORIES
    assert load_stories(os.path.relpath(tmp_path, ROOT), "validation")["text"][:] == STORIES[1:]
    assert load_stories(tmp_path / f"train{suffix}", limit=2)["text"][:] == STORIES[:2]
    assert ".txt" in suffix or load_stories(tmp_path)["n"][:] == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_stories_in_shards_lines_and_with_missing_columns(tmp_path, capsys):
    write(tmp_path / "a" / "data" / "train-00001-of-00002.parquet", STORIES[2:])
    write(tmp_path / "a" / "data" / "train-00000-of-00002.parquet", STORIES[:2])
    assert load_stories(tmp_path / "a")["text"][:] == STORIES
    assert load_stories(tmp_path / "a", limit=3)["text"][:] == STORIES
    (tmp_path / "lines.txt").write_text("One.\n\nTwo.\n")
    assert load_stories(tmp_path / "lines.txt")["text"][:] == ["One.", "Two."]
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "One."}\n{"text": " ", "mood": "sad"}\n{"text": "Two.", "mood": "sad"}\n'
    )
    stories = load_stories(tmp_path / "rows.jsonl")
    assert stories["text"][:] == ["One.", "Two."] and stories["mood"][:] == [None, "sad"]
    assert capsys.readouterr().out == "load_stories: left out 1 blank of 3 stories\n"


def test_stories_that_are_refused(tmp_path):
    lines = write(tmp_path / "train.jsonl")
    for name, text in {
        "nothing": "",
        "number": '{"text": 3}',
        "other": '{"story": "x"}',
        "list": '["x"]',
        "bad": "{",
    }.items():
        (tmp_path / f"{name}.json").write_text(text)
    for source, split, limit, error, said in [
        (tmp_path, "valid", None, FileNotFoundError, r"split='valid' needs files.*has \['bad.json', 'list.json'"),
        (lines, "validation", None, FileNotFoundError, "can only be split='train', not 'validation'"),
        (__file__, "train", None, FileNotFoundError, "must end in one of"),
        (tmp_path / "no.jsonl", "train", None, FileNotFoundError, "does not exist"),
        ("some/stories.jsonl", "train", None, FileNotFoundError, "does not exist"),
        (tmp_path, "train", 0, ValueError, "limit=0 must be"),
        (tmp_path / "nothing.json", "train", None, ValueError, "holds no story: 0 rows"),
        (tmp_path / "number.json", "train", None, ValueError, "row 0 of .* has no string in a column 'text'"),
        (tmp_path / "other.json", "train", None, ValueError, "no string in a column 'text': {'story': 'x'}"),
        (tmp_path / "list.json", "train", None, ValueError, "no string in a column 'text': 'x'"),
        (tmp_path / "bad.json", "train", None, OSError, "bad.json could not be loaded .JSONDecodeError"),
    ]:
        with pytest.raises(error, match=said):
            load_stories(source, split, limit)
    write(tmp_path / "train.parquet")
    with pytest.raises(FileNotFoundError, match="needs files of one kind"):
        load_stories(tmp_path)


# The bundled source --------------------------------------------------------------------------------------------------


def test_bundled_model_and_checkpoints():
    lm = load_lm()
    assert lm.name == "bundled" and not lm.model.training and lm.model.dtype == torch.float32
    assert type(lm.model) is GPTNeoForCausalLM and len(lm.tokenizer) == lm.model.config.vocab_size
    names = [path.name for path in sorted((BUNDLED / "checkpoints").iterdir())]
    assert len(names) >= 3
    for name in names:
        other = load_lm(checkpoint=name)
        assert other.name == f"bundled/{name}" and other.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
        assert not torch.equal(other.model(IDS).logits, lm.model(IDS).logits)


def test_bundled_stories_and_facts(capfd):
    train, held_out, facts = load_stories(), load_stories("bundled", "validation"), load_facts()
    assert len(train) >= 4000 and len(held_out) >= 400 and len(load_stories(limit=7)) == 7
    assert {"text", "plot", "mood", "moral"} <= set(train.column_names)
    assert capfd.readouterr() == ("", ""), "no blank stories: the rows of the facts would shift"
    assert list(facts.columns) == FACT_COLUMNS and facts.row.between(0, len(train) - 1).all()
    assert set(facts.kind) == {"literal", "paraphrased", "distractor", "denial"}
    for told in facts[facts.kind == "literal"].itertuples():
        span = train["text"][told.row][told.start : told.end]
        assert told.completion.strip(" .") in span, (told, span)


# Real input ----------------------------------------------------------------------------------------------------------


@real
def test_a_public_model_on_public_stories(capsys):
    lm, stories = (
        load_lm("../shared/data/stories260k"),
        load_stories("../shared/data/tinystories", "validation", limit=48),
    )
    assert (
        lm.name == "stories260k"
        and type(lm.model).__name__ == "LlamaForCausalLM"
        and lm.model.num_parameters() == 260_032
    )
    losses = tokens = 0
    for batch in tokenize(stories["text"], lm.tokenizer, max_length=10_000):
        assert batch["input_ids"].shape[1] <= 512, "longer than the model's context"
        targets = batch["labels"][:, 1:].ne(-100).sum()
        with torch.no_grad():
            losses += lm.model(**batch).loss * targets
        tokens += targets
    assert 1.25 < losses / tokens < 1.36
    assert "texts to 512 tokens" in capsys.readouterr().out
    assert len(load_stories("../shared/data/tinystories")) == 3114
