"""The pages for those who come from elsewhere: every name on our side exists, every default is the
one that is there, commands and examples work, links lead somewhere."""

import functools
import importlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from rlhf_exp.app import run
from rlhf_exp.rewards.function import FunctionReward
from rlhf_exp.types import Completions, PromptBatch
from tests import test_readme

ROOT = Path(__file__).resolve().parents[1]
CONF = Path(run.CONF)
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("from_arena", "from_trl")
}
OPTIONS: dict[str, list[str]] = {}
for file in sorted(CONF.glob("*/*.yaml")):
    OPTIONS.setdefault(file.parent.name, []).append(file.stem)
CODE = r"`([^`]+)`"
KEY = r"[a-z]\w*(?:\.\w+)*"
NONE = "—"

# What the pages promise to name: the fields of seed A's and ARENA's RLHFArgs, and of PPOConfig,
# ModelConfig and the arguments of PPOTrainer in TRL 1.12.0 and 0.11.4.
THEIRS = {
    "from_arena": """seed use_wandb wandb_project_name wandb_entity total_phases batch_size
        num_minibatches batches_per_learning_phase base_lr head_lr max_grad_norm warmup_steps
        final_scale clip_coef vf_coef ent_coef base_model gen_len temperature top_k prefix
        prepend_bos kl_coef reward_fn normalize_reward minibatch_size TransformerWithValueHead
        get_samples compute_advantages ReplayMinibatch ReplayMemory calc_kl_penalty
        calc_entropy_bonus calc_value_fn_loss calc_value_function_loss calc_clipped_sur_obj
        calc_clipped_surrogate_objective get_log_probs get_logprobs get_optimizer
        get_optimizer_and_scheduler reward_fn_char_count reward_fn_sentiment_imdb""",
    "from_trl": """learning_rate dataset_num_proc num_mini_batches total_episodes
        local_rollout_forward_batch_size num_sample_generations response_length stop_token
        stop_token_id temperature missing_eos_penalty sft_model_path world_size num_total_batches
        micro_batch_size local_batch_size batch_size local_mini_batch_size mini_batch_size
        push_to_hub reward_model_path model_adapter_name ref_adapter_name num_ppo_epochs
        whiten_rewards kl_coef kl_estimator cliprange vf_coef cliprange_value gamma lam
        ds3_gather_for_generation processing_class model ref_model reward_model train_dataset
        value_model data_collator eval_dataset optimizers callbacks peft_config
        per_device_train_batch_size gradient_accumulation_steps max_grad_norm num_train_epochs
        model_name_or_path model_revision dtype attn_implementation use_peft lora_r lora_alpha
        lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type
        use_rslora use_dora load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant
        bnb_4bit_quant_storage dataset_name dataset_config dataset_train_split dataset_test_split
        ppo_epochs steps adap_kl_ctrl init_kl_coef kl_penalty target horizon early_stopping
        target_kl ratio_threshold use_score_scaling use_score_norm score_clip tokenizer
        num_shared_layers torch_dtype trust_remote_code log_with tracker_project_name
        remove_unused_columns compare_steps push_to_hub_if_best_kwargs""",
}
# The logged names of TRL 1.12.0's PPOTrainer.
TRL_METRICS = """eps objective/kl objective/entropy objective/non_score_reward
    objective/rlhf_reward objective/scores policy/approxkl_avg policy/clipfrac_avg loss/policy_avg
    loss/value_avg val/clipfrac_avg policy/entropy_avg val/ratio val/ratio_var val/num_eos_tokens
    lr episode"""


class Row(NamedTuple):
    """A line of a table: the page, the first cell, and what our columns hold in code."""

    page: str
    theirs: str
    here: list[str]
    default: str

    @property
    def choices(self) -> list[list[str]]:
        """The row's group options, one of each group, in every combination."""
        groups: dict[str, list[str]] = {}
        for word in filter(is_choice, self.here):
            groups.setdefault(word.partition("=")[0], []).append(word)
        return [list(choice) for choice in itertools.product(*groups.values())]

    @property
    def keys(self) -> list[str]:
        """The row's keys of the configuration."""
        return [w for w in self.here if re.fullmatch(KEY, w) and not w.startswith("rlhf_exp.")]


def is_choice(word: str) -> bool:
    """Whether it is group=option."""
    group, equals, _ = word.partition("=")
    return bool(equals) and group in OPTIONS


def table_rows(text: str) -> Iterator[dict[str, str]]:
    """The lines of every table as cells by the heads of their columns."""
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        head, _, *lines = ([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
                           for line in table.splitlines())  # fmt: skip
        for cells in lines:
            assert len(cells) == len(head), cells
            yield dict(zip(head, cells, strict=True))


ROWS = [
    Row(page, next(iter(cells.values())), re.findall(CODE, cells["here"]), cells["default"])
    for page, text in PAGES.items()
    for cells in table_rows(text)
    if "default" in cells
]
METRIC_ROWS = [cells for cells in table_rows(PAGES["from_trl"]) if "TRL 1.12" in cells]
COMMANDS = [
    re.sub(r"\s+", " ", line.split(" #")[0]).strip()
    for text in PAGES.values()
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
    for line in block.replace("\\\n", "").splitlines()
]


@functools.cache
def compose(*overrides: str) -> DictConfig:
    """The configuration; made once for each set of overrides, so not to be changed."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides))


def with_key(config: DictConfig, key: str) -> bool:
    """Whether the configuration has the key, a value or not."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return isinstance(node, DictConfig) and last in node.keys()  # noqa: SIM118 (`in` needs a value)


def stated(text: str) -> list[Any]:
    """The values in a default cell; ??? for "required"."""
    words = re.findall(rf"{CODE}|\b(required)\b", text)
    return [
        "???" if required else OmegaConf.create(f"value: {value}").value
        for value, required in words
    ]


def values(config: DictConfig, keys: Sequence[str]) -> list[Any]:
    missing = OmegaConf.missing_keys(config)
    return ["???" if key in missing else OmegaConf.select(config, key) for key in keys]


def test_there_are_tables_and_commands() -> None:
    by_page = {page: [row for row in ROWS if row.page == page] for page in PAGES}
    assert len(by_page["from_arena"]) >= 40
    assert len(by_page["from_trl"]) >= 60
    assert sum(len(row.keys) for row in ROWS) >= 90
    assert len(METRIC_ROWS) >= 15
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.page}: {row.theirs[:40]}")
def test_a_row_names_keys_that_there_are_with_their_defaults(row: Row) -> None:
    for choice in row.choices:
        config = compose("~experiment", *choice)
        for key in row.keys:
            assert with_key(config, key), f"{key} is no key of {choice}"
        given, real = stated(row.default), values(config, row.keys)
        assert given == real
        assert list(map(type, given)) == list(map(type, real)), "as true and 1"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.page}: {row.theirs[:40]}")
def test_a_row_names_only_what_is_ours(row: Row) -> None:
    for word in row.here:
        if word.startswith("rlhf_exp."):
            find(word)
        else:
            assert is_choice(word) or re.fullmatch(KEY, word), word


def find(path: str) -> Any:
    """What a dotted path names: a module, or something in one."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"there is no module of {path}")


@pytest.mark.parametrize("page", PAGES)
def test_every_argument_that_is_promised_has_a_row(page: str) -> None:
    named = {word for row in ROWS if row.page == page for word in re.findall(CODE, row.theirs)}
    assert set(THEIRS[page].split()) - named == set()


def keys_in_prose(text: str) -> set[str]:
    """Our keys, settings and options that are mentioned anywhere but in code blocks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    # The names of others stand in the first column.
    prose = re.sub(r"^\|[^|]*\|", "|", prose, flags=re.M)
    return {
        word
        for span in re.findall(CODE, prose)
        for word in span.split()
        if re.match(rf"(?:{'|'.join(OPTIONS)})(?:\.\w+)*(?:=|\.\w+$)", word)
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_key_and_option_in_the_prose_exists(page: str) -> None:
    mentioned = sorted(keys_in_prose(PAGES[page]))
    assert len(mentioned) > 10
    for word in mentioned:
        name, _, value = word.partition("=")
        if value.isupper():
            value = ""  # as experiment=NAME
        group = name.partition(".")[0]
        if name == group:
            assert not value or value in OPTIONS[group], word
            continue
        options = [
            f"{group}={option}"
            for option in OPTIONS[group]
            if with_key(compose("~experiment", f"{group}={option}"), name)
        ]
        assert options, word
        if value and group in CHECKED_ALONE:
            assert any(builds(group, option, word) for option in options), word


# Groups with options whose keys have values and are checked one by one.
CHECKED_ALONE = ("stage", "sampler", "optimizer", "schedule", "model")


def builds(group: str, *overrides: str) -> bool:
    """Whether the group takes these values."""
    config = compose("~experiment", *overrides)
    if OmegaConf.missing_keys(config) & {f"{group}.base_model"}:
        config = compose("~experiment", *overrides, f"{group}.base_model=DIR")
    part = OmegaConf.to_container(config[group], resolve=True)
    assert isinstance(part, dict)
    problems: list[str] = []
    run.instantiate({str(k): v for k, v in part.items()}, group, problems,
                    allowed=run.ALLOWED_TARGETS)  # fmt: skip
    return not problems


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prompts in place of a dataset of the hub, its splits of different prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    for split in ("train", "test", "validation"):
        texts = [f"{split} {i} " + "word " * 50 for i in range(40)]
        rows = [json.dumps({"prompt": text, "text": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes_and_passes_every_check(
    command: str, prompts: Path, tmp_path: Path
) -> None:
    assert command.startswith(".venv/bin/python train.py "), "nothing else is checked here"
    command = command.replace("FILE.jsonl", str(prompts / "train.jsonl"))
    hub = re.search(r"experiment=(imdb_sentiment_trl|tldr)", command)
    if hub and "task.path=" not in command:
        command += f" task.path={prompts}"
    test_readme.test_command_composes_and_passes_every_check(command, tmp_path)


def test_the_first_command_is_the_notebooks_run() -> None:
    [command] = [c for c in COMMANDS if "rlhf_transformers" in c]
    words = test_readme.shlex.split(command)[2:]
    config = compose(*words)
    expected = {
        # RLHFArgs of seed A.
        "seed": 1, "logger.project": "rlhf_transformers", "logger.entity": None,
        "stage.total_phases": 200, "stage.batch_size": 32, "stage.num_minibatches": 4,
        "stage.batches_per_learning_phase": 2, "optimizer.base_lr": 2e-5,
        "optimizer.head_lr": 5e-4, "stage.max_grad_norm": 1.0, "schedule.warmup_steps": 20,
        "schedule.final_scale": 0.1, "stage.clip_coef": 0.2, "stage.vf_coef": 0.15,
        "stage.ent_coef": 0.001, "model.base_model": "gpt2-medium", "sampler.gen_len": 50,
        "sampler.temperature": 1.0, "sampler.top_k": 10, "task.prefix": "This is",
        "task.prepend_bos": True, "stage.kl_coef": 2.5, "stage.normalize_reward": True,
        # Its functions, and what torch.optim.AdamW has where they say nothing.
        "sampler.stop_at_eos": False, "stage.estimator.gae_lambda": 0, "stage.estimator.gamma": 1.0,
        "stage.estimator.whiten_advantages": "minibatch", "stage.kl_penalty": "loss",
        "stage.value_clip_coef": None, "stage.missing_eos_penalty": None,
        "optimizer.eps": 1e-8, "optimizer.weight_decay": 0.01, "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.999, "reward.name": "lvwerra/distilbert-imdb",
        "reward.direction": "pos", "reward.output": "prob",
    }  # fmt: skip
    assert {key: OmegaConf.select(config, key) for key in expected} == expected


@pytest.mark.parametrize("page", PAGES)
def test_the_example_of_a_reward_scores(page: str, tmp_path: Path) -> None:
    [source] = re.findall(r"^```python\n(# rewards\.py.*?)^```", PAGES[page], flags=re.M | re.S)
    [setting] = re.findall(r"reward\.function=(\S+)", source)
    file, _, name = setting.partition(":")
    (tmp_path / file).write_text(source, encoding="utf-8")
    score = FunctionReward(function=f"{tmp_path / file}:{name}").load(torch.device("cpu"))
    ones = torch.ones(2, 1, dtype=torch.bool)
    columns = {"source": "Pliny"}
    completions = Completions(
        prompts=PromptBatch(
            tokens=ones.long(),
            mask=ones,
            rows=({"prompt": "Who says so?", **columns}, {"prompt": "Who", **columns}),
        ),
        tokens=ones.long(),
        mask=ones,
        texts=(" Pliny, or not?", " knows"),
    )
    assert score(completions).tolist() == {"from_arena": [2, 0], "from_trl": [1, 0]}[page]


def test_metrics_beside_each_other_exist() -> None:
    ours = [word for cells in METRIC_ROWS for word in re.findall(CODE, cells["here"])]
    assert [name for name in ours if f"`{name}`" not in test_readme.METRICS] == []
    theirs = [word for cells in METRIC_ROWS for word in re.findall(CODE, cells["TRL 1.12"])]
    assert set(TRL_METRICS.split()) - set(theirs) == set()
    assert all(re.search(rf"{CODE}|{NONE}", cells["here"]) for cells in METRIC_ROWS)


@pytest.mark.parametrize("page", PAGES)
def test_metrics_in_the_prose_exist(page: str) -> None:
    prose = re.sub(r"^\|.*$", "", PAGES[page], flags=re.M)
    prefixes = "objective|policy|loss|val|sample|eval|grad_norm|lr"
    named = re.findall(rf"`((?:{prefixes})/\w+)`", prose)
    assert named
    assert [name for name in named if f"`{name}`" not in test_readme.METRICS] == []


def anchors(file: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        file = (ROOT / "docs" / path).resolve() if path else ROOT / "docs" / f"{page}.md"
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("page", PAGES)
def test_paragraphs_are_not_wrapped(page: str) -> None:
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    for block in prose.split("\n\n"):
        lines = [line for line in block.strip().splitlines() if not line.startswith(("|", "#"))]
        assert len(lines) <= 1 or all(line.startswith("- ") for line in lines), block
