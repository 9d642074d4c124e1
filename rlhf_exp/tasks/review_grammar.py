"""The grammar of the generated film reviews, and a random walk through it.

Knows English and sentiment, not splits, seeds, files or tokens. The words and rules are in
review_grammar.yaml.
"""

import random
import re
from pathlib import Path

import yaml

Rules = dict[str, tuple[tuple[str, ...], ...]]

MIN_TOKENS, MAX_TOKENS = 26, 40
_MIN_TOKENS_BEFORE_CLOSING = 20
# Every word of the grammar that begins with one of these letters begins with a vowel sound.
_ARTICLE_BEFORE_VOWEL = re.compile(r"\ba(?= [aeiou])")


def _alternatives(rule: str | list[str]) -> tuple[tuple[str, ...], ...]:
    phrases = rule.split() if isinstance(rule, str) else rule
    return tuple(tuple(phrase.split()) for phrase in phrases)


def _read_rules() -> dict[str, Rules]:
    """The rules of each sentiment: the shared ones and its own."""
    grammar = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    shared = grammar.pop("shared")
    return {
        sentiment: {symbol: _alternatives(rule) for symbol, rule in (shared | own).items()}
        for sentiment, own in grammar.items()
    }


RULES = _read_rules()


def vocabulary() -> tuple[str, ...]:
    """Every word that a review can contain, sorted."""
    words = {"an"}
    for rules in RULES.values():
        for alternatives in rules.values():
            words.update(word for words_ in alternatives for word in words_ if word not in rules)
    return tuple(sorted(words))


def draw_review(sentiment: str, rng: random.Random) -> str:
    """A review of the sentiment with 26 to 40 tokens; draws again if it is shorter or longer."""
    while True:
        tokens = _draw_tokens(RULES[sentiment], rng)
        if MIN_TOKENS <= len(tokens) <= MAX_TOKENS:
            return _ARTICLE_BEFORE_VOWEL.sub("an", " ".join(tokens))


def _draw_tokens(rules: Rules, rng: random.Random) -> list[str]:
    used: set[tuple[str, ...]] = set()
    tokens: list[str] = []
    _expand("OPENING", rules, rng, used, tokens)
    while len(tokens) < _MIN_TOKENS_BEFORE_CLOSING:
        _expand("BODY", rules, rng, used, tokens)
    _expand("CLOSING", rules, rng, used, tokens)
    return tokens


def _expand(
    symbol: str,
    rules: Rules,
    rng: random.Random,
    used: set[tuple[str, ...]],
    tokens: list[str],
) -> None:
    """Appends an alternative of the symbol, word by word. Draws again, up to three times, if the
    review has used it already, so that words repeat only where a list is short."""
    alternatives = rules[symbol]
    for _ in range(4):
        alternative = alternatives[int(rng.random() * len(alternatives))]
        if alternative not in used:
            break
    used.add(alternative)
    for item in alternative:
        if item in rules:
            _expand(item, rules, rng, used, tokens)
        else:
            tokens.append(item)
