"""One story from the grammar: what it is built round is drawn first, then its beats are expanded in order."""
import re
from dataclasses import dataclass, field
from random import Random

from helpers.bundled.expand import expand, polish

TRAITS = ("hair", "coat", "pal", "color")  # of every child, told again and again
MAX_PIECES = 180  # words and punctuation marks; keeps every story within the model's 256 positions
CHANCE = {"weather": 0.12, "foreshadowing": 0.1, "dialogue": 0.4, "attempt": 0.35, "twist": 0.1, "afterwards": 0.6,
          "moral": 0.25}
FEATURES = ("foreshadowing", "dialogue", "twist", "moral")  # of these, the ones that a row names
FIRST = {"F": "\1", "A": "\2"}  # stand for a character until its first mention is known


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
    """What belongs to a child in all of its stories: traits, things, two adults, and two who come along."""
    own = Random(f"traits {name}")
    bound = {part: own.choice(rules[f"trait_{part}"]) for part in TRAITS}
    his, trait, animal = ("her" if kid == "girl" else "his"), own.choice(rules["trait"]), own.choice(rules["beasts"])
    relative = own.choice(("sister", "cousin", "aunt", "brother", "uncle"))
    boy = bound["pal"] in rules["friend_boys"]
    pet = ({"F": f"the {animal}", "F.intro": f"a {trait} {animal}"}, own.choice(("girl", "boy")))
    pal = ({"F": bound["pal"], "F.intro": f"{his} friend {bound['pal']}"}, "boy" if boy else "girl")
    family = ({"F": f"{his} {relative}", "F.intro": f"{his} {trait} {relative}"},
              "boy" if relative in ("brother", "uncle") else "girl")
    friends = [own.choice((pet, pet, pal)), family]
    return bound, friends, own.sample(rules["nouns"], 4), own.sample(rules["adults"], 2)


def bindings(order, rules, rng):
    """Everything a story's templates may refer to, drawn once, so that what is introduced stays the same."""
    own, friends, things, adults = world(order.name, order.kid, rules)
    bound = {"N": order.name, "kid": order.kid} | own | pronouns(order.kid)
    names, kid = friends[rng.random() < 0.25]
    bound |= names | pronouns(kid, "F.")
    bound |= dict(zip(("G", "G.he", "G.him", "G.his"), rng.choice(adults).split(";")))
    animal = rng.choice([a for a in rules["beasts"] if f"the {a}" != bound["F"]])
    bound |= {"A": f"the {animal}", "A.bare": f"a {animal}", "A.intro": f"a {rng.choice(rules['size'])} {animal}"}
    bound |= {"O": rng.choice(things), "J": rng.choice(rules["adjectives"])}
    bound |= dict(zip(("v", "v.ed", "v.ing"), rng.choice(rules["verbs"]).split(";")))
    bound |= dict(zip(("P.in", "P.to", "P"), rng.choice(rules["places"]).split(";")))
    return bound


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


def beats(plot, mood, features, bound, rules, rng):
    """The story's passages in order, polished; those whose feature was not drawn are left out.

    A plot has three threads: where a beat has three wordings, the story keeps to those of its own thread.
    """
    thread = rng.randrange(3)
    order = ["open", "weather", "hint", f"{plot}.setup", f"{plot}.problem", f"{plot}.talk", f"{plot}.try", "twist",
             f"{plot}.{mood}", f"close.{mood}", "moralize"]
    feature = {"weather": "weather", "hint": "foreshadowing", f"{plot}.talk": "dialogue", f"{plot}.try": "attempt",
               "twist": "twist", f"close.{mood}": "afterwards", "moralize": "moral"}
    wanted = [beat for beat in order if feature.get(beat) in (None, *features)]
    hidden = bound | {f"{who}{part}": mark for who, mark in FIRST.items() for part in ("", ".intro")}
    choose = lambda beat: rules[beat][thread] if len(rules[beat]) == 3 and plot in beat else rng.choice(rules[beat])
    return list(introduce([(beat, expand(choose(beat), rules, hidden, rng)) for beat in wanted], bound))


def missing_words(text, bound):
    """Rules that bring in the drawn words which the beats happened not to use."""
    lower = text.lower()
    used = {
        "use.verb": any(re.search(rf"\b{bound[form]}\b", lower) for form in ("v", "v.ed", "v.ing")),
        "use.noun": all(re.search(rf"\b{bound[word]}\b", lower) for word in ("O", "J")),
    }
    return [rule for rule, present in used.items() if not present]


def join(passages):
    """Text, and the start of every passage in it."""
    text, starts = "", []
    for _, passage in passages:
        text += " " if text else ""
        starts.append(len(text))
        text += passage
    return text, starts


def insert_extras(passages, extras, bound, rules, rng):
    """Put the planned sentences between the passages; half of the literal tellings right after the opening."""
    for kind, key, template, extra in extras:
        sentence = polish(expand(template, rules, bound | extra, rng))
        early = kind == "literal" and rng.random() < 0.5
        at = rng.choice((1, 2)) if early else rng.randint(1, len(passages))
        passages.insert(at, (f"extra.{kind}.{key}", sentence))


def draft(order, rules, rng):
    """One attempt at a story: (row without text, passages)."""
    plot = rng.choice(sorted(name[:-6] for name in rules if name.endswith(".setup")))
    mood = "sad" if rng.random() < 0.45 else "happy"
    features = [name for name, chance in CHANCE.items() if rng.random() < chance]
    bound = bindings(order, rules, rng)
    bound["moral"] = rng.choice(rules[f"{plot}.moral"])
    passages = beats(plot, mood, features, bound, rules, rng)
    traits = rng.sample([f"{{N}}'s {sentence}" for sentence in rules["traits"]], rng.choice((1, 1, 2)))
    passages.insert(1, ("traits", polish(expand(" ".join(traits), rules, bound, rng))))
    ending = next(i for i, (beat, _) in enumerate(passages) if beat == f"{plot}.{mood}")
    for rule in missing_words(join(passages)[0], bound):
        passages.insert(ending, (rule, polish(expand(rng.choice(rules[rule]), rules, bound, rng))))
    insert_extras(passages, order.extras, bound, rules, rng)
    told = [name for name in features if name in FEATURES] + ["bad ending"] * (mood == "sad")
    row = {"plot": plot, "verb": bound["v"], "noun": bound["O"], "adjective": bound["J"], "features": told,
           "moral": bound["moral"], "mood": mood, "name": order.name}
    return row, passages


def write_story(order, rules, rng):
    """One story. Returns (row, spans): its columns, and (kind, id, start, end) of every inserted sentence."""
    for _ in range(100):
        row, passages = draft(order, rules, rng)
        text, starts = join(passages)
        if len(re.findall(r"\w+|[^\w\s]", text)) <= MAX_PIECES:
            break
    spans = [(*beat.split(".")[1:], start, start + len(passage))
             for (beat, passage), start in zip(passages, starts) if beat.startswith("extra.")]
    return {"text": text} | row, spans
