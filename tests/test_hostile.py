"""Text, models and factors of ill will or from failing disks: shown, or refused with a reason, and never run."""

import ast
import gzip
import json
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from helpers import (
    EKFACFactors,
    completions,
    explorer,
    fit_ekfac,
    influence,
    jobs,
    linear_layers,
    load_lm,
    load_stories,
    token_span,
    tokenize,
)
from helpers.heatmap import Panel, token_figure, token_html, tokens_of
from helpers.plots import save_figure
from helpers.queries import Query, continuation, printable
from helpers.run import excerpt

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {
    "NUL and control characters": "One \x00 day \x01\x07\x08\x1f\x7f\x85 a dog",
    "escape sequences of a terminal": "One \x1b[2J\x1b]0;title\x07 day \x9b31m",
    "marks of writing direction": "One \u202eyad\u202c \u2066a\u2069 \u200fdog",
    "right-to-left script": "One day \u05e9\u05dc\u05d5\u05dd and \u0645\u0631\u062d\u0628\u0627",
    "zero-width characters": "O\u200bn\u200ce \u200d\ufeff\u2060 d\u00ada\u034fy\ufe0f",
    "nothing but zero-width characters": "\u200b\u200b\ufeff",
    "emoji of several characters": "\U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "stacked accents": "e" + "\u0301" * 60 + " dog",
    "markup": "<script>window.hacked = 1</script><img src=x onerror='hacked=1'>&lt;b&gt; <!-- ]]>",
    "end of a script": "</script></style></textarea><svg onload=hacked()>",
    "mathematics of matplotlib": r"It cost $5 and $6, $\frac{$, \$ $$ $\undefined{x}$ ^_{",
    "templates": "@@MAPS@@ @@DATA@@ ${1} {{x}} {0} %s \\1 \\g<0>",
    "special tokens in the text": "One <|endoftext|> day </s> [PAD] <s> <pad>",
    "separators of lines": "One\u2028day\u2029a\x0bdog\x0cran\x1c.\r\nEnd\rof",
    "characters that are none": "One \ufffd\ufffe\uffff day \U0010ffff",
    "blanks of every kind": "\u00a0\u2003\u3000 \t \u1680",
    "a JSON string": '"],"queries":[{"prompt":"\\u0000',
    "a long word": "a" * 20_000,
}
GIVEN = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


@pytest.fixture(scope="module")
def lm():
    return load_lm()


def tokens_in(lm, text, max_length=64):
    (batch,) = tokenize([text], lm.tokenizer, max_length)
    return tokens_of(lm.tokenizer, batch["input_ids"][0])


# Texts through everything that takes them -----------------------------------------------------------------------------


@GIVEN
@pytest.mark.parametrize("form", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_a_story_is_read_as_it_is(text, form, tmp_path):
    path, rows = tmp_path / f"train{form}", [{"text": text + "!"}, {"text": "A dog."}]
    if form == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        told = json.dumps(rows, ensure_ascii=False) if form == ".json" else "\n".join(map(json.dumps, rows)) + "\n"
        path.write_bytes(gzip.compress(told.encode()) if form == ".jsonl.gz" else told.encode())
    assert load_stories(path)["text"][:] == [text + "!", "A dog."]
    assert jobs.stories_on_disk(path, tmp_path)["text"][:] == [text + "!", "A dog."]  # the command line's own reader


def test_a_line_of_text_ends_at_its_newline_only(tmp_path):
    (tmp_path / "lines.txt").write_bytes("One\x0cday\u2028a\x85dog.\nTwo.\r\nThree.\rFour.".encode())
    assert load_stories(tmp_path / "lines.txt")["text"][:] == ["One\x0cday\u2028a\x85dog.", "Two.", "Three.", "Four."]


@pytest.mark.parametrize("form", [".jsonl", ".json", ".txt", ".jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_the_first_story(form, tmp_path):
    rows = [{"text": "One."}, {"text": "Two."}]
    told = {".jsonl": "\n".join(map(json.dumps, rows)), ".json": json.dumps(rows), ".txt": "One.\nTwo."}
    data = told[form.removesuffix(".gz")].encode("utf-8-sig")
    (tmp_path / f"train{form}").write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    assert load_stories(tmp_path)["text"][:] == ["One.", "Two."]


@GIVEN
def test_tokens_and_spans(text, lm, capsys):
    tokens = tokens_in(lm, text, 2048)
    start = len(tokens[0]) if tokens[0] == lm.tokenizer.bos_token else 0
    assert start and lm.tokenizer.decode(lm.tokenizer(text)["input_ids"][1:]).startswith("".join(tokens[1:]))
    for at in range(0, min(len(text), 40), 3):
        if text[at].strip(" "):
            first, end = token_span(lm.tokenizer, text, at, at + 1)
            assert 0 <= first < end <= len(lm.tokenizer(text)["input_ids"])
    (batch,) = completions([("One day " + text[:100], text[:50])], lm.tokenizer)
    assert bool((batch["labels"] != -100).any())


@GIVEN
def test_token_figures_draw_it_without_a_warning(text, lm, tmp_path):
    tokens = tokens_in(lm, text)
    values = np.linspace(-1, 1, len(tokens))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = token_figure([Panel(text[:60], tokens, values, (1, 2)), Panel("plain", tokens)])
        fig.savefig(tmp_path / "map.png", dpi=50)
        plt.close(fig)


def test_what_has_no_ink_is_drawn_as_a_box():
    from helpers.heatmap import _shown
    assert _shown("O\u200bn\u202ee\u00ad\u2060 \x00\x1b!") == "O□n□e□□ □□!"
    assert _shown(" Tom's “jam” — $5") == r" Tom's “jam” — \$5"


@GIVEN
def test_token_html_shows_it_and_runs_nothing(text, lm):
    from html.parser import HTMLParser
    tokens, read, tags = tokens_in(lm, text), [], set()
    parser = HTMLParser(convert_charrefs=True)
    parser.handle_data, parser.handle_starttag = read.append, lambda tag, attributes: tags.add(tag)
    parser.feed(token_html(tokens, np.arange(len(tokens)), span=(0, 2)))
    parser.close()
    assert tags <= {"div", "span", "br"} and "".join(read) == "".join(tokens).replace("\n", "↵")


@GIVEN
def test_nothing_printed_steers_a_terminal(text):
    line = printable(text)
    assert line.isprintable() and "\n" not in line
    assert excerpt(["A", text, "dog"], np.array([0.0, 1, 0])).isprintable()


def test_a_figures_name_cannot_leave_its_folder():
    for name in ("../x", "/tmp/x", "a/b", "x\x00", "", "x\n", "x.png"):
        with pytest.raises(ValueError, match="must be letters, digits"):
            save_figure(None, name)


@pytest.fixture(scope="module")
def page(lm, tmp_path_factory):
    """The explorer's page of all these texts as stories, as queries, and in the model's name."""
    stories = list(TEXTS.values())
    train = tokenize(stories, lm.tokenizer, 48, 8)
    factors = fit_ekfac(lm.model, train, linear_layers(lm.model, r"h\.0\.mlp"), progress=False)
    queries = [Query("One day " + TEXTS[name], TEXTS[name][:6]) for name in (
        "markup", "end of a script", "marks of writing direction", "NUL and control characters", "templates")]
    batches = completions([query[:2] for query in queries], lm.tokenizer)
    scores = influence(lm.model, factors, batches, train, progress=False)
    token = influence(lm.model, factors, batches, train, per="token", progress=False)
    assert bool(scores.isfinite().all()) and bool(
        ((token.sum(-1) - scores).abs() <= 1e-5 * token.abs().sum(-1)).all())
    named = lm.__class__(lm.model, lm.tokenizer, "</script><b>\u202e\x00")
    made = explorer.explore(named, factors, queries, stories, train, scores, 16, 256)
    path = tmp_path_factory.mktemp("hostile") / "page.html"
    explorer.write_page(path, *made)
    return path, made[0]


def test_the_explorers_page_holds_it_as_data(page):
    path, data = page
    text = path.read_bytes().decode("utf-8")
    template = explorer.TEMPLATE.read_text("utf-8")
    for tag in ("<script", "</script", "<img", "<svg", "<!--"):
        assert text.count(tag) == template.count(tag)
    told = re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    assert json.loads(told) == data and not set("<>&\u2028\u2029") & set(told)
    assert len(data["queries"]) == 5 and len(data["stories"]) >= 16


def test_the_explorers_page_in_a_browser(page):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    binary = next((found for found in map(shutil.which, filter(None, names)) if found), None)
    if binary is None:
        pytest.skip("no Chromium found: install the package chromium, or name one in CHROMIUM")
    path, data = page
    said = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        tab = browser.new_context(offline=True).new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(path.as_uri())
        tab.wait_for_function("maps !== null")
        for number, entry in enumerate(data["queries"]):
            tab.select_option("#query", str(number))
            assert tab.locator("#asked").text_content() == "".join(entry["tokens"])
            assert tab.locator(".story").count() == 16
        tab.fill("#search", "</script>")
        assert tab.evaluate("window.hacked") is None and tab.locator("#lists img, #lists svg, #lists b").count() == 0
        browser.close()
    assert not said


# Texts and files that are refused -------------------------------------------------------------------------------------


def test_lone_surrogates_are_refused_by_name(lm, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "A dog."}\n{"text": "One \\ud83d day"}\n')
    with pytest.raises(ValueError, match=r"row 1 of .*: character 4 is the lone surrogate '\\ud83d'"):
        load_stories(tmp_path)
    for call, where in ((lambda: tokenize(["A dog.", "x\udc80"], lm.tokenizer), r"texts\[1\]: character 1"),
                        (lambda: completions([("a \ud800", " b")], lm.tokenizer), r"pairs\[0\]: character 2"),
                        (lambda: token_span(lm.tokenizer, "ab\ud800", 0, 1), "text: character 2"),
                        (lambda: continuation(lm, "\udcff"), "prompt: character 0")):
        with pytest.raises(ValueError, match=where + " is the lone surrogate"):
            call()


def test_a_long_text_makes_no_long_message(lm):
    for pairs in ([("word " * 200_000, " end")], [("a", "b", "c" * 1_000_000)]):
        with pytest.raises((ValueError, TypeError)) as refused:
            completions(pairs, lm.tokenizer)
        assert len(str(refused.value)) < 500
    with pytest.raises(TypeError) as refused:
        tokenize([b"x" * 1_000_000], lm.tokenizer)
    assert len(str(refused.value)) < 500


NESTED = b'{"text":"a","n":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
FILES = {
    "utf16.txt": ("One day".encode("utf-16"), OSError, "UnicodeDecodeError"),
    "latin1.jsonl": ('{"text": "caf\u00e9"}'.encode("latin-1"), OSError, "UnicodeDecodeError"),
    "picture.txt": (b"\x89PNG\r\n\x1a\n\xff\xfe", OSError, "UnicodeDecodeError"),
    "nested.jsonl": (NESTED, OSError, "RecursionError"),
    "cut.jsonl": (b'{"text": "One."}\n{"text": "Tw', OSError, "JSONDecodeError"),
    "pretty.jsonl": (b'{\n "text": "One."\n}', OSError, "JSONDecodeError"),
    "lists.jsonl": (b'["One."]\n["Two."]\n', OSError, "JSONDecodeError"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "One."}\n' * 5000)[:-20], OSError, "EOFError"),
    "cut.txt.gz": (gzip.compress(os.urandom(4096).hex().encode())[:2000], OSError, "EOFError"),
    "crc.txt.gz": (gzip.compress(b"One.")[:-8] + bytes(8), OSError, "BadGzipFile"),
    "plain.jsonl.gz": (b'{"text": "One."}\n', OSError, "BadGzipFile"),
    "lines.parquet": (b'{"text": "One."}\n', OSError, "ArrowInvalid"),
    "empty.parquet": (b"", OSError, "ArrowInvalid"),
    "parquet.jsonl": (b"PAR1" + bytes(range(256)), OSError, "UnicodeDecodeError"),
    "types.jsonl": (b'{"text": "a", "n": 1}\n{"text": "b", "n": "x"}\n', OSError, "columns .*ArrowInvalid"),
    "shapes.jsonl": (b'{"text": "a", "n": {"x": 1}}\n{"text": "b", "n": [2]}\n', OSError, "columns .*Arrow"),
    "number.jsonl": (b'{"text": "a", "n": 1' + b"0" * 40 + b"}\n", OSError, "columns .*OverflowError"),
    "column.jsonl": (b'{"text": "a", "\\ud800": 1}\n', OSError, "columns .*UnicodeEncodeError"),
    "unnamed.jsonl": (b'{"text": "a", "": 1, "\\u0000": 2}\n', OSError, "columns .*could not be loaded"),
    "null.jsonl": (b'{"text": null}\n', ValueError, "row 0 of .* no string in a column 'text'"),
    "inner.jsonl": (b'{"text": ["a"]}\n', ValueError, "row 0 of .* no string in a column 'text'"),
    "second.jsonl": (b'{"text": "a"}\n{"story": "b"}\n', ValueError, "row 1 of .* no string in a column 'text'"),
    "string.jsonl": (b'"One."\n', ValueError, "row 0 of .* no string in a column 'text'"),
    "true.json": (b"[true, null]", ValueError, "row 0 of .* no string in a column 'text'"),
    "case.jsonl": (b'{"Text": "a"}\n', ValueError, "row 0 of .* no string in a column 'text'"),
    "empty.jsonl": (b"", ValueError, "holds no story: 0 rows"),
    "empty.json": (b"[]", ValueError, "holds no story: 0 rows"),
    "blank.txt": (b" \n\t\n \r\n", ValueError, "holds no story: 0 rows"),
    "blank.jsonl": (b'{"text": " \\t\\u00a0\\n"}\n', ValueError, "holds no story: 1 rows"),
    "ends.txt": (b"<|endoftext|>\n<|endoftext|>", ValueError, "holds no story: 0 rows"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_refused(name, tmp_path):
    data, error, said = FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=said) as refused:
        load_stories(tmp_path / name)
    assert name in str(refused.value) and len(str(refused.value)) < 1000


def test_folders_and_links_in_place_of_files(tmp_path):
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(FileNotFoundError, match="needs files of one kind"):
        load_stories(tmp_path)
    (tmp_path / "train.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="needs files of one kind"):
        load_stories(tmp_path)


def test_many_rows_of_one_token_and_one_long_line(lm, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n' * 20_000 + json.dumps({"text": "dog " * 250_000}) + "\n")
    texts = load_stories(tmp_path)["text"][:]
    assert len(texts) == 20_001 and len(texts[-1]) == 1_000_000
    batches = tokenize(texts, lm.tokenizer, max_length=32, batch_size=4096)
    assert sum(len(batch["input_ids"]) for batch in batches) == 20_001 and batches[-1]["input_ids"].shape[1] == 32
    assert "cut 1 of 20,001 texts to 32 tokens" in capsys.readouterr().out
    bare = load_lm().tokenizer
    bare.backend_tokenizer.post_processor = None  # without a start token one token has nothing to predict it from
    if len(bare("a")["input_ids"]) == 1:
        with pytest.raises(ValueError, match=r"texts\[0\] = 'a' gives 1 token"):
            tokenize(texts, bare)


def test_a_story_of_a_megabyte_on_one_line_goes_through_everything(lm, tmp_path, capsys, caplog):
    caplog.set_level("INFO", "helpers")
    stories = [("One day a dog ran. " * 55_000).strip(), *(f"Tom ran to the {word}." for word in ("dog", "cat", "sea"))]
    (tmp_path / "train.txt").write_text("\n".join(stories), "utf-8")
    assert len(stories[0]) > 1_000_000 and load_stories(tmp_path)["text"][:] == stories
    found = jobs.stories_on_disk(tmp_path, tmp_path)
    assert found["text"][:] == stories
    train = list(jobs.StoryBatches(found, lm.tokenizer, 64, 4))
    assert "1 of 4 stories are cut to 64 tokens" in caplog.text and train[0]["input_ids"].shape == (4, 64)
    capsys.readouterr()
    assert torch.equal(tokenize(stories, lm.tokenizer, 64, 4)[0]["input_ids"], train[0]["input_ids"])
    assert "cut 1 of 4 texts to 64 tokens" in capsys.readouterr().out
    tokens = tokens_of(lm.tokenizer, train[0]["input_ids"][0])
    assert stories[0].startswith("".join(tokens[1:])) and len(tokens) == 64
    assert tokens[slice(*token_span(lm.tokenizer, stories[0], 8, 9))] == [" a"]
    assert token_html(tokens, np.arange(64)).count("<span") == 64
    plt.close(token_figure([Panel(printable(stories[0])[:60], tokens, np.linspace(-1, 1, 64))]))
    factors = fit_ekfac(lm.model, train, linear_layers(lm.model, r"h\.0\.mlp"), progress=False)
    query = Query("One day a dog", " ran.")
    scores = influence(lm.model, factors, completions([query[:2]], lm.tokenizer), train, progress=False)
    made = explorer.explore(lm, factors, [query], stories, train, scores, 4, 64)
    assert made[0]["stories"]["0"] == tokens and explorer.write_page(tmp_path / "page.html", *made) < 100_000


# Models that are refused ----------------------------------------------------------------------------------------------


class Evil:
    """What a pickle can do: this one makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def folder(tmp_path):
    """A model folder of the bundled model's files, to be spoilt."""
    return Path(shutil.copytree(ROOT / "helpers" / "bundled" / "model", tmp_path / "model"))


def test_the_folder_is_sound_before_it_is_spoilt(folder):
    assert load_lm(folder).model.num_parameters() > 0


@pytest.mark.parametrize("protocol", [2, "zip"])
def test_weights_as_a_pickle_run_nothing(folder, tmp_path, protocol):
    (folder / "model.safetensors").unlink()
    state, ran = {"transformer.wte.weight": Evil(tmp_path / "ran")}, tmp_path / "ran"
    with open(folder / "pytorch_model.bin", "wb") as file:
        torch.save(state, file) if protocol == "zip" else pickle.dump(state, file, protocol)
    with pytest.raises(OSError, match="the model in .* could not be loaded"):
        load_lm(folder)
    assert not ran.exists()
    pickle.loads(pickle.dumps(state))  # control: it does run where nothing guards
    assert ran.exists()


def test_weights_as_a_sound_bin_file_are_read_without_running_anything(folder):
    model = load_lm(folder).model
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(load_lm(folder).model.transformer.wte.weight, model.transformer.wte.weight)


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_known_architecture_is_not_run(folder, tmp_path, where):
    about = json.loads((folder / where).read_text("utf-8"))
    about["auto_map"] = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", "own.T"]}
    (folder / where).write_text(json.dumps(about), "utf-8")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nM = T = C\n")
    try:
        lm = load_lm(folder)  # transformers has these classes itself
        assert type(lm.model).__module__.startswith("transformers.")
    except OSError as error:
        assert "could not be loaded" in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("spoil", ["cut", "header", "huge header", "not a model", "config", "shape", "no such class"])
def test_model_folders_that_are_refused(folder, spoil):
    weights, config = folder / "model.safetensors", folder / "config.json"
    data, about = weights.read_bytes(), json.loads(config.read_text("utf-8"))
    if spoil == "cut":
        weights.write_bytes(data[: len(data) // 2])
    if spoil == "header":
        weights.write_bytes(data[:8] + b"\xff" * 64 + data[72:])
    if spoil == "huge header":
        weights.write_bytes(b"\xff" * 8 + data[8:])
    if spoil == "not a model":
        weights.write_bytes(pickle.dumps("text"))
    if spoil == "config":
        config.write_text("{" * 10)
    if spoil == "shape":
        config.write_text(json.dumps(about | {"hidden_size": about["hidden_size"] * 2}))
    if spoil == "no such class":
        config.write_text(json.dumps(about | {"model_type": "../../evil"}))
    with pytest.raises((OSError, ValueError), match=re.escape(str(folder))):
        load_lm(folder)


PICKLES = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def sources():
    """(name, Python source) of the helpers and of the code cells of the notebooks."""
    for path in sorted((ROOT / "helpers").rglob("*.py")):
        yield path.name, path.read_text("utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
        for number, cell in enumerate(cells):
            lines = "".join(cell["source"]).splitlines()
            kept = [line for line in lines if not line.lstrip().startswith(("%", "!"))]
            yield f"{path.name}[{number}]", "\n".join(kept)


def unsafe(source):
    """What of a source could run what a file holds: pickles, trust_remote_code, eval and exec."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (name for name in names if name.split(".")[0] in PICKLES)
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "weights_only"):
            if getattr(node.value, "value", None) is not (node.arg == "weights_only"):
                yield f"{node.arg}={ast.unparse(node.value)}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "pd.read_pickle", "torch.hub.load", "os.system"):
                yield called


def test_nothing_here_unpickles_or_runs_foreign_code():
    """torch.load without weights_only is safe since torch 2.6, which pyproject.toml asks for."""
    own = {"distributed_lissa.py": ["weights_only=False"]}  # a process hands its own children their work
    assert {name: found for name, source in sources() if (found := list(unsafe(source)))} == own
    for source, found in (("import pickle", "pickle"), ("from dill import load", "dill"), ("eval(x)", "eval"),
                          ("f(trust_remote_code=True)", "trust_remote_code=True"),
                          ("np.load(f, allow_pickle=True)", "allow_pickle=True"),
                          ("torch.load(f, weights_only=False)", "weights_only=False")):  # controls
        assert list(unsafe(source)) == [found]
    assert sum("trust_remote_code=False" in source for _, source in sources()) >= 1


# Factors that are refused ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def factors():
    model = tiny.gpt_neo()
    return fit_ekfac(model, tiny.batches(tiny.stories(6)), linear_layers(model, "mlp"), progress=False)


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.3, 0.9, 0.99999])
def test_factors_cut_at_any_place_are_refused(factors, tmp_path, share):
    factors.save(tmp_path)
    file = tmp_path / "factors.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="factors.safetensors"):
        EKFACFactors.load(tmp_path)


def test_factors_as_a_pickle_run_nothing(tmp_path):
    torch.save({"A": Evil(tmp_path / "ran")}, tmp_path / "factors.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        EKFACFactors.load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("spoil", ["a byte", "a tensor less", "a tensor more", "other shapes", "count", "layers",
                                   "meta", "no JSON", "a list"])  # fmt: skip
def test_factors_that_were_changed_are_refused(factors, tmp_path, spoil):
    from safetensors import safe_open
    from safetensors.torch import save_file
    factors.save(tmp_path)
    path = tmp_path / "factors.safetensors"
    with safe_open(path, "pt") as file:
        meta, tensors = json.loads(file.metadata()["ekfac"]), {key: file.get_tensor(key) for key in file.keys()}
    name = next(key for key in tensors if key.startswith("Lambda/"))
    if spoil == "a byte":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        if spoil == "a tensor less":
            del tensors[name]
        if spoil == "a tensor more":
            tensors["A/more"] = torch.zeros(2)
        if spoil == "other shapes":
            tensors[name] = tensors[name].flatten().clone()
        meta |= {"count": {"n_tokens": 1}, "layers": {"layers": ["x"]}, "meta": {"fingerprint": ""}}.get(spoil, {})
        told = {"no JSON": "{", "a list": "[1]"}.get(spoil, json.dumps(meta))
        save_file(tensors, path, {"ekfac": told})
    with pytest.raises(ValueError, match="factors.safetensors.*(is damaged|cannot be read|was not written)"):
        EKFACFactors.load(tmp_path)
