import pytest
import torch
from pydantic import ValidationError

from rlhf_exp.rewards.char_count import CharCount
from rlhf_exp.rewards.classifier import Classifier
from rlhf_exp.rewards.keyword import Keyword
from rlhf_exp.rewards.length import Length
from rlhf_exp.rewards.protocol import ReadsTokens
from rlhf_exp.rewards.weighted_sum import Term, WeightedSum
from rlhf_exp.settings import ConfigError
from rlhf_exp.types import Completions
from tests.builders import build_tokenizer, completions


def test_the_sum_of_the_terms_times_their_weights():
    reward = WeightedSum(
        terms={
            "periods": Term(weight=0.5, reward=CharCount()),
            "good": Term(weight=2.0, reward=Keyword(keywords=["good"], max_count=5)),
            "short": Term(weight=-1.5, reward=Length(target_tokens=2)),
        }
    )
    record = completions(["good . good .", "bad .", "", "good"])
    # Periods 2 1 0 0; good 2 0 0 1; length 4 2 0 1 of 2, so -1 0 -1 -1/2.
    scores = reward.load(torch.device("cpu"))(record)
    assert scores.tolist() == [1 + 4 + 1.5, 0.5, 1.5, 2 + 0.75]
    assert scores.dtype == torch.float32


def test_one_term_is_that_term_scaled():
    reward = WeightedSum(terms={"only": Term(weight=-3, reward=CharCount(character="a"))})
    assert reward.load(torch.device("cpu"))(completions(["a a", "b"])).tolist() == [-6.0, 0.0]


class Loads:
    """A reward that counts how often it is loaded."""

    def __init__(self) -> None:
        self.devices: list[torch.device] = []

    def load(self, device: torch.device):
        self.devices.append(device)
        return lambda completions: torch.ones(len(completions.texts))


def test_each_term_is_loaded_once_to_the_device():
    inner = Loads()
    function = WeightedSum(terms={"a": Term(weight=1, reward=inner)}).load(torch.device("cpu"))
    record: Completions = completions(["x", "y"])
    for _ in range(3):
        assert function(record).tolist() == [1.0, 1.0]
    assert inner.devices == [torch.device("cpu")]


class Reads:
    """A reward that reads tokens, and keeps what it was asked about."""

    def __init__(self, *, fails: bool = False) -> None:
        self.asked: list[tuple[object, bool]] = []
        self.fails = fails

    def check_policy(self, tokenizer: object, *, prepend_bos: bool, num_tokens: int) -> None:
        assert num_tokens == 9
        self.asked.append((tokenizer, prepend_bos))
        if self.fails:
            raise ConfigError("reward.path: another tokenizer")


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_every_term_that_reads_tokens_is_asked_about_the_policy(prepend_bos):
    first, second = Reads(), Reads()
    terms = {"a": first, "periods": CharCount(), "b": second}
    reward = WeightedSum(terms={k: Term(weight=1, reward=r) for k, r in terms.items()})
    assert isinstance(reward, ReadsTokens)
    tokenizer = build_tokenizer()
    reward.check_policy(tokenizer, prepend_bos=prepend_bos, num_tokens=9)
    for term in (first, second):
        [(given, bos)] = term.asked
        assert given is tokenizer
        assert bos is prepend_bos


def test_a_sum_within_a_sum_is_asked_too():
    reads = Reads(fails=True)
    inner = WeightedSum(terms={"a": Term(weight=1, reward=reads)})
    outer = WeightedSum(
        terms={"p": Term(weight=1, reward=CharCount()), "s": Term(weight=1, reward=inner)}
    )
    with pytest.raises(ConfigError, match=r"reward\.path: another tokenizer"):
        outer.check_policy(build_tokenizer(), prepend_bos=False, num_tokens=9)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), True, "much"])
def test_a_weight_that_is_not_a_number_is_refused(weight):
    with pytest.raises(ValidationError, match="weight"):
        Term(weight=weight, reward=CharCount())


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(ValidationError, match="at least 1 item"):
        WeightedSum(terms={})


def test_the_fingerprint_is_that_of_the_terms_that_read_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    file = Term(weight=1.0, reward=Classifier(name=str(tmp_path), direction="pos"))
    plain = Term(weight=1.0, reward=CharCount())
    first = WeightedSum(terms={"a": plain, "b": file}).fingerprint()
    assert first == file.reward.fingerprint() != ""
    (tmp_path / "config.json").write_text("{ }")
    assert WeightedSum(terms={"a": plain, "b": file}).fingerprint() != first
    assert WeightedSum(terms={"a": plain}).fingerprint() == ""
