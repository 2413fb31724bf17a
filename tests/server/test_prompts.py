from __future__ import annotations

import pytest

from server.prompts import NoClassError, find_class, normalised

EMOJI = ("cat", "clock", "dog", "fire", "flag", "heart", "red heart", "sun", "sunflower", "trees")
IMAGENET = (
    "tench, Tinca tinca",
    "goldfish, Carassius auratus",
    "crane",
    "crane",
    "Persian cat",
    "Siamese cat, Siamese",
)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("heart", "heart"),
        ("HEART", "heart"),
        ("  Heart! ", "heart"),
        ("a heart", "heart"),
        ("hearts", "heart"),
        ("the clocks", "clock"),
        ("tree", "trees"),
        ("Red-Heart", "red heart"),
        ("a photo of a red heart", "red heart"),
        ("two dogs playing", "dog"),
        ("hart", "heart"),
        ("sunflwer", "sunflower"),
        ("5", "heart"),
    ],
)
def test_a_prompt_names_a_class(prompt: str, name: str) -> None:
    assert EMOJI[find_class(prompt, EMOJI, len(EMOJI))] == name


@pytest.mark.parametrize(
    ("prompt", "index"),
    [
        ("Tinca tinca", 0),
        ("goldfish", 1),
        ("crane", None),
        ("cat", None),
        ("Siamese", 5),
        ("Pérsian  cat", 4),
        ("3", 3),
    ],
)
def test_synonyms_divided_by_commas(prompt: str, index: int | None) -> None:
    if index is None:
        with pytest.raises(NoClassError):
            find_class(prompt, IMAGENET, len(IMAGENET))
    else:
        assert find_class(prompt, IMAGENET, len(IMAGENET)) == index


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("cat and dog", r"'cat and dog' names several classes: cat \(0\), dog \(2\)"),
        ("an airplane over the sea", r"names no class of this model \(0 to 9\).*classes: cat \(0\), clock"),
        ("", "names no class"),
        ("!?", "names no class"),
        ("10", "10 is not between 0 and 9"),
        ("9" * 50, "is not between 0 and 9"),
    ],
)
def test_no_guess_between_several_and_the_alternatives_are_told(prompt: str, message: str) -> None:
    with pytest.raises(NoClassError, match=message):
        find_class(prompt, EMOJI, len(EMOJI))


def test_two_names_that_are_equally_near_are_told() -> None:
    with pytest.raises(NoClassError, match=r"may be any of: mitten \(1\), kitten \(0\)|kitten \(0\), mitten \(1\)"):
        find_class("bitten", ("kitten", "mitten", "dog"), 3)


def test_names_in_other_scripts_are_kept() -> None:
    assert find_class("ёлка", ("кот", "Ёлка"), 2) == 1
    assert normalised("Straße") == "strasse"


def test_a_model_without_names_takes_an_index() -> None:
    assert find_class("7", None, 10) == 7
    with pytest.raises(NoClassError, match=r"0 to 9"):
        find_class("heart", None, 10)
