"""A conversation with a saved model, its answers printed as they are sampled."""

import sys
from pathlib import Path

import torch

from rlhf_exp.models.cache import context_len
from rlhf_exp.models.loading import load_language_model
from rlhf_exp.security.printable import printable
from rlhf_exp.settings import ConfigError
from rlhf_exp.tasks.encoding import encode, leading_ids
from rlhf_exp.tasks.prompts import render


class Talk:
    """A model and its conversation. Without a chat template there is no memory: each text is
    continued by itself, after BOS if `prepend_bos` (None: if the tokenizer adds one)."""

    def __init__(
        self,
        model: str | Path,
        *,
        temperature: float,
        seed: int,
        prepend_bos: bool | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if not temperature >= 0:  # NaN too
            raise ConfigError(f"--temperature={temperature}: give 0 for greedy, or more")
        self._model, self._tokenizer = load_language_model(
            str(model), field="model", trust_remote_code=trust_remote_code
        )
        self._model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._temperature, self._prepend_bos = temperature, prepend_bos
        self._said: list[dict[str, str]] = []
        torch.manual_seed(seed)

    @property
    def kind(self) -> str:
        """A description of what the model does with a line."""
        if self._tokenizer.chat_template:
            return "a chat: the conversation goes on"
        return "no chat template: each line is continued"

    def take(self, line: str, *, max_new_tokens: int) -> None:
        """Handles a line of the user: resets on /reset, else answers it or prints the error."""
        if line.strip() == "/reset":
            self._said.clear()
            return
        try:
            self.answer(line, max_new_tokens=max_new_tokens)
        except ConfigError as error:  # no room: the user may /reset
            print(f"error: {error}", file=sys.stderr)

    def answer(self, line: str, *, max_new_tokens: int) -> str:
        """The answer, printed while it is sampled. Raises ConfigError if the context is full."""
        from transformers import GenerationConfig, TextStreamer

        ids = self._ids(line)
        room = context_len(self._model) - len(ids)
        if room < 1:
            raise ConfigError(f"the model's context is full ({len(ids)} tokens): /reset")
        eos = self._tokenizer.eos_token_id
        # Replaces the model's own, which may add penalties and stop tokens.
        self._model.generation_config = GenerationConfig(
            do_sample=bool(self._temperature),
            temperature=self._temperature or None,
            top_k=0 if self._temperature else None,
            eos_token_id=eos,
            pad_token_id=eos if self._tokenizer.pad_token_id is None else None,
        )
        tokens = torch.tensor([ids], device=self._model.device)
        streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = _say
        generated = self._model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=min(room, max_new_tokens),
            streamer=streamer,
        )
        text = self._tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True)
        if self._tokenizer.chat_template:
            self._said += [
                {"role": "user", "content": line},
                {"role": "assistant", "content": text},
            ]
        return text

    def _ids(self, line: str) -> list[int]:
        if not self._tokenizer.chat_template:
            bos = leading_ids(self._tokenizer, prepend_bos=self._prepend_bos)
            return bos + encode(self._tokenizer, [line])[0]
        messages = [*self._said, {"role": "user", "content": line}]
        return encode(self._tokenizer, [render(self._tokenizer, messages)])[0]


def _say(text: str, stream_end: bool = False) -> None:
    print(printable(text), end="\n" if stream_end else "", flush=True)
