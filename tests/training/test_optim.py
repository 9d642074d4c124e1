import copy
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from rlhf_exp.training.optim import AdamWSettings, clip_gradients, learning_rates


def base() -> nn.Sequential:
    """Two matrices, two vectors and a frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    model[3].requires_grad_(False)
    return model


def head() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(4, 1)


def same(parameters, expected) -> bool:
    return [id(p) for p in parameters] == [id(p) for p in expected]


def test_groups_have_their_names_rates_and_decay():
    trained, on_top = base(), head()
    settings = AdamWSettings(
        base_lr=0.1, head_lr=0.2, beta1=0.3, beta2=0.4, eps=0.5, weight_decay=0.6
    )
    groups = settings.build(trained, on_top).param_groups
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("base", 0.1, 0.6),
        ("base", 0.1, 0.0),
        ("head", 0.2, 0.0),
    ]
    embedding, linear, norm, _ = trained
    assert same(groups[0]["params"], [embedding.weight, linear.weight])
    assert same(groups[1]["params"], [linear.bias, norm.weight, norm.bias])
    assert same(groups[2]["params"], [on_top.weight, on_top.bias])
    assert {(*g["betas"], g["eps"]) for g in groups} == {(0.3, 0.4, 0.5)}


def test_a_head_inside_of_the_base_is_trained_at_the_heads_rate_alone():
    trained = base()
    on_top = trained[1]
    groups = AdamWSettings(base_lr=0.1, head_lr=0.2).build(trained, on_top).param_groups
    assert same(groups[0]["params"], [trained[0].weight])
    assert same(groups[-1]["params"], [on_top.weight, on_top.bias])


def test_without_a_head_there_is_no_group_of_it():
    adamw = AdamWSettings(base_lr=0.1).build(base())
    assert learning_rates(adamw) == {"base": 0.1}


def test_groups_without_parameters_are_left_out():
    assert len(AdamWSettings().build(nn.Embedding(2, 2)).param_groups) == 1


def test_only_matrices_of_the_base_decay():
    trained, on_top = base(), head()
    nn.init.ones_(trained[1].bias)
    before = copy.deepcopy((trained.state_dict(), on_top.state_dict()))
    adamw = AdamWSettings(base_lr=0.1, head_lr=0.1, weight_decay=0.5).build(trained, on_top)
    for parameter in (*trained.parameters(), *on_top.parameters()):
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    adamw.step()
    for name, value in trained.state_dict().items():
        # AdamW with zero gradients multiplies by 1 - lr * weight_decay.
        scale = 0.95 if name in ("0.weight", "1.weight") else 1
        torch.testing.assert_close(value, before[0][name] * scale)
    assert torch.equal(on_top.weight, before[1]["weight"])


def test_a_step_is_adams():
    # m = 0.1 g and v = 0.01 g^2, corrected to g and g^2: the first step is lr g / (|g| + eps).
    trained = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(trained.weight)
    settings = AdamWSettings(base_lr=0.1, beta1=0.9, beta2=0.99, eps=0.5)
    adamw = settings.build(trained)
    steps = [(1.5, -0.5), (-1.0, 2.0)]
    expected = [[0.0, 0.0]]
    moments = [[0.0, 0.0], [0.0, 0.0]]
    for t, gradient in enumerate(steps, 1):
        trained.weight.grad = torch.tensor([gradient])
        adamw.step()
        row = []
        for i, g in enumerate(gradient):
            moments[0][i] = 0.9 * moments[0][i] + 0.1 * g
            moments[1][i] = 0.99 * moments[1][i] + 0.01 * g * g
            m, v = moments[0][i] / (1 - 0.9**t), moments[1][i] / (1 - 0.99**t)
            row.append(expected[-1][i] - 0.1 * m / (math.sqrt(v) + 0.5))
        expected.append(row)
        assert trained.weight.tolist()[0] == pytest.approx(row, rel=1e-5)
    assert expected[1] == pytest.approx([-0.075, 0.05])


def test_steps_are_fused():
    assert AdamWSettings().build(base(), head()).defaults["fused"]


def test_clipping_is_joint_and_norms_are_those_before_it():
    trained, on_top = base(), head()
    twins = copy.deepcopy((trained, on_top))
    adamw = AdamWSettings().build(trained, on_top)
    for models in ((trained, on_top), twins):
        loss = models[1](models[0](torch.arange(5))).square().sum() * 10
        loss.backward()
    expected = {
        name: torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        for name, model in zip(("base", "head"), twins, strict=True)
    }
    total = torch.stack([*expected.values()]).norm()
    assert total > 1
    norms = clip_gradients(adamw, 0.7)
    torch.testing.assert_close(norms, expected)
    together = [*twins[0].parameters(), *twins[1].parameters()]
    torch.testing.assert_close(nn.utils.clip_grad_norm_(together, 0.7), total)
    for mine, theirs in zip((*trained.parameters(), *on_top.parameters()), together, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_gradients_below_the_limit_are_left_alone():
    on_top = head()
    adamw = AdamWSettings().build(base(), on_top)
    on_top.weight.grad = torch.tensor([[0.3, 0.0, 0.4, 0.0]])
    norms = clip_gradients(adamw, 0.6)
    assert norms == {"base": 0.0, "head": pytest.approx(0.5)}
    # Not bitwise: clipping multiplies by min(1, max_norm / (norm + 1e-6)), which is 1 here.
    assert torch.equal(on_top.weight.grad, torch.tensor([[0.3, 0.0, 0.4, 0.0]]))


@pytest.mark.parametrize(
    "field",
    [
        {"base_lr": -1e-4},
        {"head_lr": float("nan")},
        {"beta1": 1.0},
        {"beta2": float("nan")},
        {"beta1": False},
        {"eps": 0.0},
        {"weight_decay": float("inf")},
    ],
)
def test_settings_out_of_range_are_refused(field):
    with pytest.raises(ValidationError, match="1 validation error"):
        AdamWSettings(**field)
