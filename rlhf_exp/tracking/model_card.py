"""The model card of a run: the model, its data, its evaluation, and the versions of packages."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlhf_exp.runs.paths import CURVES, MODEL, read_environment

VERSIONS = ("python", "torch", "transformers", "transformer-lens", "peft", "rlhf_exp")


def write_model_card(
    run: Path,
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    *,
    hub_name: Callable[[str], str] = str,
) -> Path:
    """Writes model/README.md below the run's folder from its configuration, result and
    environment.txt, with the curves beside it, and returns it. `hub_name` gives the hub's name of
    a base model that has a short one."""
    from huggingface_hub import ModelCard, ModelCardData

    base = (config.get("model") or {}).get("base_model")
    # A directory of this machine means nothing to others.
    on_hub = None
    if isinstance(base, str) and not Path(base).exists() and ":" not in base:
        on_hub = hub_name(base)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["rlhf_exp", _stage(config)],
        base_model=on_hub,
    )
    model = run / MODEL
    if (run / CURVES).is_file():
        shutil.copyfile(run / CURVES, model / CURVES)
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(run, config, result, base)}"
    path = model / "README.md"
    ModelCard(text).save(path)
    return path


def _body(run: Path, config: Mapping[str, Any], result: Mapping[str, Any], base: object) -> str:
    parts = [
        f"# {config['name']}",
        f"Trained by rlhf_exp, `stage={_stage(config)}`, seed {config['seed']}"
        + (f", from `{base}`." if base else ", from nothing."),
        "## Evaluation",
        _evaluation(result),
        *_intervention(config),
        "## Data",
        _listing(config.get("task") or {}),
    ]
    if (run / CURVES).is_file():
        parts += ["## Curves", f"![metrics by phase]({CURVES})"]
    if (run / MODEL / "value_head.safetensors").is_file():
        parts += [
            "## Files",
            "`value_head.safetensors` is the value head that PPO trained beside the model; the"
            " model itself opens without it in `AutoModelForCausalLM`."
            + (
                " `adapter/` holds the adapters alone, for PEFT."
                if (run / MODEL / "adapter").is_dir()
                else ""
            ),
        ]
    parts_of_config = {name: part for name, part in config.items() if name != "logger" and part}
    parts += [
        "## Configuration",
        f"```json\n{json.dumps(parts_of_config, indent=2, ensure_ascii=False)}\n```",
    ]
    parts += ["## Versions", f"```\n{_versions(run)}\n```"]
    return "\n\n".join(parts) + "\n"


def _stage(config: Mapping[str, Any]) -> str:
    return str(config["stage"]["_target_"]).split(".")[-2]  # its module, as stage=... names it


def _evaluation(result: Mapping[str, Any]) -> str:
    before, after = result.get("before") or {}, result["after"]
    note = "Fresh samples at temperature 1 from the full distribution; KL to the model it began as."
    lines = ["| metric | before | after |", "| --- | --- | --- |"]
    for name, value in after.items():
        first = _format_number(before[name]) if name in before else ""
        lines.append(f"| `{name}` | {first} | {_format_number(value)} |")
    return "\n".join([note, "", *lines] if before else lines)


def _intervention(config: Mapping[str, Any]) -> list[str]:
    intervention = config.get("intervention") or {}
    if len(intervention) < 2:  # its class alone: none
        return []
    note = "The policy was trained and measured under this intervention; the saved weights are"
    return ["## Intervention", f"{note} without it.", _listing(intervention)]


def _format_number(value: float | None) -> str:
    return "not finite" if value is None else f"{value if abs(value) > 1e-6 else 0:.4g}"


def _listing(part: Mapping[str, Any]) -> str:
    values = {k: v for k, v in part.items() if k != "_target_" and v is not None}
    return "\n".join(f"- `{key}`: {value}" for key, value in values.items())


def _versions(run: Path) -> str:
    lines = read_environment(run)
    names = ("commit", "code", "cpu", "gpu", *VERSIONS)
    return "\n".join(line for line in lines if line.split("==")[0].split(" ")[0] in names)
