"""From a prompt to a class: the class it names, and no guess between several."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache

NEAR = 0.8
"""Likeness (difflib's ratio) from which a misspelt name counts as meant."""
CLEAR = 0.05
"""By how much the best must be more like the prompt than the next class."""
SHOWN = 30
"""Names an error lists, at most."""
_ARTICLES = ("a", "an", "the")


class NoClassError(ValueError):
    """The prompt names no class, or several; the message says which there are."""


def find_class(prompt: str, names: Sequence[str] | None, count: int) -> int:
    """Index of the class a prompt names.

    In this order: the name as it is written; an index; the name but for case, accents, punctuation, an article and a
    plural; a name among the prompt's words (of names within one another the longest); the most similar name.
    Names such as "tench, Tinca tinca" are several names of one class.

    Args:
        prompt: the prompt.
        names: of the classes, if they have any.
        count: of classes.

    Raises:
        NoClassError: if there is no such class, or more than one.
    """
    names = names or ()
    if names.count(prompt) == 1:
        return names.index(prompt)
    text = prompt.strip()
    if text.isascii() and text.isdigit():
        if len(text) < 9 and int(text) < count:
            return int(text)
        raise NoClassError(f"{text[:20]} is not between 0 and {count - 1}")
    aliases = _aliases(tuple(names))
    wanted = normalised(prompt)
    for matching in (_equal(wanted, aliases), _within(wanted, aliases)):
        if len(matching) == 1:
            return matching.pop()
        if matching:
            raise NoClassError(f"{prompt[:100]!r} names several classes: {_listed(names, sorted(matching))}")
    return _nearest(prompt, wanted, aliases, names, count)


def normalised(text: str) -> str:
    """Lower case without accents, punctuation, leading articles and the last word's plural."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    words = re.findall(r"[^\W_]+", "".join(c for c in plain if not unicodedata.combining(c)))
    while len(words) > 1 and words[0] in _ARTICLES:
        del words[0]
    return " ".join([*words[:-1], _singular(words[-1])]) if words else ""


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes", "zes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


@lru_cache(maxsize=64)
def _aliases(names: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """Normalised names with their class; the whole name, and what commas divide it into."""
    found = {(normalised(part), i): None for i, name in enumerate(names) for part in (name, *name.split(","))}
    return tuple((alias, i) for alias, i in found if alias)


def _equal(wanted: str, aliases: Iterable[tuple[str, int]]) -> set[int]:
    return {index for alias, index in aliases if alias == wanted}


def _within(wanted: str, aliases: Iterable[tuple[str, int]]) -> set[int]:
    """Classes named among the words, but for those named only within the name of another."""
    words = [_singular(word) for word in wanted.split()]
    found: dict[tuple[int, int], set[int]] = {}
    for alias, index in aliases:
        parts = [_singular(part) for part in alias.split()]
        for start in range(len(words) - len(parts) + 1):
            if words[start : start + len(parts)] == parts:
                found.setdefault((start, start + len(parts)), set()).add(index)
    spans = [s for s in found if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in found)]
    return {index for span in spans for index in found[span]}


def _nearest(prompt: str, wanted: str, aliases: Iterable[tuple[str, int]], names: Sequence[str], count: int) -> int:
    matcher = SequenceMatcher(b=wanted, autojunk=False)
    likeness: dict[int, float] = {}
    for alias, index in aliases:
        matcher.set_seq1(alias)
        if wanted and matcher.real_quick_ratio() >= 0.5 and matcher.quick_ratio() >= 0.5:
            likeness[index] = max(likeness.get(index, 0.0), matcher.ratio())
    best = sorted(likeness, key=lambda index: -likeness[index])[:5]
    clear = len(best) == 1 or (best and likeness[best[0]] - likeness[best[1]] >= CLEAR)
    if best and clear and likeness[best[0]] >= NEAR:
        return best[0]
    shown = prompt[:100]
    if len(best) > 1 and likeness[best[0]] >= NEAR:
        raise NoClassError(f"{shown!r} may be any of: {_listed(names, best)}")
    near = f"; nearest: {_listed(names, best)}" if best else ""
    known = f"; classes: {_listed(names, range(len(names)))}" if names else ""
    raise NoClassError(f"{shown!r} names no class of this model (0 to {count - 1}){near}{known}")


def _listed(names: Sequence[str], indices: Sequence[int]) -> str:
    shown = [f"{names[index]} ({index})" for index in indices[:SHOWN]]
    return ", ".join(shown) + (", ..." if len(indices) > SHOWN else "")
