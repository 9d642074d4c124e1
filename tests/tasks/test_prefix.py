from dataclasses import fields
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pydantic import ValidationError

from rlhf_exp.tasks.prefix import Prefix
from rlhf_exp.tasks.protocol import CorpusTask

CONF = Path(__file__).parents[2] / "conf/task"


def test_every_prompt_is_the_prefix():
    task = Prefix(prefix="Once upon a time", prepend_bos=False)
    assert task.train_prompts() == task.eval_prompts() == ("Once upon a time",)
    assert task.fingerprint() == ""
    assert not isinstance(task, CorpusTask)


def test_an_empty_prefix_is_refused():
    with pytest.raises(ValidationError, match="at least 1 character"):
        Prefix(prefix="")


def test_the_yaml_file_is_the_class_with_its_defaults():
    config = OmegaConf.load(CONF / "prefix.yaml")
    assert set(config) == {"_target_", *(field.name for field in fields(Prefix))}
    assert instantiate(config) == Prefix()
