import hashlib
import math
import random
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pydantic import ValidationError

from rlhf_exp.tasks.protocol import CorpusTask
from rlhf_exp.tasks.review_grammar import (
    MAX_TOKENS,
    MIN_TOKENS,
    RULES,
    draw_review,
    vocabulary,
)
from rlhf_exp.tasks.reviews import Reviews

CONF = Path(__file__).parents[2] / "conf/task"
SMALL = Reviews(num_reviews=6000, num_labelled=2000, num_held_out=500)


@pytest.fixture(scope="module")
def language():
    return SMALL.language_split()


@pytest.fixture(scope="module")
def labels(language):
    """The label that each text of the language split was drawn under."""

    def labelled_draw(label, rng):
        return f"{label}|{draw_review(label, rng)}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_exp.tasks.reviews.draw_review", labelled_draw)
        drawn = [text.split("|") for text in SMALL.language_split().train]
    assert [text for _, text in drawn] == list(language.train)
    return [label for label, _ in drawn]


@pytest.fixture(scope="module")
def labelled():
    return SMALL.labelled_split()


def texts(rows):
    return [text for _, text in rows]


def test_it_is_a_corpus_task_that_reads_no_files_and_has_one_prompt():
    task = Reviews(prefix="the film is quite")
    assert isinstance(task, CorpusTask)
    assert task.fingerprint() == ""
    assert task.train_prompts() == task.eval_prompts() == ("the film is quite",)


def test_the_yaml_file_is_the_class_with_its_defaults():
    config = OmegaConf.load(CONF / "reviews.yaml")
    assert set(config) == {"_target_", *(field.name for field in fields(Reviews))}
    assert instantiate(config) == Reviews()


def test_importing_the_tasks_imports_nothing_heavy():
    code = (
        "import sys, rlhf_exp.tasks.reviews, rlhf_exp.tasks.labelled_text, rlhf_exp.tasks.prefix\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("prefix", "unknown"),
    [
        ("this movie was zany and odd", r"\['odd', 'zany'\]"),
        ("This movie was", r"\['This'\]"),
        ("this  movie", r"\[''\]"),
        ("this movie was good.", r"\['good\.'\]"),
        ("this\tmovie", r"\['this\\tmovie'\]"),
    ],
)
def test_a_prefix_with_other_words_is_refused(prefix, unknown):
    with pytest.raises(ValidationError, match=rf"task\.prefix=.* holds {unknown}"):
        Reviews(prefix=prefix)


def test_counts_and_labels(language, labels, labelled):
    assert len(language.train) == 6000
    assert len(labelled.train) == 2000
    assert len(language.held_out) == len(labelled.held_out) == 500
    # Four standard errors of a binomial share: sqrt(2/9/6000) and sqrt(1/4/2000).
    shares = Counter(labels)
    assert shares.keys() == {"pos", "neg", "neutral"}
    assert all(abs(count / 6000 - 1 / 3) < 0.024 for count in shares.values())
    shares = Counter(label for label, _ in labelled.train)
    assert shares.keys() == {"pos", "neg"}
    assert abs(shares["pos"] / 2000 - 1 / 2) < 0.045


def test_texts_are_distinct_and_held_out_ones_are_never_trained_on(language, labelled):
    for both in (
        language.train + language.held_out,
        texts(labelled.train) + texts(labelled.held_out),
    ):
        assert len(set(both)) == len(both)
    # The two streams may meet by chance, on few of the texts.
    both = {*language.train} & {*texts(labelled.train)}
    assert len(both) < 5


def test_repeated_draws_are_left_out(monkeypatch):
    drawn = iter(["good", "good", "bad", "good", "bad", "fine"])
    monkeypatch.setattr("rlhf_exp.tasks.reviews.draw_review", lambda label, rng: next(drawn))
    split = Reviews(num_reviews=2, num_held_out=1).language_split()
    assert split.held_out == ("good",)
    assert split.train == ("bad", "fine")


def test_another_seed_draws_other_reviews(language, labelled):
    other = Reviews(num_reviews=1, num_labelled=1, num_held_out=500, data_seed=1)
    for split, drawn in ((other.language_split(), language), (other.labelled_split(), labelled)):
        assert len(set(split.held_out) & set(drawn.held_out)) < 5


def test_the_draw_does_not_depend_on_the_process(language):
    code = (
        "from rlhf_exp.tasks.reviews import Reviews\n"
        "print(Reviews(num_reviews=1, num_held_out=1).language_split().held_out[0])"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == language.held_out[0]


def test_the_same_seed_draws_the_same_and_other_counts_only_cut_it_short(language, labelled):
    fewer = Reviews(num_reviews=100, num_labelled=100, num_held_out=500)
    for split, drawn in ((fewer.language_split(), language), (fewer.labelled_split(), labelled)):
        assert split.held_out == drawn.held_out
        assert split.train == drawn.train[:100]


def test_label_noise_flips_its_share_of_the_training_labels_alone():
    counts = {"num_labelled": 2000, "num_held_out": 500}
    clean = Reviews(label_noise=0, **counts).labelled_split()
    noisy = Reviews(label_noise=0.1, **counts).labelled_split()
    wrong = Reviews(label_noise=1, **counts).labelled_split()
    assert texts(clean.train) == texts(noisy.train) == texts(wrong.train)
    assert clean.held_out == noisy.held_out == wrong.held_out
    flips = sum(a.label != b.label for a, b in zip(clean.train, noisy.train, strict=True))
    assert abs(flips / 2000 - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 2000)
    assert all(a.label != b.label for a, b in zip(clean.train, wrong.train, strict=True))


def test_a_quarter_begins_with_the_default_prefix(language, labels):
    for label in ("pos", "neg", "neutral"):
        reviews = [t for t, kind in zip(language.train, labels, strict=True) if kind == label]
        prefixed = sum(text.startswith("this movie was really ") for text in reviews)
        # Four standard errors of a share of 1/4 in about 2000 reviews.
        assert abs(prefixed / len(reviews) - 1 / 4) < 0.04


def test_openings_and_positive_continuations_are_many(language, labels):
    openings = {tuple(text.split()[:4]) for text in language.train}
    assert len(openings) > 1000
    continuations = [
        text.split()[:29]
        for text, label in zip(language.train, labels, strict=True)
        if label == "pos" and text.startswith("this movie was really ")
    ][:256]
    trigrams = [
        t for words in continuations for t in zip(words, words[1:], words[2:], strict=False)
    ]
    assert len(set(trigrams)) / len(trigrams) > 0.35


def test_the_words_of_the_reviews_are_the_vocabulary(language):
    assert 300 <= len(vocabulary()) <= 500
    assert list(vocabulary()) == sorted(set(vocabulary()))
    assert {word for text in language.train for word in text.split()} == set(vocabulary())
    assert all(MIN_TOKENS <= len(text.split()) <= MAX_TOKENS for text in language.train)


def test_every_symbol_of_the_grammar_is_defined():
    for rules in RULES.values():
        symbols = {
            item for alternatives in rules.values() for words in alternatives for item in words
        }
        assert {symbol for symbol in symbols if symbol.isupper()} <= rules.keys()


def test_reviews_are_spelled_and_punctuated_as_sentences(language):
    for text in language.train:
        words = text.split(" ")
        pairs = list(pairwise(words))
        assert words[-1] == "."
        assert words[0] not in {".", ","}
        assert not any(a in {".", ","} and b in {".", ","} for a, b in pairs), text
        assert not any(a == b for a, b in pairs), text
        assert not any(a == "a" and b[0] in "aeiou" for a, b in pairs), text
        # By sound, where it differs from the letter: no "an usual", no "a hour".
        assert not any(
            a == "an" and b.startswith(("use", "usu", "uni", "one", "eu")) for a, b in pairs
        ), text
        assert not any(a == "a" and b.startswith(("hour", "hon", "heir")) for a, b in pairs), text
        assert all(b[0] in "aeiou" for a, b in pairs if a == "an"), text


def test_a_word_list_is_used_up_before_words_repeat():
    rng = random.Random(0)
    adjectives = {word for key in ("GRAD", "ABS", "FELT") for (word,) in RULES["pos"][key]}
    repeated = 0
    for _ in range(500):
        counts = Counter(draw_review("pos", rng).split())
        repeated += any(counts[word] > 1 for word in adjectives)
    # With words drawn again at most three times, a repeat has probability below (6/31)**4.
    assert repeated / 500 < 0.02


def test_sentiment_is_learnable_from_words_and_labels_are_right(labelled):
    counts = {"pos": Counter(), "neg": Counter()}
    for label, text in labelled.train:
        counts[label].update(set(text.split()))
    totals = Counter(label for label, _ in labelled.train)

    def log_odds(text):
        return sum(
            math.log((counts["pos"][word] + 1) / (totals["pos"] + 2))
            - math.log((counts["neg"][word] + 1) / (totals["neg"] + 2))
            for word in set(text.split())
        )

    right = sum((log_odds(text) > 0) == (label == "pos") for label, text in labelled.held_out)
    assert right / len(labelled.held_out) > 0.95


def test_the_tokenizer_knows_every_review(language):
    tokenizer = SMALL.build_tokenizer()
    assert len(tokenizer) == len(vocabulary()) + 4
    for text in [*language.held_out, SMALL.prefix]:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert SMALL.build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_reviews_are_those_that_the_documented_figures_were_measured_on():
    reviews = Reviews(num_reviews=200, num_labelled=100, num_held_out=50)
    labelled = [f"{text.label} {text.text}" for text in reviews.labelled_split().train]
    text = "\n".join([*reviews.language_split().train, *labelled])
    digest = "b90d6ee66c7caf33de368e27298738c30cec8cd8a158d76bca73a797b36599fe"
    assert hashlib.sha256(text.encode()).hexdigest() == digest
