"""One story from the grammar: what it is built round is drawn first, then its beats are expanded in order."""
import re
from dataclasses import dataclass, field
from random import Random

from helpers.bundled.expand import expand, polish

TRAITS = ("hair", "coat", "pal", "color")  # of every child, told again and again
MAX_PIECES = 200  # words and punctuation marks; keeps every story within the model's 256 positions
CHANCE = {"background": 0.65, "foreshadowing": 0.08, "dialogue": 0.3, "attempt": 0.3, "twist": 0.1, "afterwards": 0.35,
          "moral": 0.25}
FEATURES = ("foreshadowing", "dialogue", "twist", "moral")  # of these, the ones that a row names
FIRST = {"F": "\1", "A": "\2", "Q": "\3"}  # stand for a character until its first mention is known


@dataclass(frozen=True)
class Order:
    """What the plan wants of a story: its child, and sentences to insert, each (kind, id, template, bindings)."""

    name: str
    kid: str
    extras: tuple = field(default=())


def pronouns(kid, prefix=""):
    """Bindings he, him, his, himself of a girl or boy; with a prefix such as "F." for another character."""
    words = ("she", "her", "her", "herself") if kid == "girl" else ("he", "him", "his", "himself")
    return dict(zip((f"{prefix}he", f"{prefix}him", f"{prefix}his", f"{prefix}himself"), words))


def world(name, kid, rules):
    """What belongs to a child in all of its stories: traits, who comes along, things, a grown-up, what it learns."""
    own = Random(f"traits {name}")
    bound = {f"own.{part}": own.choice(rules[f"trait_{part}"]) for part in TRAITS}
    his, trait, animal = ("her" if kid == "girl" else "his"), own.choice(rules["trait"]), own.choice(rules["beasts"])
    relative, friend = own.choice(("sister", "cousin", "brother")), bound["own.pal"]
    pet = ({"F": f"the {animal}", "F.intro": f"a {trait} {animal}"}, own.choice(("girl", "boy")))
    pal = ({"F": friend, "F.intro": f"{his} friend {friend}"}, "boy" if friend in rules["friend_boys"] else "girl")
    family = ({"F": f"{his} {relative}", "F.intro": f"{his} {trait} {relative}"},
              "boy" if relative == "brother" else "girl")
    companion, things = own.choice((pet, pal, family)), own.sample(rules["nouns"], 4)
    return bound, companion, things, own.choice(rules["adults"]), own.choice(rules["learn.verbs"])


def place(rules, rng):
    """Bindings of one place: its name in two forms, three spots, what lies and lives there, a stranger."""
    bound = dict(zip(("P.in", "P.to"), rng.choice(rules["places"]).split(";")))
    bound |= {f"spot{i}".removesuffix("1"): expand(spot, rules, {}, rng)
              for i, spot in enumerate(rng.sample(rules["spots"], 3), 1)}
    bound |= {part: rng.choice(rules[part]) for part in ("sights", "locals")}
    person = rng.choice(rules["people"])
    return bound | {"Q.intro": person, "Q": "the " + person.split(" ", 1)[1]}


def bindings(order, plot, rules, rng):
    """Everything a story's templates may refer to, drawn once, so that what is introduced stays the same."""
    own, (companion, kid), things, adult, lesson = world(order.name, order.kid, rules)
    bound = {"N": order.name, "kid": order.kid} | own | pronouns(order.kid) | place(rules, rng)
    bound |= companion | pronouns(kid, "F.")
    bound |= dict(zip(("G", "G.he", "G.him", "G.his"), adult.split(";")))
    animal = rng.choice([a for a in rules["beasts"] if f"the {a}" != bound["F"]])
    bound |= {"A": f"the {animal}", "A.intro": f"a {rng.choice(rules['trait'])} {animal}"}
    bound |= {"O": rng.choice(things), "J": rng.choice(rules["adjectives"])}
    bound |= dict(zip(("v", "v.ed", "v.ing"), (lesson if plot == "learn" else rng.choice(rules["verbs"])).split(";")))
    for names, rule in ((("color", "color2"), "color"), (("nook", "nook2"), "nooks")):
        bound |= dict(zip(names, rng.sample(rules[rule], 2)))
    bound |= {"food": rng.choice(rules["foods"]),
              "toys": rng.choice([toy for toy in rules["toys"] if toy != f"{bound['O']}s"]),
              "animals": rng.choice(rules["animals"]), "moral": rng.choice(rules[f"{plot}.moral"])}
    return bound | {"snack": expand(rng.choice(rules["snack"]), rules, bound, rng)}


def introduce(passages, bound):
    """Name the characters: in full at the first mention ("a shy fox"), then shortly ("the fox")."""
    named = set()
    for beat, passage in passages:
        for who, mark in FIRST.items():
            if mark in passage and who not in named:
                passage = passage.replace(mark, bound[f"{who}.intro"], 1)
                named.add(who)
            passage = passage.replace(mark, bound[who])
        yield beat, polish(passage)


def beats(line, mood, features, bound, rules, rng):
    """The passages of a storyline (such as lost.3) in order; those whose feature was not drawn are left out."""
    plot = line.split(".")[0]
    close = f"{plot}.close.{mood}" if f"{plot}.close.{mood}" in rules else f"close.{mood}"
    order = {"open": None, "traits": None, "about": "background", "hint": "foreshadowing", f"{line}.setup": None,
             f"{line}.problem": None, f"{line}.talk": "dialogue", f"{line}.try": "attempt", f"{line}.twist": "twist",
             f"{line}.{mood}": None, close: "afterwards", "moralize": "moral"}
    drawn = {beat: rng.choice(rules[beat]) for beat, feature in order.items() if feature in (None, *features)}
    drawn["traits"] = f"{{N}}'s {rng.choice(rules['traits'])}"
    if "{v" not in drawn[f"{line}.setup"]:
        drawn["open"] += " " + rng.choice(rules["use.verb"])
    hidden = bound | {f"{who}{part}": mark for who, mark in FIRST.items() for part in ("", ".intro")}
    return list(introduce([(beat, expand(text, rules, hidden, rng)) for beat, text in drawn.items()], bound))


def join(passages):
    """Text, and the start of every passage in it."""
    text, starts = "", []
    for _, passage in passages:
        text += " " if text else ""
        starts.append(len(text))
        text += passage
    return text, starts


def insert_extras(passages, extras, bound, rules, rng):
    """Put the planned sentences before the plot begins; a quarter of the tellings after its setup or its end."""
    for kind, key, template, extra in extras:
        sentence = polish(expand(template, rules, bound | extra, rng))
        setup, = (i for i, (beat, _) in enumerate(passages) if beat.endswith(".setup"))
        end, = (i for i, (beat, _) in enumerate(passages) if beat.endswith((".happy", ".sad")) and "close" not in beat)
        late = kind in ("literal", "paraphrased") and rng.random() < 0.25
        at = rng.choice((setup + 1, end + 1, len(passages))) if late else rng.randint(1, setup)
        passages.insert(at, (f"extra.{kind}.{key}", sentence))


def draft(order, line, mood, rules, rng):
    """One attempt at a story of a storyline: (row without text, passages)."""
    plot = line.split(".")[0]
    features = [name for name, chance in CHANCE.items() if rng.random() < chance]
    bound = bindings(order, plot, rules, rng)
    passages = beats(line, mood, features, bound, rules, rng)
    insert_extras(passages, order.extras, bound, rules, rng)
    told = [name for name in features if name in FEATURES] + ["bad ending"] * (mood == "sad")
    row = {"plot": plot, "verb": bound["v"], "noun": bound["O"], "adjective": bound["J"], "features": told,
           "moral": bound["moral"], "mood": mood, "name": order.name}
    return row, passages


def write_story(order, rules, rng):
    """One story. Returns (row, spans): its columns, and (kind, id, start, end) of every inserted sentence."""
    line = rng.choice([name.removesuffix(".setup") for name in rules if name.endswith(".setup")])
    mood = "sad" if rng.random() < 0.45 else "happy"
    for _ in range(100):
        row, passages = draft(order, line, mood, rules, rng)
        text, starts = join(passages)
        if len(re.findall(r"\w+|[^\w\s]", text)) <= MAX_PIECES:
            break
    else:
        raise ValueError(f"storyline {line}: 100 drafts have more than {MAX_PIECES} words and marks; shorten it")
    spans = [(*beat.split(".")[1:], start, start + len(passage))
             for (beat, passage), start in zip(passages, starts) if beat.startswith("extra.")]
    return {"text": text} | row, spans
