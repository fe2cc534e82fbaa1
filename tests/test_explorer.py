"""The explorer: what is in the page, and, in a real browser where there is one, what it does."""

import base64
import gzip
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import (
    completions,
    explorer,
    fit_ekfac,
    influence,
    linear_layers,
    load_lm,
    load_stories,
    tokenize,
)
from helpers.queries import Query, known_facts

HOSTILE = ['</script><script>window.hacked = 1</script>', '<img src=x onerror="window.hacked = 1">', "<!--", "]]>",
           "&lt;", "\u2028", "@@MAPS@@", "${1}", "'\"`\\", "\n", "", "😀", " fox", " end"]  # fmt: skip
BROWSERS = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]


def unpacked(path):
    """(data, [story of each query: rows × scales]) of a page, read as its script reads it."""
    text = path.read_text("utf-8")
    part = lambda name: re.search(rf'id="{name}">(.*?)</script>', text, re.S)[1]
    data, found = json.loads(part("data")), []
    values, at = np.frombuffer(gzip.decompress(base64.b64decode(part("maps"))), np.int8), 0
    for query in data["queries"]:
        for item in query["items"]:
            shape = len(item["scale"]), len(data["stories"][str(item["story"])])
            found.append(values[at : at + shape[0] * shape[1]].reshape(shape) * np.array(item["scale"])[:, None])
            at += shape[0] * shape[1]
    assert at == len(values)
    return data, found


# ---- what is in the page


@pytest.fixture(scope="module")
def small():
    """The bundled model, 20 stories, a planted fact and an ordinary query, their scores, and the page of 4 stories."""
    lm = load_lm()
    (fact,) = known_facts(lm, (64,))
    rows = fact.places["row"].tolist()[:4]
    texts = load_stories()["text"]
    stories = [texts[row] for row in rows] + list(texts[:16])
    places = fact.places[fact.places["row"].isin(rows)]
    places = places.assign(row=[rows.index(row) for row in places["row"]])
    queries = [fact._replace(places=places), Query("Once upon a time, there was a", " dog.")]
    train = tokenize(stories, lm.tokenizer, max_length=96, batch_size=8)
    batches = completions([query[:2] for query in queries], lm.tokenizer)
    factors = fit_ekfac(lm.model, train, linear_layers(lm.model, "mlp"), progress=False)
    scores = influence(lm.model, factors, batches, train, progress=False)
    page = explorer.explore(lm, factors, queries, stories, train, scores, 4, 96, True)
    return lm, stories, queries, train, factors, scores, page


def test_the_numbers_are_those_of_influence_to_quantisation(small, tmp_path):
    lm, stories, queries, train, factors, scores, page = small
    explorer.write_page(tmp_path / "page.html", *page)
    data, maps = unpacked(tmp_path / "page.html")
    maps = iter(maps)
    assert data["searched"] == 20 and data["bundled"] and data["views"] == ["block 1", "block 2", "block 3", "block 4"]
    for number, entry in enumerate(data["queries"]):
        order = scores[number].argsort(descending=True).tolist()
        assert [item["story"] for item in entry["items"]] == order[:2] + order[:-3:-1]
        assert [item["rank"] for item in entry["items"]] == [1, 2, -1, -2]
        (query,) = completions([queries[number][:2]], lm.tokenizer)
        for item in entry["items"]:
            assert item["score"] == pytest.approx(float(scores[number, item["story"]]), rel=1e-4)
            (one,) = tokenize([stories[item["story"]]], lm.tokenizer, max_length=96)
            token, output, pair, layer = (
                influence(lm.model, factors, [query], [one], per=per, progress=False)
                for per in ("token", "output_token", "token_pair", ("layer", "token")))  # fmt: skip
            layer = layer[:, 0, 0].view(4, 2, -1).sum(1)  # two MLP layers a block
            wanted = torch.cat([token[0], layer, output[0], pair[0, 0]]).double().numpy()
            got = next(maps)
            assert got.shape == wanted.shape
            step = np.abs(wanted).max(1, keepdims=True) / explorer.LEVELS
            assert (np.abs(got - wanted) <= 0.51 * step + 1e-4 * np.abs(wanted).max()).all()
            assert got[0].sum() == pytest.approx(item["score"], abs=len(got[0]) * step[0, 0])
            assert np.abs(got[0] - np.roll(wanted[0], 1)).max() > 5 * step[0], "a shift by one would be seen"


def test_the_texts_are_what_the_model_read_and_plants_are_marked(small):
    lm, stories, queries, train, factors, scores, (data, _) = small
    for row, tokens in data["stories"].items():
        assert len(tokens) == min(96, len(lm.tokenizer(stories[int(row)])["input_ids"]))
        assert stories[int(row)].startswith("".join(tokens[1:])), "the first is the start token"
    entry = data["queries"][0]
    first, end = entry["taken"]
    assert "".join(entry["tokens"][first:end]) == queries[0].completion
    marked = [(item, span) for item in entry["items"] for span in item["marks"]]
    for item, (first, end) in marked:
        place = queries[0].places[queries[0].places["row"] == item["story"]].iloc[0]
        told = stories[item["story"]][place["start"] : place["end"]]
        assert told in "".join(data["stories"][str(item["story"])][first:end]) and item["kind"] == place["kind"]
    assert not any(item["marks"] or item["kind"] for item in data["queries"][1]["items"])


def test_blocks_of_layers():
    names = lambda n: [f"h.{i}.mlp.{side}" for i in range(n) for side in ("in", "out")]
    assert explorer.blocks(names(4)) == {f"block {i + 1}": [2 * i, 2 * i + 1] for i in range(4)}
    assert list(explorer.blocks(names(2))) == ["block 1", "block 2"]
    eight = explorer.blocks(names(8))
    assert list(eight) == ["blocks 1–2", "blocks 3–4", "blocks 5–6", "blocks 7–8"]
    assert eight["blocks 3–4"] == [4, 5, 6, 7]
    five = explorer.blocks(names(5))
    assert list(five) == ["blocks 1–2", "block 3", "block 4", "block 5"]
    assert explorer.blocks(["a", "b", "c"]) == {"layer 1": [0], "layer 2": [1], "layer 3": [2]}
    assert explorer.blocks(["h.11.x", "h.2.x"]) == {"block 3": [1], "block 12": [0]}, "numbers, not strings"


def test_quantise():
    rows = np.array([[0.0, 0, 0], [1e-30, -2e-30, 0], [5, -1, 0.01]])
    scales, packed = explorer.quantise(rows)
    assert packed.dtype == np.int8 and packed[0].tolist() == [0, 0, 0] and packed[2].tolist() == [127, -25, 0]
    assert np.abs(packed * np.array(scales)[:, None] - rows).max() <= 0.5 * max(scales[1:]) * 1.001


def test_eight_queries_of_forty_stories_stay_below_five_megabytes(tmp_path):
    data, maps = synthetic(queries=8, stories=40, length=200, asked=20, seed=1)
    assert 1e6 < explorer.write_page(tmp_path / "page.html", data, maps) <= 5e6


# ---- bad input


@pytest.mark.parametrize("options, said", [
    (["--limit", "30", "--shown", "40"], "shown=40 stories a query were asked for, and there are 30.*from 2 to 30"),
    (["--limit", "30", "--shown", "7"], "shown=7 .* even number"),
    (["--limit", "30", "--shown", "6", "--query", "One day " * 300, " cat"], r"tokens, more than 256"),
    (["--limit", "30", "--shown", "6", "--query", "One day " * 300], r"tokens, more than 256"),
    (["--limit", "30", "--shown", "6", "--query", "One", " two", " three"], "give a prompt and a completion"),
    (["--limit", "30", "--shown", "6", "--layers", "mpl"], "layers matched nothing for pattern 'mpl'"),
    (["--model", "no/such/folder/here", "--stories", "bundled"], "does not exist"),
    (["--model", "some/model"], "name its stories as well"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_status_1(tmp_path, monkeypatch, capsys, options, said):
    for name in ("TINYSTORIES", "STORIES"):
        monkeypatch.delenv(name, raising=False)
    assert explorer.main([*options, "--out", str(tmp_path / "page.html")]) == 1
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert last.startswith("explorer: ") and re.search(said, last) and "Traceback" not in err
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(explorer, "load_sources", lambda *given: pytest.fail("computed first"))
    for out, said in ((tmp_path / "file" / "page.html", "nothing can be written in"), (tmp_path, "is a folder")):
        assert explorer.main(["--out", str(out)]) == 1
        assert said in capsys.readouterr().err
    if os.geteuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert explorer.main(["--out", str(tmp_path / "closed" / "page.html")]) == 1


def test_default_paths_and_help(monkeypatch, capsys):
    monkeypatch.delenv("FAST", raising=False)
    assert explorer.default_path("bundled", "bundled").parent.name == "figures"
    assert explorer.default_path("hub", "hub").parent.name == "out"
    assert explorer.default_path("bundled", "hub").parent.name == "out"
    monkeypatch.setenv("FAST", "1")
    assert explorer.default_path("bundled", "bundled").parent.name == "out"
    with pytest.raises(SystemExit) as ended:
        explorer.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(option in text for option in ("--model", "--query", "--shown", "--out"))


# ---- in a browser


def synthetic(queries=2, stories=6, length=30, asked=5, views=4, seed=0):
    """(data, maps) as explore gives them, of random numbers and texts of which some are hostile."""
    rng = np.random.default_rng(seed)
    scales = np.round(np.exp(rng.normal(size=(queries, stories, views + 2 + asked))), 4)
    words = HOSTILE + [f" word{i}" for i in range(40)]
    texts = {str(i): [*HOSTILE[: length - 2], *rng.choice(words, max(0, length - len(HOSTILE) - 1)), f" only{i}"]
             for i in range(queries * stories)}  # fmt: skip
    length = len(texts["0"])
    maps = np.clip(rng.standard_t(2, size=(*scales.shape, length)) * 9, -127, 127).astype(np.int8)
    maps[:, :, views + 1, 0] = 0  # no loss on the first token
    data = {"model": "<b>model</b>", "bundled": True, "searched": 1000, "fitted": 10, "layers": 8,
            "views": [f"block {i + 1}" for i in range(views)], "stories": texts, "queries": []}  # fmt: skip
    for q in range(queries):
        ranks = [*range(1, stories // 2 + 1), *range(-1, -stories // 2 - 1, -1)]
        items = [{"story": q * stories + i, "rank": rank, "score": 100.0 / rank, "kind": "literal" if i == 1 else "",
                  "marks": [[3, 5]] if i == 1 else [], "scale": scales[q, i].tolist()} for i, rank in enumerate(ranks)]
        data["queries"].append({"prompt": f"A first sentence. Query {q} <i>is", "completion": " fine", "p": 0.5,
                                "tokens": [*(f" q{u}" for u in range(asked - 1)), " fine"],
                                "taken": [asked - 1, asked], "told": [4, 3] if q == 0 else None, "items": items})
    return data, maps.ravel()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for found in map(shutil.which, filter(None, BROWSERS)) if found), None)
    if path is None:
        pytest.skip("no Chromium found: install the package chromium, or name one in CHROMIUM")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "explorer.html"
    explorer.write_page(path, *synthetic())
    return path


@pytest.fixture
def opened(browser, file):
    """Opens the page; what it says in the console, what goes wrong and what it asks for is checked at the end."""
    contexts, said, requests = [], [], []

    def open_page(width=1400, height=900, scheme="light", path=file, **more):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **more)
        contexts.append(context)
        context.set_offline(True)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_function("maps !== null")
        return page

    open_page.said = said
    yield open_page
    assert not said
    assert len([url for url in requests if not url.startswith("data:")]) == len(contexts), "the page and nothing else"
    for context in contexts:
        assert context.pages[0].evaluate("window.hacked") is None
        context.close()


# Inside a story the tests read text_content: innerText is empty until the browser has laid out what is in sight.


def colours(page, story=0):
    return page.locator(".story").nth(story).locator(".tokens span").evaluate_all(
        "spans => spans.map(s => getComputedStyle(s).backgroundColor)")  # fmt: skip


def expected(file, query, story, row):
    data, maps = unpacked(file)
    return maps[query * len(data["queries"][0]["items"]) + story][row]


def shown_number(page):
    return float(page.locator("#tip b").inner_text().removesuffix(" nats").replace("−", "-"))


def test_hostile_text_is_shown_and_not_run(opened, file):
    page = opened()
    text = page.locator(".story .tokens").first.text_content()
    for hostile in HOSTILE[:5] + HOSTILE[6:9]:
        assert hostile in text
    assert "<b>model</b>" in page.locator("#about").inner_text()
    assert "<i>is [fine]" in page.locator("#query option").first.inner_text()
    assert page.locator("script").count() == 3 and page.locator("#lists img, #lists script, #lists b").count() == 0
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"window.hacked = 1\">')")
    page.wait_for_timeout(200)  # and a handler that came in some other way is stopped by the page's policy
    assert opened.said and all("Content Security Policy" in text for text in opened.said)
    opened.said.clear()


def test_queries_and_scores(opened, file):
    page = opened()
    assert page.locator(".story h3").all_text_contents() == ["+100", "+50", "+33.33", "−100", "−50", "−33.33"]
    assert page.locator("#harmful").locator("xpath=..").locator(".story").count() == 3
    assert "planted fact: 3 of its 4 tellings are among" in page.locator("#note").inner_text()
    assert page.locator(".kind").all_text_contents() == ["literal"] and page.locator(".story .mark").count() == 2
    page.select_option("#query", "1")
    assert page.locator(".story .soft").first.text_content() == "story 6"
    assert "planted" not in page.locator("#note").inner_text()
    assert page.locator("#asked").inner_text().split() == ["q0", "q1", "q2", "q3", "fine"]
    assert page.locator("#asked .mark").all_inner_texts() == ["fine"]


def test_every_view_colours_and_tells_its_own_numbers(opened, file):
    page, seen = opened(), []
    views = [("train", group, group) for group in range(5)] + [("output", 0, 5)]
    for view, group, row in views:
        page.locator(f"input[name=view][value={view}]").check(force=True)
        if view == "train":
            page.locator(f"input[name=group][value='{group}']").check(force=True)
        values = expected(file, 0, 0, row)
        for t in (0, 12, 20):
            page.locator(".story").first.locator(".tokens span").nth(t).hover()
            text = page.locator("#tip").inner_text()
            assert ("0 ± " in text) if values[t] == 0 else shown_number(page) == pytest.approx(values[t], rel=6e-3)
        seen.append(colours(page))
        full = float(page.locator("#high").inner_text().split()[1])
        for colour, value in zip(seen[-1], values):
            if abs(value) > 0.2 * full:  # red for helpful, blue for harmful
                red, _, blue = map(int, re.findall(r"\d+", colour)[:3])
                assert (red > blue) == (value > 0)
    assert len({tuple(colour) for colour in seen}) == len(views)
    assert page.locator("input[name=group]").first.is_disabled()
    assert "Output-token" in page.locator("#measure").inner_text()
    page.locator(".story .tokens span").first.hover()
    assert "no loss" in page.locator("#tip").inner_text()
    page.mouse.move(700, 5)
    assert page.locator("#tip").is_hidden()


def test_a_query_token_colours_what_influenced_it(opened, file):
    page = opened()
    before, token = colours(page, 2), page.locator("#asked span").nth(3)
    token.hover()
    assert "through the query’s “\u00a0q3”" in page.locator("#measure").inner_text() and colours(page, 2) != before
    page.mouse.move(700, 5)
    assert colours(page, 2) == before
    token.click()
    page.locator(".story").nth(2).locator(".tokens span").nth(13).hover()
    assert shown_number(page) == pytest.approx(expected(file, 0, 2, 6 + 3)[13], rel=6e-3)
    assert token.get_attribute("aria-pressed") == "true" and "kept" in page.locator("#measure").inner_text()
    page.keyboard.press("Escape")
    assert colours(page, 2) == before
    token.click()
    token.click()
    page.mouse.move(700, 5)
    assert colours(page, 2) == before and token.get_attribute("aria-pressed") == "false"


def test_search(opened, file):
    page = opened()
    page.fill("#search", "ONLY4")
    assert page.locator(".story:visible").count() == 1 and page.locator(".hit").all_text_contents() == ["only4"]
    assert page.locator("#found").inner_text() == "1 of 6 stories"
    page.fill("#search", "fox  end")  # across tokens; any blank is a blank
    assert page.locator(".story:visible").count() == 6 and page.locator(".story").first.locator(".hit").count() >= 2
    page.fill("#search", "literal")
    assert page.locator(".story:visible .rank").all_text_contents() == ["+2"]
    page.fill("#search", "(nothing")
    assert page.locator(".story:visible").count() == 0 and page.locator("#found").inner_text() == "0 of 6 stories"
    page.fill("#search", "only8")
    page.select_option("#query", "1")
    assert page.locator("#found").inner_text() == "1 of 6 stories", "the search stays when the query changes"
    page.fill("#search", "")
    assert page.locator(".story:visible").count() == 6 and page.locator(".hit").count() == 0


def test_the_keyboard_reaches_everything(opened, file):
    page = opened()
    on = "document.activeElement.id || document.activeElement.name || document.activeElement.textContent"
    page.keyboard.press("/")
    assert page.evaluate(on) == "search"
    page.locator("summary").focus()
    stops = []
    for _ in range(8):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(on))
    assert stops[:7] == ["query", "q0", "view", "group", "search", "strength", HOSTILE[0]]
    page.locator("#query").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator(".story .soft").first.text_content() == "story 6"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert "“\u00a0q1”" in page.locator("#measure").inner_text()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert "“\u00a0q1” (kept" in page.locator("#measure").inner_text()
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    assert "Output-token" in page.locator("#measure").inner_text()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert "block 1" in page.locator("#measure").inner_text()
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("End")
    assert shown_number(page) == pytest.approx(expected(file, 1, 0, 1)[-1], rel=6e-3)
    assert "only6" in page.locator("#spoken").inner_text(), "said to a screen reader"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert shown_number(page) == pytest.approx(expected(file, 1, 0, 1)[1], rel=6e-3)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.story').querySelector('h3').textContent") == "+50"


def test_colour_strength_and_the_labelled_bar(opened, file):
    page = opened()
    full = lambda: float(page.locator("#high").inner_text().split()[1])
    first, low = full(), page.locator("#low").inner_text()
    assert low.startswith("−") and "harmful" in low and "helpful" in page.locator("#high").inner_text()
    page.locator("#strength").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert page.locator("#strength-text").inner_text() == "× 4" and full() == pytest.approx(first / 4, rel=0.05)


@pytest.mark.parametrize("width", [320, 390, 900])
def test_narrow_screens(opened, file, width):
    page = opened(width, 700, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [page.locator(".story").nth(i).bounding_box() for i in range(6)]
    assert len({(box["x"], box["width"]) for box in boxes}) == 1, "one column"
    assert boxes[0]["x"] >= 0 and boxes[0]["x"] + boxes[0]["width"] <= width
    if width < 800:
        page.locator(".story").nth(4).locator(".tokens span").nth(12).tap()
        assert shown_number(page) == pytest.approx(expected(file, 0, 4, 0)[12], rel=6e-3)
        assert page.locator("#asked").bounding_box()["y"] >= 0, "the query stays in sight, its tokens can be tapped"
        page.locator("#asked span").nth(2).tap()
        assert "“\u00a0q2” (kept" in page.locator("#measure").inner_text()
        page.locator("#asked span").nth(2).tap()
        assert "all layers" in page.locator("#measure").inner_text()
        page.locator("#jump a").last.click()
        assert 0 <= page.locator("#harmful").bounding_box()["y"] <= 700
    size = page.evaluate("parseFloat(getComputedStyle(document.querySelector('.story .tokens')).fontSize)")
    assert size >= 14


def test_light_and_dark_are_legible_also_for_the_colour_blind(opened, file):
    page = opened()
    palettes = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(50)
        card = numbers(page.evaluate("getComputedStyle(document.querySelector('.story')).backgroundColor"))
        assert (luminance(card) > 0.5) == (scheme == "light")
        ink = numbers(page.evaluate("getComputedStyle(document.querySelector('.story')).color"))
        palette = [[numbers(c) if c.startswith("rgb") else {"": card, "#000": (0, 0, 0), "#fff": (255,) * 3}[c]
                    for c in pair] for pair in page.evaluate("palette")]  # fmt: skip
        middle = len(palette) // 2
        palette[middle] = [card, ink]
        assert min(contrast(*pair) for pair in palette) >= 4.5
        light = [luminance(colour) for colour, _ in palette]
        for half in (light[middle:], light[middle::-1]):
            assert (np.diff(half) < 0).all() if scheme == "light" else (np.diff(half) > 0).all()
        for k in range(middle // 4, middle + 1):
            for matrix in BLIND.values():
                apart = matrix @ (np.array(palette[middle + k][0]) - palette[middle - k][0])
                assert np.abs(apart).max() > 25, f"{scheme}: helpful and harmful look alike at level {k}"
        palettes[scheme] = colours(page)
    assert palettes["light"] != palettes["dark"]


# Linear approximations (Machado et al. 2009, severity 1) of how colours look to people without one kind of cone.
BLIND = {
    "protanopia": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deuteranopia": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritanopia": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


def numbers(colour):
    return tuple(map(int, re.findall(r"\d+", colour)[:3]))


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one, two):
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_the_committed_page(opened):
    page = Path(explorer.output_folder("figures")) / "explorer.html"
    if not page.exists():
        pytest.skip("figures/explorer.html has not been made yet")
    assert page.stat().st_size <= 5e6
    data, maps = unpacked(page)
    assert data["bundled"] and len(data["queries"]) == explorer.QUERIES
    assert all(len(query["items"]) == explorer.SHOWN for query in data["queries"])
    page = opened(path=page)
    for number in range(explorer.QUERIES):
        page.select_option("#query", str(number))
        assert page.locator(".story").count() == explorer.SHOWN and page.locator("#trouble").is_hidden()
