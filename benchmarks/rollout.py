"""Tokens a second of the cached sampler beside Hugging Face's and TransformerLens' generation, and
what rows that end early save: python benchmarks/rollout.py [SHAPE]

The same weights, prompt and length for all; no row ends, no filter. hf.generate is transformers'
own GPT-2 as it comes, its weights cast as a whole where the dtype is bf16, and gives tokens alone,
like bridge.generate; sampler=bridge also measures the log-probs, values and states that the cached
sampler gives. Both of these compute in fp32, as they do in PPO. Where half of the rows end, they do
so by EOS. The contenders run in turn, round after round; prints Markdown tables of medians."""

import rlhf_exp.machine.environment  # noqa: F401, I001  first: it must precede the import of torch

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from ppo_phase import setup_of
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.rollout.bridge import BridgeSampler
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.rl.compute import Compute
from rlhf_exp.tasks.prompts import encode_prompts
from rlhf_exp.runs.context import pick_device
from rlhf_exp.machine.cpu_settings import use_processor_well
from rlhf_exp.types import Generation, PromptBatch
from shapes import SHAPES, Shape

Contender = Callable[[], object]
Row = dict[str, str | int | float]

SEEDS = 12  # of which that is taken in which closest to half of the rows end


def seconds_of(contenders: dict[str, Contender], rounds: int) -> dict[str, float]:
    """Median seconds a call of each, called in turn; the first call of each does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 + rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(laps[1:]) for name, laps in seconds.items()}


def plain_copy(policy: TransformerWithValueHead, dtype: torch.dtype) -> GPT2LMHeadModel:
    """transformers' model with the policy's weights and without this package's kernels."""
    model = GPT2LMHeadModel(GPT2Config(**policy.language_model.config.to_dict()))
    model.load_state_dict(policy.language_model.state_dict())
    assert model.config._attn_implementation == "sdpa"
    return model.to(policy.device, dtype).eval()


def hf_generate(model: GPT2LMHeadModel, prompts: PromptBatch, gen_len: int) -> None:
    """One batch through transformers' generate, every row to the end."""
    tokens = model.generate(
        prompts.tokens,
        attention_mask=prompts.mask.long(),
        do_sample=True,
        top_k=0,
        min_new_tokens=gen_len,
        max_new_tokens=gen_len,
        use_cache=True,
    )
    assert tokens.shape[1] == prompts.tokens.shape[1] + gen_len


@torch.no_grad()
def bridge_generate(policy: TransformerWithValueHead, prompts: PromptBatch, gen_len: int) -> None:
    """One batch through TransformerLens' generate, over the policy's weights."""
    policy.view.call(
        lambda bridge: bridge.generate(
            prompts.tokens,
            max_new_tokens=gen_len,
            stop_at_eos=False,
            attention_mask=prompts.mask.long(),
            return_type="tokens",
            verbose=False,
        )
    )


def ours(
    policy: TransformerWithValueHead, prompts: PromptBatch, how: Sampler, *, seed: int = 0
) -> Generation:
    """One batch through a sampler, in the context that PPO gives it."""
    with policy.working():
        return how(policy, prompts, torch.Generator(policy.device).manual_seed(seed))


def compare(
    policy: TransformerWithValueHead, prompt: PromptBatch, arguments: argparse.Namespace
) -> Iterator[Row]:
    """Tokens a second of all contenders by batch and length, and how many times the others' those
    of the cached sampler are."""
    plain = plain_copy(
        policy, torch.float32 if policy.autocast_dtype is None else policy.autocast_dtype
    )
    for gen_len in arguments.lengths:
        for batch in arguments.batches:
            prompts = prompt[torch.zeros(batch, dtype=torch.long)]
            seconds = seconds_of(
                {
                    "cached": partial(ours, policy, prompts, CachedSampler(gen_len=gen_len)),
                    "hf.generate": partial(hf_generate, plain, prompts, gen_len),
                    "bridge.generate": partial(bridge_generate, policy, prompts, gen_len),
                    "sampler=bridge": partial(
                        ours, policy, prompts, BridgeSampler(gen_len=gen_len)
                    ),
                },
                arguments.rounds,
            )
            cached, *others = seconds
            yield {
                "batch": batch,
                "length": gen_len,
                **{name: round(batch * gen_len / lap) for name, lap in seconds.items()},
                **{
                    f"{cached} / {name}": round(seconds[name] / seconds[cached], 2)
                    for name in others
                },
            }


@torch.no_grad()
def clear_signal(policy: TransformerWithValueHead) -> torch.Tensor:
    """Has the first two coordinates of the residual stream say nothing but minus the direction that
    is returned: no block and no token writes there."""
    trunk, direction = policy.language_model.transformer, torch.tensor([-1.0, 1.0])
    for block in trunk.h:
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            projection.weight[:, :2] = 0
            projection.bias[:2] = 0
    trunk.wte.weight[:, :2] = 0
    trunk.wpe.weight[:, :2] = -direction
    return direction.to(policy.device)


@torch.no_grad()
def end_half_after(policy: TransformerWithValueHead, prompt: PromptBatch) -> None:
    """Has the policy emit EOS after this prompt with probability 1/2, and hardly ever later."""
    direction, eos = clear_signal(policy), policy.tokenizer.eos_token_id
    trunk = policy.language_model.transformer
    trunk.wpe.weight[prompt.tokens.shape[1] - 1, :2] = direction
    hidden = policy.hidden_states(prompt.tokens, None)[0, -1].float()
    others = policy.unembed(hidden).index_fill(0, torch.tensor(eos).to(hidden.device), -torch.inf)
    rest = hidden[2:] @ trunk.wte.weight[eos, 2:]
    trunk.wte.weight[eos, :2] = direction * (others.logsumexp(0) - rest) / (hidden[:2] @ direction)


@torch.no_grad()
def end_after(policy: TransformerWithValueHead, marker: int) -> None:
    """Has the policy emit EOS at once after the token `marker`, and never otherwise."""
    direction, embedding = clear_signal(policy), policy.language_model.transformer.wte.weight
    embedding[marker, :2] = 3 * direction
    embedding[policy.tokenizer.eos_token_id, :2] = 9 * direction


def half_ends(
    policy: TransformerWithValueHead, prompts: PromptBatch, gen_len: int, rounds: int
) -> Row:
    """Seconds of a batch after half of whose prompts the policy emits EOS, of the same one run on
    to the end, and of half the batch so; with the shares of the second."""
    stops, goes_on = (CachedSampler(gen_len=gen_len, stop_at_eos=stop) for stop in (True, False))
    batch = len(prompts.rows)
    ended: dict[int, int] = {}
    for seed in range(SEEDS):
        lengths = ours(policy, prompts, stops, seed=seed).completions.mask.sum(dim=1)
        if bool(((lengths == 1) | (lengths == gen_len)).all()):
            ended[seed] = int((lengths == 1).sum())
    seed = min(ended, key=lambda seed: abs(ended[seed] - batch / 2))
    alone = prompts[torch.arange(batch // 2)]
    seconds = seconds_of(
        {
            "none ends": partial(ours, policy, prompts, goes_on, seed=seed),
            "half ends": partial(ours, policy, prompts, stops, seed=seed),
            "half the batch": partial(ours, policy, alone, goes_on, seed=seed),
        },
        rounds,
    )
    whole, *parts = seconds
    shares = {f"{name} / {whole}": round(seconds[name] / seconds[whole], 2) for name in parts}
    return {
        "batch": batch,
        "length": gen_len,
        "rows that end": ended[seed],
        **{name: round(lap, 4) for name, lap in seconds.items()},
        **shares,
    }


def early_ends(
    policy: TransformerWithValueHead, shape: Shape, arguments: argparse.Namespace
) -> Iterator[Row]:
    """Rows of `half_ends` for a prompt that all share and for two in turn, of which the second
    ends. Changes the policy's weights."""
    start = " ".join(f"w{i}" for i in range(shape.prompt - 1))
    both = encode_prompts(
        policy.tokenizer, [f"{start} w0", f"{start} w1"], prepend_bos=False, device=policy.device
    )
    for batch in (batch for batch in arguments.batches if batch >= 32):
        pairs = torch.arange(batch) % 2
        end_half_after(policy, both[torch.tensor([0])])
        row = half_ends(policy, both[0 * pairs], shape.gen_len, arguments.rounds)
        yield {"prompts": "one", **row}
        end_after(policy, marker=int(both.tokens[1, -1]))
        row = half_ends(policy, both[pairs], shape.gen_len, arguments.rounds)
        yield {"prompts": "two", **row}


def show(title: str, rows: Iterator[Row], *, as_json: bool, about: Row) -> None:
    """Prints rows as they come: a Markdown table, or JSON lines that say what they are about."""
    for number, row in enumerate(rows):
        if as_json:
            print(json.dumps({**about, **row}), flush=True)
            continue
        if number == 0:
            told = ", ".join(f"{name} {value}" for name, value in about.items())
            print(f"\n{title} ({told})\n\n| {' | '.join(row)} |")
            print("| --- " * len(row) + "|")
        print(f"| {' | '.join(map(str, row.values()))} |", flush=True)


def whole_numbers(text: str) -> list[int]:
    """The numbers of a list with commas."""
    return [int(number) for number in text.split(",")]


def main() -> None:
    """Runs all contenders and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", nargs="?", choices=sorted(SHAPES), default="series")
    parser.add_argument("--batches", type=whole_numbers, default=[1, 8, 32, 128])
    parser.add_argument("--lengths", type=whole_numbers, help="default: the shape's, and double")
    parser.add_argument("--json", action="store_true", help="JSON lines in place of tables")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    arguments = parser.parse_args()
    shape, device = SHAPES[arguments.shape], pick_device("auto")
    arguments.lengths = arguments.lengths or [shape.gen_len, 2 * shape.gen_len]
    if shape.prompt + max(arguments.lengths) > shape.context_len:
        parser.error(f"--lengths: at most {shape.context_len - shape.prompt} on this shape")
    use_processor_well()
    setup = setup_of(shape, "full", device)
    Compute(dtype=arguments.dtype, compile="off").prepare(setup)
    policy = setup.policy
    about: Row = {
        "shape": arguments.shape,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "dtype": "fp32" if policy.autocast_dtype is None else "bf16",
    }
    rates = compare(policy, setup.train_prompts, arguments)
    show("Tokens a second", rates, as_json=arguments.json, about=about)
    ends = early_ends(policy, shape, arguments)
    title = "Seconds a batch when half of the rows end at their first token"
    show(title, ends, as_json=arguments.json, about=about)


if __name__ == "__main__":
    main()
