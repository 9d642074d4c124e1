"""A row of a file as a preference pair, and a pair as a row, in TRL's formats: prompt and answers
as texts or as lists of messages, the prompt in its own column or as what both answers begin with.

Refuses an ambiguous row, naming its place and the field.
"""

import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.conversations import ANSWERS, read_message
from rlhf_exp.tasks.protocol import Conversation, Pair
from rlhf_exp.tasks.text_files import check_unicode

TEXTS, REWARDS = ("prompt", "chosen", "rejected"), ("chosen_reward", "rejected_reward")


def read_pair(row: Mapping[str, Any], where: str) -> Pair:
    """The row as a pair. Raises ConfigError that begins with `where` and names the field of a
    malformed row."""
    for name in TEXTS:
        # Without a column prompt, the answers hold the prompts.
        if row.get(name) is None and (name != "prompt" or name in row):
            raise ConfigError(
                f"{where} has no field {name}: pairs need {', '.join(TEXTS)}; it has"
                f" {', '.join(key for key in row if row[key] is not None) or 'none'}"
            )
    are_messages = isinstance(row["chosen"], list) and isinstance(row["rejected"], list)
    prompt, chosen, rejected = (_from_messages if are_messages else _from_texts)(row, where)
    if chosen == rejected:
        raise ConfigError(
            f"{where}, field rejected equals chosen: two equal texts have no order; remove the row"
        )
    chosen_reward, rejected_reward = _rewards(row, where) or (None, None)
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_reward=chosen_reward,
        rejected_reward=rejected_reward,
        chosen_ended=_ended(row, "chosen_ended", where),
        rejected_ended=_ended(row, "rejected_ended", where),
    )


def pair_row(pair: Pair) -> dict[str, Any]:
    """The pair as a row with a column for each of its fields; the answers to a conversation are
    lists of one message."""
    row = pair._asdict()
    if isinstance(pair.prompt, str):
        return row
    answers = {name: [{"role": ANSWERS, "content": row[name]}] for name in ("chosen", "rejected")}
    return row | answers


def _from_texts(row: Mapping[str, Any], where: str) -> tuple[str, str, str]:
    for name in TEXTS:
        if not isinstance(row.get(name, ""), str):
            raise _mixed(row, name, where)
        check_unicode(row.get(name, ""), f"{where}, field {name}")
    if "prompt" not in row:
        end = shared_prompt_end(row["chosen"], row["rejected"])
        if not row["chosen"][:end].strip():
            raise ConfigError(
                f"{where} has no field prompt, and chosen and rejected begin with no common text:"
                " add a column prompt"
            )
        return row["chosen"][:end], row["chosen"][end:], row["rejected"][end:]
    if not row["prompt"].strip():
        raise ConfigError(f"{where}, field prompt is blank: fill it in or remove the row")
    return row["prompt"], row["chosen"], row["rejected"]


def shared_prompt_end(chosen: str, rejected: str) -> int:
    """The length of the prompt that two texts begin with: their common beginning, without a space
    at its end.

    As `extract_prompt` of TRL 1.12, but the prompt does not end within a word: TRL tokenizes a
    prompt together with its answer, here they are apart, and the tokens of two parts of a word are
    not those of the word.
    """
    places = enumerate(zip(chosen, rejected, strict=False))
    end = next((i for i, (a, b) in places if a != b), min(len(chosen), len(rejected)))
    shared, following = chosen[:end], chosen[end : end + 1] + rejected[end : end + 1]
    if shared[-1:].strip() and following.strip():  # within a word
        start = end - len(shared.rsplit(maxsplit=1)[-1])
        end = start or end  # a text without spaces is cut where it differs
    return end - 1 if shared[:end].endswith(" ") else end


def _from_messages(row: Mapping[str, Any], where: str) -> tuple[Conversation, str, str]:
    chosen, rejected = (_messages(row, name, where) for name in ("chosen", "rejected"))
    # A text beside whole conversations repeats one of their messages, as in UltraFeedback.
    field = "chosen" if isinstance(row.get("prompt", ""), str) else "prompt"
    if field == "prompt":
        prompt = _messages(row, "prompt", where)
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            if len(answer) != 1:
                raise ConfigError(
                    f"{where}, field {name} holds {len(answer)} messages: give one, the assistant's"
                    " answer, and put earlier ones into prompt; whole conversations need no prompt"
                )
    else:
        prompt = chosen[:-1]
        if rejected[:-1] != prompt:
            raise ConfigError(
                f"{where}, field rejected differs from chosen before the last message: they may"
                " differ only in the last one, the assistant's answer; cut both behind the first"
                " answer that differs"
            )
    if not prompt or not prompt[-1]["content"].strip() or prompt[-1]["role"] == ANSWERS:
        before = reprlib.repr(prompt[-1]) if prompt else "nothing"
        raise ConfigError(
            f"{where}, field {field}: before the answer stands {before}; give a message that is"
            f" not blank, and not of {ANSWERS}"
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[-1]["role"] != ANSWERS:
            raise ConfigError(
                f"{where}, field {name} ends with a message of {answer[-1]['role']}: the answer"
                f" must be a message of {ANSWERS}"
            )
    return prompt, chosen[-1]["content"], rejected[-1]["content"]


def _messages(row: Mapping[str, Any], name: str, where: str) -> list[dict[str, str]]:
    if not isinstance(row[name], list):
        raise _mixed(row, name, where)
    return [read_message(message, f"{where}, field {name}") for message in row[name]]


def _mixed(row: Mapping[str, Any], name: str, where: str) -> ConfigError:
    return ConfigError(
        f"{where}, field {name} is a {type(row[name]).__name__}: give prompt, chosen and rejected"
        " all as texts, or all as lists of messages"
    )


def _rewards(row: Mapping[str, Any], where: str) -> tuple[float, float] | None:
    """Both rewards, None if the row has neither."""
    values = [row.get(name) for name in REWARDS]
    if values == [None, None]:
        return None
    for name, value in zip(REWARDS, values, strict=True):
        if value is None:
            raise ConfigError(f"{where} has one reward but no {name}: give both")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) < sys.float_info.max:  # false for NaN too
            raise ConfigError(
                f"{where}, field {name} is {reprlib.repr(value)}: give a finite number"
            )
    chosen, rejected = (float(value) for value in values if value is not None)
    if chosen <= rejected:
        raise ConfigError(
            f"{where}, field chosen_reward is {chosen:g}, not above rejected_reward {rejected:g}:"
            " swap the answers, or remove a tie"
        )
    return chosen, rejected


def _ended(row: Mapping[str, Any], name: str, where: str) -> bool:
    value = row.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{where}, field {name} is {value!r}: give true or false")
    return value is None or value
