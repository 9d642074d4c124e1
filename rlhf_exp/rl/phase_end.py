"""Step 6, keep: sets learning rates and kl_coef, logs, evaluates, saves."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from rlhf_exp.machine.timing import Stopwatch
from rlhf_exp.rl.collect import SCORING, Scorer
from rlhf_exp.rl.evaluation import brief, evaluate
from rlhf_exp.rl.guards import Guards, check_kl_sum
from rlhf_exp.rl.histograms import HistogramCollector
from rlhf_exp.rl.kl_coefficient import KLCoefficient
from rlhf_exp.rl.limit import Limit, measure_limit, read_limit, write_limit
from rlhf_exp.rl.setup import Setup
from rlhf_exp.rl.snapshots import Snapshots
from rlhf_exp.rl.state import TrainState
from rlhf_exp.runs.context import Context
from rlhf_exp.tracking.progress import Progress, log_remaining
from rlhf_exp.training.out_of_memory import explaining_memory
from rlhf_exp.training.saver import Saver

log = logging.getLogger(__name__)
EVALUATING = ("lower sampler.gen_len", "lower stage.eval_samples", *SCORING)


def advance(
    state: TrainState, guards: Guards, kl_coefficient: KLCoefficient, metrics: Mapping[str, float]
) -> None:
    """Sets the learning rates and the KL coefficient of the next phase, averages the weights, and
    stops the run if this phase's KL is above max_kl_sum."""
    kl_sum = metrics["objective/kl_sum"]
    state.scheduler.step()
    if state.average is not None:
        state.average.update()
    kl_coefficient.adapt(state, kl_sum=kl_sum, score=metrics["objective/scores"])
    check_kl_sum(guards, state, kl_sum)


@dataclass(frozen=True, kw_only=True)
class Keeper:
    """Logs each phase; evaluates and saves when it is due. Counts `*_every` are in phases."""

    context: Context
    setup: Setup
    state: TrainState
    scorer: Scorer
    saver: Saver
    progress: Progress
    histograms: HistogramCollector
    clock: Stopwatch
    total_phases: int
    eval_every: int
    eval_samples: int
    histograms_every: int | None
    limit_samples: int | None = None
    snapshots: Snapshots | None = None

    def start(self) -> None:
        """Evaluates the policy before the first phase, and keeps its snapshot."""
        if self.state.phase == 0:
            self._evaluate()
            if self.snapshots is not None:
                self.snapshots.keep(self.state)
        else:
            self._log_remaining()
        self._start_histograms()

    def __call__(self, metrics: Mapping[str, float]) -> None:
        """Step 6. Raises Interrupted, after saving, if the run is asked to stop."""
        folder, phase = self.context.folder, self.state.phase
        folder.log(phase, metrics)
        if histograms := self.histograms.histograms():
            folder.log_histograms(phase, histograms)
        self._start_histograms()
        self.progress.advance(phase, metrics)
        is_last = phase == self.total_phases or self.state.stopped is not None
        score, is_best = None, False
        if is_last or self._is_due(self.eval_every, phase):
            score = self._evaluate()
            is_best = self.state.record_evaluation(score)
        if phase == 1:
            self._log_remaining()
        with self.clock("save"):
            if self.snapshots is not None:
                self.snapshots.keep(self.state, is_last=is_last)
            self.saver.step_done(phase, is_last=is_last, score=score, is_best=is_best)

    def _log_remaining(self) -> None:
        """Logs how long the rest takes, judged by the phases and evaluations so far."""
        phase, seconds = self.state.phase, self.clock.seconds
        phases = self.total_phases - phase
        evaluations = math.ceil(self.total_phases / self.eval_every) - phase // self.eval_every
        phase_s = (seconds["rollout"] + seconds["learn"]) / phase
        evaluation_s = seconds["evaluate"] / (1 + phase // self.eval_every)
        log_remaining(phases=(phases, phase_s), evaluations=(evaluations, evaluation_s))

    def _is_due(self, interval: int | None, phase: int) -> bool:
        return interval is not None and (phase % interval == 0 or phase == self.total_phases)

    def _start_histograms(self) -> None:
        self.histograms.start(active=self._is_due(self.histograms_every, self.state.phase + 1))

    @cached_property
    def _limit(self) -> Limit | None:
        """The run's limit: read from its folder, or measured and written before the first phase.
        None without `limit_samples`, and for a resumed run whose file is gone."""
        folder = self.context.folder.path
        if self.limit_samples is None:
            return None
        limit = read_limit(folder)
        if limit is None and self.state.phase == 0:
            explaining = explaining_memory("measuring the limit", EVALUATING)
            with self.clock("evaluate"), self.setup.policy.working(), explaining:
                limit = measure_limit(
                    self.setup, self.scorer.reward, num_prompts=self.eval_samples,
                    samples=self.limit_samples, seed=self.context.seed,
                )  # fmt: skip
            write_limit(limit, folder)
        return limit

    def _evaluate(self) -> float:
        """Evaluates, logs, and returns the mean score."""
        self.scorer.wait()
        limit = self._limit
        setup, phase, folder = self.setup, self.state.phase, self.context.folder
        explaining = explaining_memory(f"phase {phase}: evaluating", EVALUATING)
        self.saver.wait_until_copied()
        weights = self.state.evaluated_weights()
        with self.clock("evaluate"), weights, setup.policy.working(), explaining:
            result = evaluate(
                setup,
                self.scorer.reward,
                num_samples=self.eval_samples,
                seed=self.context.seed,
                phase=phase,
            )
        metrics = dict(result.metrics)
        if limit is not None:
            metrics |= limit.metrics(metrics)
        folder.log(phase, metrics)
        folder.log_samples(phase, result.samples)
        log.info("evaluation at phase %d: %s", phase, brief(metrics))
        return result.metrics["eval/score"]
