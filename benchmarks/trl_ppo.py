"""Seconds a phase of TRL 1.12's experimental PPOTrainer on a named shape, for a run beside
ppo_phase.py: VENV/bin/python benchmarks/trl_ppo.py SHAPE PHASES

It needs an environment of its own, without this package:
    python3.11 -m venv VENV && VENV/bin/pip install trl==1.12.0 torch==2.13.0 transformers==5.23.0
Policy, reference and value model are GPT-2s of the shape with random weights: TRL has no value head
on the policy, but a second model. Its reward model has to be a model too: here one block of width
two. Prints one JSON line with the keys of ppo_phase.py.

`optimizer_steps` are counted, a phase. By default there is one a minibatch, as in ppo_phase.py.
TRL's own way to a batch of several minibatches, --accumulate, sets gradient_accumulation_steps,
after which accelerate lets the optimizer step once in so many minibatches, that is once a pass,
whatever num_mini_batches says: less work."""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import pairwise
from statistics import median

from shapes import SHAPES, Shape


def arguments_given() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("phases", type=int, help="at least 2; the first is warm-up")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32", help="of learning")
    parser.add_argument(
        "--accumulate", action="store_true", help="fewer optimizer steps, see above"
    )
    arguments = parser.parse_args()
    if arguments.phases < 2:
        parser.error("PHASES must be at least 2: the first is warm-up")
    return arguments


def set_environment(dtype: str) -> None:
    """What TRL and accelerate read when they are imported or started."""
    os.environ |= {
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_MIXED_PRECISION": "bf16" if dtype == "bf16" else "no",
    }


def word_tokenizer(vocab: int):
    """A tokenizer of so many words, the last of which ends and pads."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab - 1)} | {"<eos>": vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )


def models_of(shape: Shape) -> dict[str, object]:
    """Policy, reference and value model of the shape, and a reward model that costs little."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    def config(num_layers: int, d_model: int, num_heads: int) -> GPT2Config:
        last = shape.vocab - 1
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        specials = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), last)
        return GPT2Config(
            vocab_size=shape.vocab, n_positions=shape.context_len, n_layer=num_layers,
            n_embd=d_model, n_head=num_heads, num_labels=1, **dropouts, **specials,
        )  # fmt: skip

    whole = config(shape.num_layers, shape.d_model, shape.num_heads)
    return {
        "model": GPT2LMHeadModel(whole),
        "ref_model": GPT2LMHeadModel(whole),
        "value_model": GPT2ForSequenceClassification(whole),
        "reward_model": GPT2ForSequenceClassification(config(1, 2, 1)),
    }


def trainer_of(shape: Shape, arguments: argparse.Namespace, folder: str):
    """TRL's trainer on the shape: no evaluation, no checkpoints, nothing reported."""
    import torch
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    # Rows for more phases than are run: at the end of its data accelerate steps in any case.
    rows = [list(range(shape.prompt))] * (shape.batch * (arguments.phases + 1))
    data = Dataset.from_dict({"input_ids": rows})
    pieces = shape.minibatches if arguments.accumulate else 1
    config = PPOConfig(
        output_dir=folder, report_to=[], save_strategy="no", logging_steps=10**6,
        num_sample_generations=0, disable_tqdm=True, gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(), bf16=arguments.dtype == "bf16", learning_rate=2e-5,
        per_device_train_batch_size=shape.batch // pieces, gradient_accumulation_steps=pieces,
        num_mini_batches=shape.minibatches, num_ppo_epochs=shape.epochs,
        local_rollout_forward_batch_size=shape.batch, total_episodes=shape.batch * arguments.phases,
        response_length=shape.gen_len, temperature=1.0,
    )  # fmt: skip
    return PPOTrainer(
        args=config,
        processing_class=word_tokenizer(shape.vocab),
        train_dataset=data,
        eval_dataset=data,
        **models_of(shape),
    )


def timed(trainer) -> tuple[list[float], list[int]]:
    """Seconds and optimizer steps of each phase."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers import TrainerCallback

    stamps, steps = [], [0]

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())
            steps.append(0)

    def count(*_: object) -> None:
        steps[-1] += 1

    register_optimizer_step_post_hook(count)
    trainer.add_callback(Clock())
    stamps.append(time.perf_counter())
    trainer.train()
    seconds = [after - before for before, after in pairwise(stamps)]
    return seconds, steps[: len(seconds)]


def main() -> None:
    """Times the phases and prints the line."""
    arguments = arguments_given()
    set_environment(arguments.dtype)
    import torch
    import trl

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        seconds, steps = timed(trainer_of(SHAPES[arguments.shape], arguments, folder))
    assert len(seconds) == arguments.phases
    on_gpu = torch.cuda.is_available()
    line = {
        "system": f"trl {trl.__version__}",
        "shape": arguments.shape,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "phase_s": round(median(seconds[1:]), 4),
        "warm_up_s": round(seconds[0], 4),
        "optimizer_steps": median(steps[1:]),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "gpu_mib": torch.cuda.max_memory_allocated() >> 20 if on_gpu else 0,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
