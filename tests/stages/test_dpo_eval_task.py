"""The task that evaluates DPO in the place of the pairs' own: it is checked as that one is."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.settings import ConfigError, Upstream
from rlhf_exp.stages.dpo import DPO

from ..rl.toy import EchoTask, ToyPairs, context, parts_of


@dataclass(frozen=True)
class Versioned(EchoTask):
    """A task of a file, which has a version, and of the artifact of another step."""

    version: str | None = None

    def fingerprint(self) -> str:
        if self.version is None:
            raise ConfigError("the file is missing")
        return self.version

    def check_upstream(self, upstream: Upstream) -> list[str]:
        return [] if upstream("artifact:texts") else ["no step makes texts"]


def test_the_task_that_evaluates_is_checked_like_the_task(
    tmp_path: Path,
) -> None:
    sampler = CachedSampler(gen_len=4, stop_at_eos=True)
    options = {"batch_size": 40, "eval_samples": 8, "checkpoint_every": 1}
    missing, first, second = (
        DPO(**options, eval_task=Versioned(version=version)) for version in (None, "1", "2")
    )
    taken = parts_of(first, task=ToyPairs(), reward=None, sampler=sampler)
    with pytest.raises(ConfigError, match="the file is missing"):
        missing.check(taken)
    assert first.check_upstream(taken, lambda reference: None) == ["no step makes texts"]
    first.run(context(tmp_path), taken)
    with pytest.raises(ConfigError, match=r"^stage.eval_task: the files that it names have chan"):
        second.run(context(tmp_path, resume=True), taken)
