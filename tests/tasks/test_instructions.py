from rlhf_exp.tasks.instructions import Instructions
from rlhf_exp.tasks.protocol import PromptRow, Task


def content(row: PromptRow) -> str:
    [message] = row.prompt
    assert message["role"] == "user"
    return message["content"]


def test_each_instruction_ends_with_the_rule_and_none_is_on_both_sides() -> None:
    task = Instructions(rule="Answer in one word.")
    assert isinstance(task, Task)
    train, held_out = (
        [*map(content, rows)] for rows in (task.train_prompts(), task.eval_prompts())
    )
    assert (len(train), len(held_out)) == (64, 16)
    assert len({*train, *held_out}) == 80
    assert all(text.endswith(". Answer in one word.") for text in train + held_out)
    assert train[0] == "Explain why leaves are green. Answer in one word."
    assert task.prepend_bos is None
