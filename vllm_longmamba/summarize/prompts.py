"""Makes the prompt of a document."""

from copy import copy
from dataclasses import dataclass
from typing import Any

from vllm_longmamba.summarize.records import RecordError

_CHAT_INSTRUCTION = "Summarize the document above."
_BASE_INSTRUCTION = "TL;DR:"
_CONTENT = "{{ document }}\n\n{{ instruction }}"
_MARK = "\ufdd0document\ufdd1"


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        text: the whole prompt, a chat template applied where there is one.
        content: the message of the user: the same without a chat template.
        token_ids: tokens of `text`; None where no tokenizer is at hand.
        chat: whether a server gets `content` as a message, and not `text`.
    """

    text: str
    content: str
    token_ids: list[int] | None
    chat: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens; 0 where nobody can tell."""
        return len(self.token_ids or [])


class PromptMaker:
    """Prompts of one job: the document and then the instruction, for a chat model as the message of the user.

    Args:
        chat: whether the model gets messages.
        instruction: what to do with the document; None asks for a summary.
        template: Jinja source for the content instead, with the variables `document` and `instruction`.
        tokenizer: the model's, or None where nobody counts tokens.

    Raises:
        ValueError: the template is wrong or leaves the document out.
    """

    def __init__(self, chat: bool, instruction: str | None, template: str | None, tokenizer: Any) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import SandboxedEnvironment

        self.chat, self.tokenizer = chat, tokenizer
        self._instruction = instruction or (_CHAT_INSTRUCTION if chat else _BASE_INSTRUCTION)
        try:
            self._template = SandboxedEnvironment(keep_trailing_newline=True).from_string(template or _CONTENT)
            rendered = self._render(_MARK)
        except (TemplateError, RecordError) as error:
            raise ValueError(f"--template: {error}") from None
        if _MARK not in rendered:
            raise ValueError("--template: it must print {{ document }}, and the text it gives for a document has none")

    def prompt(self, document: str) -> Prompt:
        """The prompt of a document.

        Raises:
            RecordError: the template fails on it.
        """
        text = content = self._render(document)
        if self.tokenizer is None:
            return Prompt(text, content, None, self.chat)
        if self.chat:
            messages = [{"role": "user", "content": content}]
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        # A chat template writes its special tokens itself.
        return Prompt(text, content, list(self.tokenizer.encode(text, add_special_tokens=not self.chat)), self.chat)

    def with_instruction(self, instruction: str | None) -> "PromptMaker":
        """The same prompts with another instruction, where one is given."""
        other = copy(self)
        other._instruction = instruction or self._instruction
        return other

    def spans(self, document: str) -> list[tuple[int, int]]:
        """First and last character (exclusive) of each token of a text; needs a fast tokenizer."""
        encoded = self.tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["offset_mapping"])

    def _render(self, document: str) -> str:
        try:
            return self._template.render(document=document, instruction=self._instruction)
        except Exception as error:
            raise RecordError("template", f"{type(error).__name__}: {error}") from None
