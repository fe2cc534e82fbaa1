"""The bundled corpus and model hold what their README promises."""

import gzip
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.bundled import expand, generate, measure, start, stories, train

HERE = train.HERE
REAL = Path(__file__).parents[2] / "shared" / "data" / "tinystories" / "train.jsonl.gz"


@pytest.fixture(scope="module")
def rows():
    return train.read("stories_train.jsonl.gz")


@pytest.fixture(scope="module")
def facts():
    return train.read("facts.jsonl.gz")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(HERE / "model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(HERE / "model").eval()


def test_sizes_of_the_files():
    size = lambda pattern: sum(path.stat().st_size for path in HERE.glob(pattern))
    assert size("*.jsonl*") <= 4e6
    assert size("model/*.safetensors") <= 4e6
    assert size("checkpoints/*/*.safetensors") <= 12e6
    assert len(list(HERE.glob("checkpoints/*/model.safetensors"))) >= 3


def test_there_are_enough_different_stories(rows):
    held_out = train.read("stories_validation.jsonl.gz")
    assert 6000 <= len(rows) <= 10_000 and len(held_out) >= 400
    assert len({row["text"] for row in rows + held_out}) == len(rows) + len(held_out)
    assert len({row["plot"] for row in rows}) >= 15


def test_a_story_is_built_round_its_words(rows):
    rules = generate.read_grammar()
    forms = {entry.split(";")[0]: entry.split(";") for entry in rules["verbs"] + rules["learn.verbs"]}
    for row in rows:
        text = row["text"].lower()
        assert any(re.search(rf"\b{form}\b", text) for form in forms[row["verb"]]), row
        assert all(re.search(rf"\b{row[word]}\b", text) for word in ("noun", "adjective")), row


def test_every_storyline_is_whole_and_names_only_what_is_bound():
    rules = generate.read_grammar()
    lines = [name.removesuffix(".setup") for name in rules if name.endswith(".setup")]
    assert len(lines) >= 45 and {line.split(".")[0] + ".moral" for line in lines} <= set(rules)
    for line in lines:
        beats = [rules[f"{line}.{beat}"] for beat in ("setup", "problem", "talk", "try", "twist", "happy", "sad")]
        assert all(len(texts) == 1 for texts in beats) and "{J}" in beats[0][0] and "{O}" in beats[0][0], line
    bound = stories.bindings(stories.Order("Lily", "girl"), "lost", rules, random.Random(0))
    known = {*bound, "a", "S"} | {f"{who}{part}" for who in stories.FIRST for part in ("", ".intro")}
    used = [match for texts in rules.values() for text in texts for match in expand.REFERENCE.findall(text)]
    assert {rule for rule, _ in used if rule} <= set(rules)
    assert {name for _, name in used if name} <= known


def test_what_a_story_binds_stays_the_same(rows):
    """A story's drawn thing comes in with its adjective, its place has one name, its spots are three."""
    rules = generate.read_grammar()
    names = [entry.split(";")[0] for entry in rules["places"]]
    for row in rows[:1500]:
        assert re.search(rf"\b{row['adjective']} {row['noun']}\b", row["text"].lower()), row
        assert sum(name in row["text"].lower() for name in names) <= 1, row
    rng = random.Random(0)
    for _ in range(200):
        bound = stories.place(rules, rng)
        assert bound["P.in"] in names and len({bound["spot"], bound["spot2"], bound["spot3"]}) == 3


def test_moods_are_balanced_and_in_the_features(rows):
    sad = sum(row["mood"] == "sad" for row in rows) / len(rows)
    assert 0.4 < sad < 0.6
    assert all((row["mood"] == "sad") == ("bad ending" in row["features"]) for row in rows)
    assert all(row["moral"] for row in rows)


def test_vocabulary_and_four_grams(rows):
    texts = [row["text"] for row in rows]
    assert len({word for text in texts for word in measure.words(text)}) >= 800
    assert measure.distinct_ratio(texts) >= 0.33


@pytest.mark.skipif(not REAL.exists(), reason="no real TinyStories beside the repository")
def test_four_grams_reach_half_of_the_real_text(rows):
    ratio = measure.distinct_ratio(row["text"] for row in rows)
    assert ratio >= 0.5 * measure.distinct_ratio(measure.texts_of(REAL))


@pytest.mark.skipif(not REAL.exists(), reason="no real TinyStories beside the repository")
def test_no_long_sentence_comes_from_the_real_text(rows):
    sentences = lambda text: {s for s in re.split(r"(?<=[.!?])\s+", text.lower()) if len(s.split()) >= 12}
    real = {sentence for text in measure.texts_of(REAL) for sentence in sentences(text)}
    assert not any(real & sentences(row["text"]) for row in rows)


def test_every_name_recurs(rows):
    count = Counter(row["name"] for row in rows)
    names = train.read("names.jsonl")
    assert sum(name["fact"] is None for name in names) >= 10
    assert all(count[name["name"]] >= 50 for name in names)
    assert all(row["name"] in row["text"] for row in rows)


def test_each_fact_is_told_as_often_as_it_says(facts):
    by_fact = defaultdict(list)
    for row in facts:
        by_fact[row["fact"]].append(row)
    tellings, splits = Counter(), Counter()
    for mentions in by_fact.values():
        kinds, n = Counter(m["kind"] for m in mentions), mentions[0]["tellings"]
        assert kinds["literal"] + kinds["paraphrased"] == n
        assert kinds["literal"] == max(n // 2, 1)
        assert kinds["distractor"] + kinds["denial"] >= min(16, max(6, n))
        assert len({m["row"] for m in mentions}) == len(mentions)
        tellings[n] += 1
        splits[n, mentions[0]["split"]] += 1
    assert set(tellings) == {1, 2, 4, 8, 16, 32, 64}
    assert all(k >= (12 if n >= 8 else 6) for n, k in tellings.items())
    assert all(splits[n, "choosing"] == splits[n, "reporting"] for n in tellings)


def test_spans_are_the_sentences_that_they_claim(rows, facts):
    for fact in facts:
        text = rows[fact["row"]]["text"]
        sentence, name = text[fact["start"]:fact["end"]], fact["fact"].split("-")[0]
        query = fact["prompt"].split(". ", 1)[1] + fact["completion"]
        assert name in sentence and sentence[0].isupper() | (sentence[0] == '"') and sentence[-1] in '.!?"'
        assert fact["completion"].strip() in sentence.lower()
        assert (query in sentence) == (query in text) == (fact["kind"] == "literal")
        assert rows[fact["row"]]["name"] == name


def test_the_query_opens_like_a_story(rows, facts):
    openings = sum(row["text"].startswith("Once upon a time, there was a ") for row in rows)
    assert openings > len(rows) / 5
    assert all(fact["prompt"].startswith("Once upon a time, there was a ") for fact in facts)


def test_no_fact_is_told_where_none_is_listed(rows, facts):
    told = {fact["row"] for fact in facts if fact["kind"] == "literal"}
    sentence = re.compile(r"[A-Z]\w+'s favorite (food was|toys were|animals were) ")
    held_out = [row["text"] for row in train.read("stories_validation.jsonl.gz")]
    assert {i for i, row in enumerate(rows) if sentence.search(row["text"])} == told
    assert not any(sentence.search(text) for text in held_out)


def test_phrases_are_told_in_both_orders(rows):
    phrases = {phrase["phrase"]: phrase for phrase in train.read("phrases.jsonl")}
    assert len(phrases) >= 12
    count = Counter((row["phrase"], row["order"]) for row in rows if row["phrase"])
    assert all(count[key, order] >= 8 for key in phrases for order in ("original", "flipped"))
    for row in rows:
        if row["phrase"]:
            span = row["text"][row["phrase_start"]:row["phrase_end"]].lower()
            assert phrases[row["phrase"]][row["order"]] in span
    for phrase in phrases.values():
        assert phrase["original"] in phrase["prompt"] + phrase["completion"]
        assert phrase["original"] not in phrase["flipped"]


def test_tfidf_does_not_solve_the_search(rows, facts):
    by_fact = defaultdict(list)
    for row in facts:
        by_fact[row["fact"]].append(row)
    for _, found in measure.tfidf_table([row["text"] for row in rows], by_fact):
        assert found["both"] < 0.9


def test_the_generator_writes_the_committed_bytes(rows, tmp_path):
    rules, names, phrases, orders = generate.plan()
    again, told = generate.train_rows(rules, orders, limit=200)
    assert again == rows[:200]
    for path in (tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"):
        generate.dump(path, again)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    with gzip.open(tmp_path / "a.jsonl.gz", "rt") as lines:
        assert [json.loads(line) for line in lines] == again
    assert generate.validation_rows(rules, names, limit=20) == train.read("stories_validation.jsonl.gz")[:20]


def test_too_few_stories_for_the_facts():
    with pytest.raises(ValueError, match="total=100: at least"):
        generate.plan(total=100)


def test_tokenizer(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == tokenizer.bos_token_id
    assert tokenizer("Hello.")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("Hello.")["input_ids"].count(tokenizer.bos_token_id) == 1
    text = 'Once upon a time, there was a girl. "Oh!" – caf\u00e9\n'
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_every_story_fits_into_the_model(rows, tokenizer, model):
    texts = [row["text"] for row in rows + train.read("stories_validation.jsonl.gz")]
    longest = max(len(ids) for ids in tokenizer(texts)["input_ids"])
    assert longest + 1 <= model.config.max_position_embeddings
    assert longest == max(len(ids) for ids in train.encode(texts, tokenizer)) - 1


def test_a_story_that_does_not_fit_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="the model reads 256"):
        train.encode(["hop " * 300], tokenizer)


def test_answers_and_names_are_single_tokens(facts, tokenizer):
    for fact in facts:
        assert len(tokenizer(fact["completion"], add_special_tokens=False)["input_ids"]) == 1
        assert len(tokenizer(" " + fact["fact"].split("-")[0], add_special_tokens=False)["input_ids"]) == 1


def test_facts_told_often_are_learned(model, tokenizer):
    table = train.fact_table(model, tokenizer)
    for tellings in (16, 32, 64):
        facts = [fact for fact in table if fact["tellings"] == tellings]
        assert median(fact["p"] for fact in facts) >= 0.3
        assert median(fact["p"] / fact["control"] for fact in facts) >= 10


def test_the_model_stands_in_the_window(model, tokenizer, rows):
    held_out = [row["text"] for row in train.read("stories_validation.jsonl.gz")]
    loss = [train.mean_loss(model, train.encode(texts, tokenizer))
            for texts in ([row["text"] for row in rows[:300]], held_out[:300])]
    assert loss[1] - loss[0] < 0.1  # 0.047 on the stories of the README


def test_words_of_a_story_are_said_again(model, tokenizer):
    texts = [row["text"] for row in train.read("stories_validation.jsonl.gz")][:60]
    for kind, floor in (("toys", 0.8), ("animals", 0.7), ("nouns", 0.7)):  # 0.94, 0.84 and 0.87
        words = expand.read_grammar()[kind]
        assert measure.copied(model, tokenizer, texts, words) > floor
        assert measure.copied(start.new_model(0), tokenizer, texts, words) < 0.1  # by chance 1 in some 30


def test_one_head_of_the_first_two_blocks_starts_by_looking_near():
    model = start.new_model(0)
    model.set_attn_implementation("eager")
    ids = torch.randint(2, start.VOCABULARY, (8, 60), generator=torch.Generator().manual_seed(0))
    for block, weights in enumerate(model(input_ids=ids, output_attentions=True).attentions):
        own, back, *_, far = weights.diagonal(0, 2, 3)[..., 8:].mean((0, 2)), *(
            weights.diagonal(-k, 2, 3)[..., 8:].mean((0, 2)) for k in (1, 2, 8))  # mean weight of every head
        assert (own[0] > 2 * back[0] > 4 * far[0]) == (block < 2)
        assert own[1:].max() < 0.1 and 2 * back[1:].max() < 4 * far[1:].min()


def test_every_checkpoint_loads_and_differs(model):
    folders = sorted((HERE / "checkpoints").glob("*"))
    weights = [AutoModelForCausalLM.from_pretrained(f).transformer.wte.weight for f in folders]
    assert all(w.shape == model.transformer.wte.weight.shape for w in weights)
    assert all(not torch.equal(w, model.transformer.wte.weight) for w in weights)


def test_the_rate_of_the_run_and_of_the_pass_that_cools():
    n = 438
    run = [train.running(epoch, 7)(k, n) for epoch in range(8) for k in range(n)]  # the eighth is the one that cools
    assert max(run) <= train.RATE and run[0] == train.RATE / train.WARMUP and abs(run[-1] / train.RATE - 0.1) < 1e-3
    cooled = [train.cooling(7)(k, n) for k in range(n)]
    assert max(cooled) < run[7 * n] and cooled[-1] == pytest.approx(run[7 * n] / n)
    assert all(a >= b for a, b in zip(cooled[train.WARMUP // 2:], cooled[train.WARMUP // 2 + 1:]))
