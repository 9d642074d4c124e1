import pytest

from tests.composed import compose


@pytest.mark.parametrize(
    ("finetune", "rate"), [("full", 1e-5), ("last_layers", 3e-5), ("lora", 3e-4)]
)
def test_your_own_model_gets_a_rate_by_what_is_trained_and_a_warm_up_that_fits(finetune, rate):
    words = ("experiment=yours", "model=gpt2", "task=prefix", "reward=length")
    for phases, warmup in ((1, 0), (2, 1), (20, 2), (200, 20)):
        cfg = compose(*words, f"finetune={finetune}", f"stage.total_phases={phases}")
        assert cfg.optimizer.base_lr == rate
        assert cfg.schedule.warmup_steps == warmup
