"""Completions of a run's policy beside those of its base model.

python scripts/sample.py RUN --prompt "This movie was" --prompt "I think" --num 2
"""

import argparse
import functools

from pydantic import ValidationError
from rich.console import Console

from rlhf_exp.hf import quieten_transformers
from rlhf_exp.machine.network import hub_url
from rlhf_exp.machine.streams import make_streams_unbreakable
from rlhf_exp.report.continuations import continuations, read_run, side_by_side
from rlhf_exp.rollout.cached import CachedSampler
from rlhf_exp.settings import ConfigError, field_problem


def _problem(error: ValidationError) -> str:
    """A message with the argument that is out of range, and the reason."""
    return "--" + field_problem("", error.errors()[0]).replace("_", "-")


def main() -> None:
    """Reads the arguments, samples twice, prints a table."""
    make_streams_unbreakable()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--num", type=int, default=1, help="completions per prompt (1)")
    parser.add_argument("--gen-len", type=int, default=32, help="most tokens per completion (32)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (1)")
    parser.add_argument("--top-k", type=int, help="sample from this many tokens; 1 is greedy")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    parser.add_argument("--chat", action="store_true", help="prompts are a user's messages")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    arguments = parser.parse_args()
    prompts = [prompt for prompt in arguments.prompt for _ in range(arguments.num)]
    try:
        hub_url()  # raises for a malformed address, before the import of the hub's client does
        quieten_transformers()
        if arguments.num < 1:
            raise ConfigError(f"--num={arguments.num}: should be at least 1")
        run = read_run(arguments.run, trust_remote_code=arguments.trust_remote_code)
        sampler = CachedSampler(
            gen_len=arguments.gen_len,
            temperature=arguments.temperature or 1.0,
            top_k=arguments.top_k if arguments.temperature else 1,
            stop_at_eos=True,
        )
        complete = functools.partial(
            continuations,
            prompts=prompts,
            prepend_bos=run.prepend_bos,
            chat=arguments.chat,
            sampler=sampler,
            seed=arguments.seed,
        )
        base, tuned = run.base and complete(run.base), complete(run.tuned)
    except (ConfigError, ValidationError) as error:
        problem = error if isinstance(error, ConfigError) else _problem(error)
        parser.exit(2, f"error: {problem}\n")
    Console().print(side_by_side(prompts, base, tuned))
    if base is None:
        print("the run trained from scratch: there is no base model to show")


if __name__ == "__main__":
    main()
