"""Interventions in full passes: in either engine, with gradients, and in the policy alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rlhf_exp.models.editing import Edit, Site, Sites
from rlhf_exp.models.finetune import Full, LastLayers, Lora
from rlhf_exp.models.interventions import Ablate, Add, Intervention, NoIntervention
from rlhf_exp.models.loading import Pretrained, load_policy
from rlhf_exp.models.policy import TransformerWithValueHead
from rlhf_exp.models.saving import save_policy
from rlhf_exp.models.scratch import Scratch
from rlhf_exp.settings import ConfigError, Fingerprinted
from rlhf_exp.types import Layout
from tests.architectures import build
from tests.builders import (
    assert_near,
    build_tokenizer,
    cut,
    plain_forward,
    ragged_tokens,
    stretch,
    tiny_policy,
    with_engine,
)
from tests.edited import (
    CHANGES,
    VECTORS,
    by_hand,
    edited_by_hand,
    pass_by_hand,
    settings,
)

TOKENS, MASK = ragged_tokens()
PROMPT = 6
KINDS = {
    "full": Full(),
    "last_layers": LastLayers(num_layers_unfrozen=1),
    "lora": Lora(rank=4, alpha=8),
}


def edited_policy(architecture: str, case: str, folder: Path, **fields: object):
    policy = tiny_policy(architecture)
    settings(case, folder, **fields).attach(policy)
    return policy


@pytest.mark.parametrize(("case", "positions"), CHANGES)
def test_a_pass_is_the_one_with_hooks_put_on_by_hand(
    architecture: str, case: str, positions: str, tmp_path: Path
) -> None:
    policy = edited_policy(architecture, case, tmp_path, positions=positions)
    plain = plain_forward(policy, TOKENS, MASK)[0]
    expected = pass_by_hand(policy, case, TOKENS, MASK, prompt_len=PROMPT, positions=positions)
    assert (expected[0] - plain)[MASK].abs().max() > 0.1
    logits, values = policy(TOKENS, MASK, prompt_len=PROMPT)
    hidden = policy.hidden_states(TOKENS, MASK, prompt_len=PROMPT)
    for found, wanted in zip((logits, values, hidden), expected, strict=True):
        assert_near(found[MASK], wanted[MASK])


@pytest.mark.parametrize(("case", "positions"), CHANGES)
def test_the_names_mean_what_they_mean_in_transformerlens(
    architecture: str, case: str, positions: str, tmp_path: Path
) -> None:
    policy = edited_policy(architecture, case, tmp_path, positions=positions)
    hooks = [
        (site, partial(edited_by_hand, change=change, mask=MASK, prompt_len=PROMPT,
                       positions=positions))
        for site, change in by_hand(case).items()
    ]  # fmt: skip
    expected = policy.hooked().run_with_hooks(
        TOKENS, fwd_hooks=hooks, attention_mask=MASK.long(), return_type="logits"
    )
    assert_near(policy(TOKENS, MASK, prompt_len=PROMPT)[0][MASK], expected[MASK])
    slow = with_engine(policy, "hooked")
    settings(case, tmp_path, positions=positions).attach(slow)
    logits, values = slow(TOKENS, MASK, prompt_len=PROMPT)
    assert_near(logits[MASK], expected[MASK])
    assert_near(values[MASK], policy(TOKENS, MASK, prompt_len=PROMPT)[1][MASK])


def gradients(policy: TransformerWithValueHead, run: Callable[[], tuple[Tensor, ...]]):
    policy.zero_grad()
    logits, values = run()[:2]
    (logits.log_softmax(dim=-1)[..., 5][MASK].sum() + values[MASK].square().sum()).backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["add", "mean", "direction"])
def test_gradients_are_those_of_hooks_put_on_by_hand(
    architecture: str, case: str, kind: str, tmp_path: Path
) -> None:
    policy = tiny_policy(architecture)
    KINDS[kind].attach(policy, seed=0)
    expected = gradients(
        policy, lambda: pass_by_hand(policy, case, TOKENS, MASK, prompt_len=PROMPT,
                                     positions="completion")
    )  # fmt: skip
    settings(case, tmp_path, positions="completion").attach(policy)
    forward = partial(policy, TOKENS, MASK, prompt_len=PROMPT)
    found = gradients(policy, forward)
    policy.checkpoint_gradients()
    policy.train()
    recomputed = gradients(policy, forward)
    assert found.keys() == expected.keys() == recomputed.keys()
    for name, gradient in found.items():
        assert_near(gradient, expected[name])
        assert torch.equal(recomputed[name], gradient)
    if kind != "lora":
        slow = with_engine(policy, "hooked")
        settings(case, tmp_path, positions="completion").attach(slow)
        hooked = gradients(slow, partial(slow, TOKENS, MASK, prompt_len=PROMPT))
        for name, gradient in hooked.items():
            assert_near(gradient, expected[name])


@pytest.mark.parametrize("case", ["add", "mean", "direction"])
def test_the_gradient_is_the_slope(case: str, tmp_path: Path) -> None:
    policy = edited_policy("gpt2", case, tmp_path, positions="prompt").double()
    weight = policy.language_model.transformer.wte.weight

    def objective() -> Tensor:
        hidden = policy.hidden_states(TOKENS, MASK, prompt_len=PROMPT)[MASK]
        return (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum()

    [gradient] = torch.autograd.grad(objective(), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).double()
    step = 1e-5
    with torch.no_grad():
        weight.add_(step * direction)
        above = objective()
        weight.sub_(2 * step * direction)
        below = objective()
    slope = (above - below) / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["add", "mean", "direction"])
def test_the_reference_runs_without_it(
    architecture: str, kind: str, case: str, tmp_path: Path
) -> None:
    policy = tiny_policy(architecture)
    reference = KINDS[kind].attach(policy, seed=0)
    if kind == "lora":
        adapters = nn.ParameterList(p for p in policy.parameters() if p.requires_grad)
        stretch(adapters, seed=1, std=0.1)
    completions = cut(TOKENS, MASK, PROMPT)
    layout = Layout.of(completions)
    with torch.no_grad():
        before = reference.completion_states(completions, layout)
        own = policy.completion_states(completions, layout)
        settings(case, tmp_path).attach(policy)
        assert torch.equal(reference.completion_states(completions, layout), before)
        edited = policy.completion_states(completions, layout)
    assert (edited - own).abs().max() > 0.1
    hidden = pass_by_hand(policy, case, TOKENS, MASK, prompt_len=PROMPT)[2]
    assert_near(edited, hidden[:, PROMPT - 1 : -1])


def num_hooks(policy: TransformerWithValueHead) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in policy.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_bridges_and_saved_models_are_plain(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    policy = tiny_policy(architecture)
    KINDS[kind].attach(policy, seed=0)
    expected = plain_forward(policy, TOKENS, MASK)[0][MASK]
    before = num_hooks(policy)
    settings("add", tmp_path).attach(policy)
    assert (policy(TOKENS, MASK)[0][MASK] - expected).abs().max() > 0.1
    assert num_hooks(policy) == before
    assert_near(plain_forward(policy, TOKENS, MASK)[0][MASK], expected)
    bridge = policy.hooked()(TOKENS, attention_mask=MASK.long(), return_type="logits")
    assert_near(bridge[MASK], expected)
    saved = load_policy(save_policy(policy, tmp_path / "saved"))
    assert_near(saved(TOKENS, MASK)[0][MASK], expected)
    if kind != "lora":
        twin = policy.frozen_reference()
        assert_near(twin.unembed(twin.hidden_states(TOKENS, MASK))[MASK], expected)


def count_hooks(monkeypatch: pytest.MonkeyPatch) -> list[Site]:
    """The sites that a hook is put at from now on, once for each time."""
    registered: list[Site] = []
    hook = Site.hook

    def noted(site: Site, edit: Edit) -> RemovableHandle:
        registered.append(site)
        return hook(site, edit)

    monkeypatch.setattr(Site, "hook", noted)
    return registered


def test_a_scale_of_0_and_no_intervention_change_no_bit(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy(architecture)
    expected = policy(TOKENS, MASK)
    settings("add", tmp_path, scale=0.0).attach(policy)
    for found, wanted in zip(policy(TOKENS, MASK), expected, strict=True):
        assert torch.equal(found, wanted)
    policy = tiny_policy(architecture)
    NoIntervention().attach(policy)
    with policy.edits.in_bridge(MASK, None) as hooks:
        assert hooks == []
    registered = count_hooks(monkeypatch)
    for found, wanted in zip(policy(TOKENS, MASK), expected, strict=True):
        assert torch.equal(found, wanted)
    assert registered == []
    settings("add", tmp_path).attach(policy)
    policy(TOKENS, MASK)
    assert len(registered) > 0


def test_padding_stays_as_it_is(tmp_path: Path) -> None:
    policy = tiny_policy("llama")
    plain = policy.hidden_states(TOKENS, MASK)
    settings("add", tmp_path, sites=["ln_final.hook_out"]).attach(policy)
    edited = policy.hidden_states(TOKENS, MASK)
    assert torch.equal(edited[~MASK], plain[~MASK])
    assert_near(edited[MASK], plain[MASK] + 0.7 * VECTORS["vector"])


def test_the_dtype_of_activations_stays(tmp_path: Path) -> None:
    policy = edited_policy("gpt2", "mean direction", tmp_path)
    exact = policy.hidden_states(TOKENS, MASK)
    policy.compute_in(torch.bfloat16)
    with policy.working():
        rounded = policy.hidden_states(TOKENS, MASK)
    assert 0 < (rounded - exact).float()[MASK].abs().max() < 0.2
    policy = tiny_policy("gpt2")
    policy.language_model.bfloat16()
    settings("mean", tmp_path).attach(policy)
    assert policy.hidden_states(TOKENS, MASK).dtype == torch.bfloat16


def test_an_mlp_that_has_no_module_of_its_own(tmp_path: Path) -> None:
    policy = TransformerWithValueHead(build("xglm"), build_tokenizer())
    tokens = TOKENS.clamp(min=4)
    plain = policy(tokens)[0]
    Ablate(mlps=[0, 1]).attach(policy)
    edited = policy(tokens)[0]
    for layer in policy.language_model.model.layers:
        layer.fc2.register_forward_hook(lambda module, args, output: 0 * output)
    expected = policy.language_model(tokens).logits
    assert (expected - plain).abs().max() > 0.01
    assert_near(edited, expected)


def test_a_star_is_a_part_of_a_name(architecture: str) -> None:
    sites = Sites(tiny_policy(architecture).language_model)
    found = sites.find(["blocks.*.hook_out", "blocks.1.*.hook_z"], field="sites")
    assert [*found] == ["blocks.0.hook_out", "blocks.1.hook_out", "blocks.1.attn.hook_z"]


def refusal(intervention: Intervention, policy: TransformerWithValueHead | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        intervention.attach(policy or tiny_policy("gpt2"))
    message = str(caught.value)
    assert message.count("\n") < 4
    return message


def test_a_site_that_is_not_there_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    policy = tiny_policy(architecture)
    name = type(policy.language_model).__name__
    for site, near in {
        "blocks.1.hook_resid_pst": "blocks.1.hook_resid_post",
        "blocks.2.hook_resid_post": "blocks.1.hook_resid_post",
        "blocks.0.attn.hook_pattern": "",
        "ln_final.hook_normalized": "",
    }.items():
        message = refusal(settings("add", tmp_path, sites=[site]), policy)
        assert message.startswith(f"intervention.sites: {name} has no site {site}; nearest are ")
        assert near in message
    assert refusal(Ablate(mlps=[2]), policy).startswith(
        f"intervention.mlps: {name} has no site blocks.2.hook_mlp_out; nearest are "
    )
    assert refusal(Ablate(heads=[[3, 0]]), policy).startswith(
        f"intervention.heads: {name} has no site blocks.3.attn.hook_z; nearest are "
    )
    assert refusal(Ablate(heads=[[1, 0], [1, 2]]), policy) == (
        "intervention.heads: there is no head 2 at blocks.1.attn.hook_z; the last is 1"
    )


@pytest.mark.parametrize("site", ["unembed.hook_in", "embed.hook_in"])
def test_a_site_without_activations_in_the_passes_is_refused(site: str, tmp_path: Path) -> None:
    message = refusal(settings("add", tmp_path, sites=[site]))
    assert message.startswith(f"intervention: {site} has no activation [batch seq width] in the ")


def test_a_site_that_transformerlens_does_not_compute_is_refused(tmp_path: Path) -> None:
    # GPT-2's attention is split in TransformerLens, which never calls the fused layer.
    save_file({"vector": torch.ones(48)}, tmp_path / "qkv.safetensors")
    qkv = Add(path=str(tmp_path / "qkv.safetensors"), sites=["blocks.0.attn.qkv.hook_out"])
    policy = tiny_policy("gpt2")
    qkv.attach(policy)
    policy(TOKENS, MASK)
    slow = with_engine(policy, "hooked")
    qkv.attach(slow)
    with pytest.raises(ConfigError, match=r"does not compute blocks\.0\.attn\.qkv\.hook_out"):
        slow(TOKENS, MASK)


def test_files_are_refused_by_name(tmp_path: Path) -> None:
    def refused(change: dict[str, object], kind: type = Add) -> str:
        save_file(VECTORS, tmp_path / "v.safetensors")
        defaults = {"path": str(tmp_path / "v.safetensors"), "sites": ["ln_final.hook_out"]}
        intervention = kind(**({**defaults, **change} if kind is Add else change))
        message = refusal(intervention)
        if "width" not in message and "wide" not in message:  # known before there is a model
            assert isinstance(intervention, Fingerprinted)
            with pytest.raises(ConfigError, match=r"\w") as caught:
                intervention.fingerprint()
            assert str(caught.value) == message
        return message.replace(str(tmp_path), "DIR")

    assert refused({"path": str(tmp_path / "no.safetensors")}) == (
        "intervention.path=DIR/no.safetensors: there is no such file; name a safetensors file"
    )
    (tmp_path / "text.safetensors").write_text("not tensors")
    message = refused({"path": str(tmp_path / "text.safetensors")})
    assert message.startswith("intervention.path=DIR/text.safetensors: ")
    assert message.endswith("; name a safetensors file")
    assert refused({"tensor": "vectr"}) == (
        "intervention.path=DIR/v.safetensors has no vectr; it has vector, direction, of_heads"
    )
    assert refused({"sites": ["blocks.0.mlp.hook_post"]}) == (
        "intervention.path=DIR/v.safetensors: vector has shape [16], but the activation has 64"
        " entries; choose a site of that width, or a vector of this model"
    )
    save_file({"vector": torch.tensor([float("nan")])}, tmp_path / "nan.safetensors")
    assert refused({"path": str(tmp_path / "nan.safetensors")}) == (
        "intervention.path=DIR/nan.safetensors: vector is not a tensor of finite floats"
    )
    save_file({"direction": torch.zeros(16)}, tmp_path / "zero.safetensors")
    zero = {"direction": str(tmp_path / "zero.safetensors"), "sites": ["ln_final.hook_out"]}
    assert (
        refused(zero, Ablate) == "intervention.direction=DIR/zero.safetensors: direction is all 0"
    )
    means = {"mlps": [1], "means": str(tmp_path / "v.safetensors")}
    assert refused(means, Ablate).startswith(
        "intervention.means=DIR/v.safetensors has no blocks.1.hook_mlp_out; it has "
    )
    assert refused({"sites": []}) == (
        "intervention.sites is empty: set [blocks.LAYER.hook_resid_post]"
    )
    assert refused({}, Ablate).startswith(
        "intervention: nothing is ablated: set intervention.heads"
    )
    for half in ({"direction": "v"}, {"sites": ["ln_final.hook_out"]}):
        with pytest.raises(ValidationError, match="direction and sites go together"):
            Ablate(**half)


def test_a_fingerprint_is_that_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for case in ("add", "mean direction"):
        first, again = settings(case, tmp_path), settings(case, tmp_path / "other")
        assert first.fingerprint() == again.fingerprint()
        for name in ("vectors", "means"):
            file = tmp_path / "other" / f"{name}.safetensors"
            save_file({**load_file(file), "more": torch.ones(1)}, file)
        assert first.fingerprint() != again.fingerprint()
    assert not isinstance(NoIntervention(), Fingerprinted)


@pytest.mark.parametrize("name", ["vectors", "means"])
def test_a_change_in_either_file_changes_the_fingerprint(name: str, tmp_path: Path) -> None:
    intervention, file = settings("mean direction", tmp_path), tmp_path / f"{name}.safetensors"
    before = intervention.fingerprint()
    save_file({**load_file(file), "more": torch.ones(1)}, file)
    assert intervention.fingerprint() != before


def test_what_does_not_fit_is_told_without_weights(architecture: str, tmp_path: Path) -> None:
    scratch = Scratch(architecture=architecture, num_layers=2, d_model=16, num_heads=2)
    save_policy(tiny_policy(architecture), tmp_path / "model")
    saved = Pretrained(base_model=str(tmp_path / "model"))
    wide = {"tensor": "wide", "sites": ["blocks.0.hook_resid_post"]}
    for model in (scratch, saved):
        for case in ("add", "add to heads", "mean direction", "mean"):
            assert settings(case, tmp_path).check(model) == []
        save_file({"wide": torch.ones(7)}, tmp_path / "vectors.safetensors")
        for wrong, message in (
            (Add(path=str(tmp_path / "vectors.safetensors"), **wide), "wide has shape [7], but"),
            (Ablate(heads=[[0, 9]]), "there is no head 9 at blocks.0.attn.hook_z; the last is"),
            (Ablate(mlps=[7]), "has no site blocks.7.hook_mlp_out"),
        ):
            [problem] = wrong.check(model)
            assert message in problem
            with pytest.raises(ConfigError) as caught:
                wrong.attach(tiny_policy(architecture))
            assert message in str(caught.value)
    hub = Pretrained(base_model="some/model")
    assert Ablate(mlps=[7]).check(hub) == []


def test_an_architecture_that_transformerlens_does_not_know_is_refused(tmp_path: Path) -> None:
    policy = TransformerWithValueHead(build("biogpt"), build_tokenizer())
    message = refusal(settings("add", tmp_path), policy)
    assert message.startswith(
        "intervention: sites have TransformerLens's names, and it does not know BioGptForCausalLM"
    )
    assert message.endswith("use intervention=none, or a model of another architecture")


def test_positions_need_to_know_where_the_prompt_ends(tmp_path: Path) -> None:
    policy = edited_policy("gpt2", "add", tmp_path, positions="prompt")
    with pytest.raises(ValueError, match=r"intervention\.positions=prompt: pass prompt_len"):
        policy(TOKENS, MASK)


def test_a_compiled_policy_is_not_attached_to(tmp_path: Path) -> None:
    policy = tiny_policy("gpt2")
    policy.compile_passes()
    with pytest.raises(AssertionError, match="compiled"):
        settings("add", tmp_path).attach(policy)


# By itself: the checks that tests put around functions cannot be compiled.
COMPILED = """
import rlhf_exp.machine.environment, json, sys
import torch
from functools import partial
from pathlib import Path
from tests.builders import ragged_tokens, tiny_policy
from tests.edited import CHANGES, settings
torch.compile = partial(torch.compile, backend="aot_eager")
tokens, mask = ragged_tokens()
errors = []
for case, positions in CHANGES[1::4]:
    policies = [tiny_policy("llama") for _ in range(2)]
    for policy in policies:
        settings(case, Path(sys.argv[1]), positions=positions).attach(policy)
    policies[1].compile_passes()
    for prompt_len, seen in ((6, mask), (5, mask), (6, None), (6, mask)):
        hidden = [policy.hidden_states(tokens, seen, prompt_len=prompt_len) for policy in policies]
        for policy, states in zip(policies, hidden):
            policy.zero_grad()
            states[mask].square().sum().backward()
        trunks = [policy.language_model.base_model for policy in policies]
        grads = zip(*[[p.grad for p in trunk.parameters()] for trunk in trunks])
        for one, other in [(hidden[0][mask], hidden[1][mask]), *grads]:
            errors.append(((one - other).abs().max() / one.abs().max().clamp(min=1)).item())
from torch._dynamo.utils import counters
print(json.dumps([max(errors), counters["stats"]["unique_graphs"]]))
"""


@pytest.mark.soak
def test_compiled_passes_give_the_same(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    error, graphs = json.loads(done.stdout)
    assert error < 1e-5
    assert graphs >= 4
