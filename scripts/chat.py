"""Chat with a run's policy, or with any saved model; answers appear as they are sampled.

    python scripts/chat.py RUN

With a chat template the conversation continues; without one each line is a text to complete.
"""

import argparse
import sys
from collections.abc import Iterator

from rlhf_exp.hf import quieten_transformers
from rlhf_exp.machine.network import hub_url
from rlhf_exp.machine.streams import make_streams_unbreakable
from rlhf_exp.report.continuations import read_prepend_bos
from rlhf_exp.report.talk import Talk
from rlhf_exp.settings import ConfigError


def lines() -> Iterator[str]:
    """The user's lines, until the end of input or /quit."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip() == "/quit":
            return
        if line.strip():
            yield line


def main() -> None:
    """Reads the arguments, then lines until the end of input."""
    make_streams_unbreakable()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of a run, directory, hub name or short name")
    parser.add_argument("--gen-len", type=int, default=128, help="most tokens per answer (128)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    arguments = parser.parse_args()
    try:
        hub_url()  # raises for a malformed address, before the import of the hub's client does
        quieten_transformers()
        if arguments.gen_len < 1:
            raise ConfigError(f"--gen-len={arguments.gen_len}: should be at least 1")
        talk = Talk(
            arguments.model,
            temperature=arguments.temperature,
            seed=arguments.seed,
            prepend_bos=read_prepend_bos(arguments.model),
            trust_remote_code=arguments.trust_remote_code,
        )
        print(f"{talk.kind}; /reset clears the conversation, /quit or Ctrl-D ends", file=sys.stderr)
        for line in lines():
            talk.take(line, max_new_tokens=arguments.gen_len)
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
