"""A language model as a judge: which of its answers to a question about a sample is likelier.

Knows how the model is run. `question` knows what it reads; what the answers mean is the user's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from rlhf_exp.hf import Cache
from rlhf_exp.machine.precision import Dtype, compute_dtype
from rlhf_exp.models.cache import prompt_cache, repeated
from rlhf_exp.models.fast_paths import with_fast_paths
from rlhf_exp.models.hub import directory_hash, locate_model
from rlhf_exp.models.loading import load_language_model
from rlhf_exp.models.reference import Reference, compute_frozen_in
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.rewards.judge_check import check_judge, labelled_texts
from rlhf_exp.rewards.protocol import RewardFunction
from rlhf_exp.rewards.question import Example, Question, names_a_text, sample_places
from rlhf_exp.rewards.sequence_classifier import reward_device
from rlhf_exp.settings import ConfigError, Count, Text, settings
from rlhf_exp.tasks.batches import pad_right
from rlhf_exp.types import Completions

POLICY = "policy"
Output = Literal["prob", "logit", "rating"]


@settings
class Judge:
    """The answer of a causal language model to a question about each sample. Of two answers the
    score is the probability of the second, given that it is one of them, or the difference of their
    logits; of ratings it is the expected one."""

    name: Text = POLICY
    """policy: the run's frozen reference; else hub name, directory, run folder, GGUF file or
    artifact:NAME."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; null: the newest."""
    template: Text
    """The question; {text} stands for prompt and completion, {prompt} and {completion} for one of
    them; of a conversation {text} is the answer and {prompt} the last message."""
    examples: tuple[Example, ...] = ()
    """Questions that come first with their answers: [{text: ..., answer: ...}]."""
    answers: Annotated[list[Text], Field(min_length=2)]
    """The answers, one token each, the best last; with output=rating numbers."""
    output: Output = "prob"
    """prob: P(second of two answers); logit: its log-odds; rating: the mean of the numbers by their
    probabilities."""
    chat: bool = False
    """true: the question is a user's message in the model's chat template."""
    system: str | None = None
    """The system message of a chat; null: that of the chat template."""
    check: str | None = None
    """Tab-separated file with the columns label and text: accuracy and AUC of the judge on at most
    300 random texts of it are logged before training; null: none."""
    check_label: str | None = None
    """The label of texts that should score high; null: the one that the last answer begins with, as
    "pos" for " positive"."""
    batch_size: Count = 64
    """Texts a forward pass."""
    dtype: Dtype = "auto"
    """Dtype of passes: bf16, fp32; auto: bf16 if the device has instructions for it."""
    device: str | None = None
    """Cpu, cuda or cuda:N; null: where the policy is."""
    trust_remote_code: bool = False
    """True runs code that comes with the model."""

    @model_validator(mode="after")
    def _agrees(self) -> "Judge":
        if not names_a_text(self.template):
            raise ValueError(
                f"template={self.template!r} has no place for the text; add {{text}} or"
                " {completion} to it"
            )
        if repeats := sorted({a for a in self.answers if self.answers.count(a) > 1}):
            raise ValueError(f"answers: {repeats[0]!r} is there twice; the answers must differ")
        unknown = [e.answer for e in self.examples if e.answer not in self.answers]
        if unknown:
            raise ValueError(
                f"examples: the answer {unknown[0]!r} is none of the answers {self.answers}"
            )
        if self.output == "rating":
            self._ratings  # noqa: B018  raises if they are no numbers
        elif len(self.answers) != 2:
            raise ValueError(
                f"answers: output={self.output} chooses between 2 of them, and there are"
                f" {len(self.answers)}; give two, or numbers and output=rating"
            )
        if self.system is not None and not self.chat:
            raise ValueError("system is a message of a chat; set chat=true, or system=null")
        if self.check_label is not None and self.check is None:
            raise ValueError(
                f"check_label={self.check_label} is a label of the file check: set check=FILE, or"
                " check_label=null"
            )
        return self

    @model_validator(mode="after")
    def _reference_is_loaded_already(self) -> "Judge":
        of_own_model = {
            "revision": None,
            "device": None,
            "dtype": "auto",
            "trust_remote_code": False,
        }
        for name, default in of_own_model.items() if self.uses_reference else ():
            if (value := getattr(self, name)) != default:
                raise ValueError(
                    f"{name}={value}: name=policy is the run's own reference, which is loaded"
                    f" already; leave {name} out, or name another model"
                )
        return self

    @property
    def uses_reference(self) -> bool:
        """True if the run's frozen reference is the judge."""
        return self.name == POLICY

    @property
    def _ratings(self) -> list[float]:
        try:
            return [float(answer) for answer in self.answers]
        except ValueError as error:
            raise ValueError(f"answers: output=rating needs numbers; {error}") from None

    def fingerprint(self) -> str:
        """A hash of the model's files, "" for policy, a hub name or an artifact of an earlier step.
        Raises ConfigError if `check` is no file of labelled texts."""
        self._labelled_texts  # noqa: B018  raises
        if self.uses_reference:
            return ""
        return directory_hash(locate_model(self.name, field="reward.name"))

    @cached_property
    def _labelled_texts(self) -> list[tuple[str, bool]]:
        if self.check is None:
            return []
        return labelled_texts(self.check, self.check_label, best_answer=self.answers[-1])

    def load(self, device: torch.device) -> RewardFunction:
        """The reward function with a model of its own; it returns scores on `device`. Raises
        ConfigError if the model cannot be loaded or does not know the answers."""
        model, tokenizer = load_language_model(
            self.name,
            revision=self.revision,
            field="reward.name",
            trust_remote_code=self.trust_remote_code,
        )
        own_device = reward_device(self.device, device)
        judge = with_fast_paths(CausalTransformer(model.to(own_device), tokenizer))
        judge.requires_grad_(False)
        width = judge.head.weight.shape[1]
        compute_frozen_in(judge, compute_dtype(self.dtype, own_device, width=width))
        return self._function(judge, judge, device)

    def load_with_reference(
        self, policy: CausalTransformer, reference: Reference
    ) -> RewardFunction:
        """The reward function of name=policy; `reference` is the judge."""
        return self._function(policy, reference, policy.device)

    def _function(
        self, transformer: CausalTransformer, passes: Reference, device: torch.device
    ) -> RewardFunction:
        question = Question(
            tokenizer=transformer.tokenizer,
            template=self.template,
            examples=self.examples,
            chat=self.chat,
            system=self.system,
        )
        if self.chat and not transformer.tokenizer.chat_template:
            raise ConfigError(
                f"reward.chat=true: the tokenizer of reward.name={self.name!r} has no chat"
                " template; set reward.chat=false, or name a model that was trained on chats"
            )
        answers = question.answer_ids(self.answers)

        def build() -> "AnswerLogits":
            return AnswerLogits(
                question=question,
                transformer=transformer,
                passes=passes,
                answers=answers,
                batch_size=self.batch_size,
            )

        if self._labelled_texts:
            texts, labels = zip(*self._labelled_texts, strict=True)
            rows = [{"text": t, "prompt": "", "completion": t} for t in texts]
            check_judge(self.scores(build()(rows)), labels, threshold=self._threshold)
        judge = build()  # a new one: the reference may change its dtype before it is trained with

        def score(completions: Completions) -> Tensor:
            pairs = zip(completions.prompts.rows, completions.texts, strict=True)
            return self.scores(judge([sample_places(row, text) for row, text in pairs])).to(device)

        return score

    def scores(self, logits: Float[Tensor, "batch answer"]) -> Float[Tensor, " batch"]:
        """The scores from the answers' logits."""
        if self.output == "logit":
            return logits[:, 1] - logits[:, 0]
        probs = logits.softmax(dim=-1)
        return probs[:, 1] if self.output == "prob" else probs @ probs.new_tensor(self._ratings)

    @property
    def _threshold(self) -> float:
        """The score of a judge that is undecided."""
        ratings = self._ratings if self.output == "rating" else [0.0]
        return {"prob": 0.5, "logit": 0.0, "rating": (min(ratings) + max(ratings)) / 2}[self.output]


@dataclass(frozen=True, kw_only=True)
class AnswerLogits:
    """A model that answers one question about many texts. `passes` computes its hidden states;
    `transformer` owns its tokenizer and its embeddings."""

    question: Question
    transformer: CausalTransformer
    passes: Reference
    answers: Sequence[int]
    batch_size: int

    @torch.no_grad()
    def __call__(self, samples: Sequence[dict[str, str]]) -> Float[Tensor, "batch answer"]:
        """The fp32 logits of the answers after the question about each sample. What all questions
        begin with is run once."""
        limit = self.transformer.context_len
        rows = [self.question.ids(sample, max_tokens=limit) for sample in samples]
        shared, cache = self._shared
        logits = torch.empty((len(rows), len(self.answers)), device=self.transformer.device)
        begins = [len(ids) > len(shared) and ids[: len(shared)] == shared for ids in rows]
        for after_shared in (True, False):
            places = [i for i, begin in enumerate(begins) if begin == after_shared]
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                if after_shared:
                    ids = [rows[i][len(shared) :] for i in batch]
                    logits[batch] = self._logits(ids, cache and repeated(cache, len(ids)))
                else:
                    logits[batch] = self._logits([rows[i] for i in batch], None)
        return logits

    @cached_property
    def _shared(self) -> tuple[list[int], Cache | None]:
        """The tokens that all questions begin with, and their cache; none if the model cannot
        continue from one."""
        shared = self.question.shared_ids()
        model = self.transformer
        cache = prompt_cache(model.language_model) if model.fast_paths.one_prompt else None
        if cache is None or not shared or len(shared) >= model.context_len:
            return [], None
        self.passes.hidden_states(torch.tensor([shared], device=model.device), None, cache)
        return shared, cache

    def _logits(self, rows: list[list[int]], cache: Cache | None) -> Tensor:
        # Padded at the end, which changes nothing before it, so no mask is needed.
        tokens = pad_right(rows, fill=0).to(self.transformer.device)
        hidden = self.passes.hidden_states(tokens, None, cache)
        last = [len(row) - 1 for row in rows]
        return self.passes.unembed(hidden[range(len(rows)), last])[:, self.answers].float()
