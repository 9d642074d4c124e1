"""The learning rate and the warm-up that experiment=yours chooses for a saved model."""

# Learning rates of the base model, by the class of the finetune option. Measured on SmolLM2-135M by
# the KL in nats a token: all weights 1e-5 (.02 after 16 phases; 5e-5: .2 after 25), the last six
# blocks 3e-5 (.016 after 25; 3e-4: .26), LoRA 3e-4 (.12 to .19 after 25; 6e-4: .2 after 10).
LEARNING_RATES = {"Full": 1e-5, "LastLayers": 3e-5, "Lora": 3e-4}
WARMUP_FRACTION = 0.1


def suited_lr(finetune: str) -> float:
    """The learning rate for the `_target_` of a finetune option; that of all weights for a class
    of the user's own."""
    return LEARNING_RATES.get(finetune.rpartition(".")[2], LEARNING_RATES["Full"])


def suited_warmup(total_phases: int) -> int:
    """A tenth of the phases, at least one unless there is only one."""
    return min(max(1, round(WARMUP_FRACTION * total_phases)), total_phases - 1)
