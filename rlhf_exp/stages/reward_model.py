"""Training of a reward model on preference pairs: a head on features of a frozen language model,
which are computed once, or a whole sequence classifier."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from pydantic import model_validator
from rich.console import Console
from torch import Tensor, nn

from rlhf_exp.machine.precision import Dtype
from rlhf_exp.machine.threads import threads_for
from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.models.classifiers import head_modules
from rlhf_exp.models.fast_paths import with_fast_paths
from rlhf_exp.models.loading import ModelSettings, Pretrained
from rlhf_exp.models.model_checks import must_be_plain
from rlhf_exp.models.reward_model import HeadKind, HeadShape, RewardModel, save_reward_model
from rlhf_exp.models.transformer import CausalTransformer
from rlhf_exp.rewards.sequence_classifier import SequenceClassifier
from rlhf_exp.rl.setup import fingerprints
from rlhf_exp.runs.context import Context
from rlhf_exp.runs.summary import describe
from rlhf_exp.settings import ConfigError, Count, Index, NonNegative, settings
from rlhf_exp.stages.check_saved import check_saved_reward_model
from rlhf_exp.stages.pair_classifier import (
    ClassifierPairs,
    encode_texts,
    load_pair_classifier,
    save_pair_classifier,
)
from rlhf_exp.stages.pair_data import (
    FeaturePairs,
    PairData,
    Scores,
    error_metrics,
    pair_loss,
    pair_metrics,
    print_pairs,
    score_rows,
)
from rlhf_exp.stages.pair_encoding import check_template, encode_split
from rlhf_exp.stages.protocol import Stage, StageResult
from rlhf_exp.tasks.batches import BatchStream, shuffle_batches
from rlhf_exp.tasks.conversations import prompt_key
from rlhf_exp.tasks.encoding import leading_ids
from rlhf_exp.tasks.pair_tokens import EncodedPair
from rlhf_exp.tasks.pairs import hold_out, num_shared
from rlhf_exp.tasks.protocol import PairTask
from rlhf_exp.tracking.curves import plot_margins, plot_predictions, queue_loss_plot
from rlhf_exp.training.early_stopping import LOSS, EarlyStopping
from rlhf_exp.training.optim import AdamWSettings
from rlhf_exp.training.schedules import Schedule
from rlhf_exp.training.seeding import make_generator, stream_seed
from rlhf_exp.training.supervised import Supervised, SupervisedState

log = logging.getLogger(__name__)

NEEDS = "stage=reward_model needs preference pairs: task=pairs task.path=FILE"
# The keys of a head on a language model's features.
FEATURE_KEYS = ("width", "read_layers", "unfreeze_layers", "keep_features")

Scorer = RewardModel | SequenceClassifier


@dataclass(frozen=True, kw_only=True)
class RewardModelParts:
    """The parts for training a reward model."""

    task: PairTask = field(metadata={"needs": NEEDS})
    model: ModelSettings
    optimizer: AdamWSettings
    schedule: Schedule


@settings
class TrainRewardModel(Supervised, Stage[RewardModelParts]):
    """Squared error of the rewards plus rank_coef times the rank loss of each pair, or with
    loss="rank" only the rank loss, for pairs without rewards.

    Keeps the weights that are best on one half of the held-out prompts, and reports results on the
    other half. With unfreeze_layers the last blocks are trained with the head.

    head="classifier" trains all weights of transformers' own sequence classifier with one output,
    on any pretrained encoder or decoder. It reads the texts that reward=pair_model reads, without
    dropout. Its output may have no bias, so its scores neither begin at the mean reward nor are
    centred.
    """

    Parts = RewardModelParts

    epochs: Count = 25
    """Most passes over the pairs."""
    batch_size: Count = 100
    """Pairs an update."""
    head: Literal[HeadKind, "classifier"] = "token_sum"
    """token_sum: a sum over the answer's tokens, with log-probs; last_token: the last state;
    classifier: transformers' own, all weights are trained, for reward=pair_model."""
    width: Count = 192
    """Width of the hidden layers of head=token_sum and last_token."""
    read_layers: Count = 2
    """The head reads the outputs of this many last blocks."""
    loss: Literal["mse_rank", "rank"] = "mse_rank"
    """mse_rank: squared error + rank_coef x rank loss; rank: rank loss, for pairs without
    rewards."""
    rank_coef: NonNegative = 0.1
    """Weight of the rank loss beside the squared error, 0-1."""
    unfreeze_layers: Index = 0
    """Last blocks trained along with the head, at optimizer.base_lr; needs keep_features=false."""
    keep_features: bool = True
    """false: features are computed anew for each batch, for data too large to keep."""
    eval_every: Count = 100
    """Updates between measurements on held-out pairs; the best model is kept."""
    patience: Count = 5
    """Training ends after this many measurements without a better one."""
    num_examples: Count = 3
    """Held-out pairs in the table that is printed."""
    dtype: Dtype = "fp32"
    """Dtype of forward passes of the language model or classifier: fp32, bf16; auto: bf16 if the
    device has instructions for it, which pays if d_model >= 256."""

    @model_validator(mode="after")
    def _can_keep(self) -> "TrainRewardModel":
        if self.unfreeze_layers and self.keep_features:
            raise ValueError(
                f"unfreeze_layers={self.unfreeze_layers} changes the features: set"
                " keep_features=false"
            )
        return self

    @model_validator(mode="after")
    def _has_the_keys(self) -> "TrainRewardModel":
        values = vars(self)
        changed = [
            f"{key.name}={values[key.name]}"
            for key in fields(self)
            if key.name in FEATURE_KEYS and values[key.name] != key.default
        ]
        if self.head == "classifier" and changed:
            raise ValueError(
                f"head=classifier trains a whole model: leave out {', '.join(changed)}, which is"
                " for the other heads"
            )
        return self

    def check(self, parts: RewardModelParts) -> list[str]:
        parts.task.fingerprint()
        problems = must_be_plain(parts.model, stage="reward_model")
        if self.head == "classifier":
            problems += check_classifier_parts(parts)
        return problems

    def check_texts(self, parts: RewardModelParts) -> list[str]:
        train = parts.task.pair_split().train
        problems = self.check_updates(parts.schedule, len(train))
        if self.loss == "mse_rank" and train[0].chosen_reward is None:
            problems.append(
                "stage.loss=mse_rank needs the columns chosen_reward and rejected_reward, which the"
                " pairs do not have: set stage.loss=rank"
            )
        if isinstance(parts.model, Pretrained):
            problems += check_template(parts.model, parts.task)
        return problems

    def metric_names(self, parts: RewardModelParts) -> tuple[str, ...]:
        """The names of the metrics in the result; Spearman's only if the pairs have rewards."""
        of_rewards = ("heldout/mse", "heldout/reward_variance") if self.loss == "mse_rank" else ()
        return ("heldout/pair_accuracy", "heldout/rank_loss", "heldout/spearman", *of_rewards)

    def run(self, context: Context, parts: RewardModelParts) -> StageResult:
        """Trains, measures on held-out pairs, saves the reward model; returns the result.

        Raises ConfigError for pairs that the model or the loss cannot read, and TrainingError
        naming the update if the loss is not finite.
        """
        clock = Stopwatch()
        with clock("load"), self.explaining("loading"):
            if problems := self.check_texts(parts):
                raise ConfigError("\n".join(problems))
            scorer, encoded = self._load(context, parts.task, parts.model)
        context.folder.start()
        trained = [p.numel() for p in module_of(scorer).parameters() if p.requires_grad]
        log.info(
            "head=%s: training %.2f M parameters on %d pairs; %d held out to stop by, %d to report",
            self.head, sum(trained) / 1e6, *map(len, encoded),
        )  # fmt: skip
        less = "set stage.keep_features=false"
        with clock("features"), self.explaining("computing features", less):
            train, stop_by, report = (self._data(scorer, pairs) for pairs in encoded)
        with clock("train"), threads_for(train.multiplications(self.batch_size)):
            last = self._train(context, parts, scorer, train, stop_by)
        with clock("evaluate"), self.explaining("evaluating"):
            scores = report.all_scores()
            metrics = pair_metrics(scores, report.rewards)
            if report.rewards is not None and self.loss == "mse_rank":
                metrics |= error_metrics(scores, report.rewards)
        context.folder.log(last, metrics)
        with clock("save"):
            if isinstance(scorer, RewardModel):
                path = save_reward_model(scorer, context.folder.model)
                check_saved_reward_model(scorer, path)
            else:
                save_pair_classifier(scorer, context.folder.model)
        rows = score_rows(report, scores)
        context.folder.log_samples(0, rows)
        self._present(context, report, scores, rows)
        log.info("%s", describe(metrics))
        return StageResult(after=metrics, seconds=clock.seconds)

    def _load(
        self, context: Context, task: PairTask, model: ModelSettings
    ) -> tuple[Scorer, tuple[Sequence[EncodedPair], ...]]:
        """The model with a fresh head, and the pairs for training, stopping and the report."""
        scorer = self._scorer(context, task, model)
        if isinstance(scorer, RewardModel):
            tokenizer, limit = scorer.backbone.tokenizer, scorer.backbone.context_len
            train, held_out = encode_split(tokenizer, task, limit=limit, stage="reward_model")
        else:
            train, held_out = (
                encode_texts(scorer, pairs, sources)
                for pairs, sources in zip(task.pair_split(), task.sources(), strict=True)
            )
        if shared := num_shared(task.pair_split()):
            log.warning(
                "%d of %d held-out pairs have a prompt that is trained on too: what is reported is"
                " no measure of new prompts", shared, len(held_out),
            )  # fmt: skip
        halves = hold_out(
            held_out,
            fraction=0.5,
            salt=f"stop {context.seed}",
            prompt_of=lambda encoded: prompt_key(encoded.pair.prompt),
        )
        if not all(halves):
            raise ConfigError(
                f"task.path: {len(held_out)} held-out pairs are too few to stop by one half and"
                " report the other: raise task.held_out_fraction or give more pairs"
            )
        return scorer, (train, *halves)

    def _scorer(self, context: Context, task: PairTask, model: ModelSettings) -> Scorer:
        """The model with a fresh head."""
        seed = stream_seed(context.seed, "model")
        if self.head == "classifier":
            assert isinstance(model, Pretrained)
            texts = 2 * self.batch_size  # of the pairs of an update
            return load_pair_classifier(model, batch_size=texts, device=context.device, seed=seed)
        network, tokenizer = model.language_model(None, seed=seed)
        backbone = with_fast_paths(CausalTransformer(network.to(context.device), tokenizer))
        shape = HeadShape(
            kind=self.head,
            width=self.width,
            read_layers=self.read_layers,
            prepend_bos=bool(leading_ids(tokenizer, prepend_bos=task.prepend_bos)),
        )
        try:
            scorer = RewardModel(backbone, shape)
            scorer.unfreeze(self.unfreeze_layers)
        except ValueError as error:
            raise ConfigError(f"stage: {error}") from error
        return scorer

    def _data(self, scorer: Scorer, pairs: Sequence[EncodedPair]) -> PairData:
        if isinstance(scorer, RewardModel):
            return FeaturePairs(scorer, pairs, keep_features=self.keep_features, dtype=self.dtype)
        return ClassifierPairs(scorer, pairs, dtype=self.dtype)

    def _train(
        self,
        context: Context,
        parts: RewardModelParts,
        scorer: Scorer,
        train: PairData,
        stop_by: PairData,
    ) -> int:
        """Trains the model and restores its best weights; returns the number of updates."""
        known, module = train.rewards if self.loss == "mse_rank" else None, module_of(scorer)
        if isinstance(scorer, RewardModel):
            mean = 0.0 if known is None else torch.cat(known).mean().item()
            scorer.initialise_head(make_generator(context.seed, "head"), bias=mean)
            network = scorer.backbone.language_model
            adamw = parts.optimizer.build(scorer.backbone, scorer.head)
        else:
            network = scorer.model
            adamw = parts.optimizer.build(network.base_model, head_modules(network))
        num_updates = self.num_updates(len(train))
        early_stopping = EarlyStopping(
            context, module,
            lambda update: {LOSS: self._loss(stop_by.all_scores(), stop_by.rewards).item()},
            eval_every=self.eval_every, patience=self.patience,
            lr_fields="optimizer.head_lr and optimizer.base_lr",
        )  # fmt: skip
        generator = make_generator(context.seed, "minibatches")
        batches = BatchStream(shuffle_batches, range(len(train)), self.batch_size, generator)
        state = SupervisedState(
            network=module,
            optimizer=adamw,
            scheduler=parts.schedule.build(adamw, total_steps=num_updates),
            batches=batches,
            early_stopping=early_stopping,
            inputs=fingerprints(network, task=parts.task, model=parts.model),
        )
        self.fit(context, state, self._losses(train, batches), num_updates=num_updates)
        early_stopping.restore_best(state.update)
        if known is None and isinstance(scorer, RewardModel):  # ranks fix no offset: centre them
            scorer.shift(-torch.cat(train.all_scores()).mean().item())
        return state.update

    def _losses(self, train: PairData, batches: BatchStream) -> Iterator[Tensor]:
        for chosen in batches:
            index = torch.tensor(chosen, device=train.device)
            rewards = train.rewards
            if rewards is not None:
                rewards = rewards[0][index], rewards[1][index]
            yield self._loss(train.scores(index), rewards)

    def _loss(self, scores: Scores, rewards: Scores | None) -> Tensor:
        rewards = rewards if self.loss == "mse_rank" else None
        return pair_loss(scores, rewards, rank_coef=self.rank_coef)

    def _present(
        self, context: Context, report: PairData, scores: Scores, rows: list[dict[str, object]]
    ) -> None:
        folder, add = context.folder, context.presentation.add
        path, title = folder.path / "held_out.png", "reward model on held-out pairs"

        def plot_held_out() -> None:
            if report.rewards is None or self.loss == "rank":
                plot_margins((scores[0] - scores[1]).tolist(), path, title=title)
            else:
                true = torch.cat(report.rewards).tolist()
                plot_predictions(true, torch.cat(scores).tolist(), path, title=title)

        queue_loss_plot(context, title="reward model")
        add("held_out.png", plot_held_out)
        add("the table of pairs", lambda: print_pairs(rows[: self.num_examples], Console()))


def check_classifier_parts(parts: RewardModelParts) -> list[str]:
    """Messages about parts that a classifier on pairs cannot be trained with. Raises ConfigError
    for a directory without a model."""
    problems = []
    if isinstance(parts.model, Pretrained):
        parts.model.locate()
    else:
        problems.append(
            "model: stage.head=classifier needs a saved model: model=local, model=minilm"
        )
    if parts.task.prepend_bos:
        problems.append(
            "task.prepend_bos=true is not for stage.head=classifier, whose tokenizer adds special"
            " tokens by itself: set it false"
        )
    return problems


def module_of(scorer: Scorer) -> nn.Module:
    """The module with the scorer's weights."""
    return scorer if isinstance(scorer, RewardModel) else scorer.model
