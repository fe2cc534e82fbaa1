"""A small grammar: rules in text files are expanded into sentences with a seeded random generator.

In a rule, `[a|b]` chooses, `@rule` expands another rule, `{x}` inserts what the story has bound to x.
"""
import re
from pathlib import Path

GRAMMAR = Path(__file__).parent / "grammar"
CHOICE = re.compile(r"\[([^\[\]]*)\]")
REFERENCE = re.compile(r"@([a-z_]+(?:\.[a-z]+)?)|\{([A-Za-z0-9._]+)\}")


def read_grammar(names=("words", "places", "common", "plots", "facts")):
    """Rules by name, each a list of alternatives: `name = a | b` on one line; `== name` and a line for each; or, in a
    storyline, `== lost.1` and lines such as `setup: ...`, each the rule `lost.1.setup`."""
    rules, current, heading = {}, None, None
    for name in names:
        for line in (GRAMMAR / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            short, beat = re.match(r"([a-z_.]+) = (.*)", line), re.match(r"([a-z]+): (.*)", line)
            if line.startswith("== "):
                heading = line[3:].strip()
                current = [] if heading[-1].isdigit() else rules.setdefault(heading, [])
            elif short:
                rules[short[1]] = [entry.strip() for entry in short[2].split(" | ")]
            elif beat and heading[-1].isdigit():
                rules[f"{heading}.{beat[1]}"] = [beat[2].strip()]
            elif line.strip() and not line.startswith("#"):
                current.append(line.rstrip("\n"))
    return rules


def expand(text, rules, bound, rng):
    """Expand `text` until no choice and no reference is left. A rule or binding that is not known raises KeyError."""
    while CHOICE.search(text):
        text = CHOICE.sub(lambda m: rng.choice(m[1].split("|")), text)

    def insert(match):
        if match[2]:
            return bound[match[2]]
        return expand(rng.choice(rules[match[1]]), rules, bound, rng)

    return REFERENCE.sub(insert, text)


def polish(text):
    """Single spaces, `an` before vowels, a capital at the start of every sentence and of every quotation."""
    text = re.sub(r" +", " ", text).strip()
    text = re.sub(r" ([.,!?])", r"\1", text)
    text = re.sub(r"\b([Aa]) (?=[aeio]|u(?!s)|honest)", r"\1n ", text)
    return re.sub(r'(^"?|[.!?] "?|\." "?|(?:^|[ \n])"|\n)([a-z])', lambda m: m[1] + m[2].upper(), text)
