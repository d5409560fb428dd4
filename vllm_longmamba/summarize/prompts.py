"""Makes the prompt of a document."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_longmamba.summarize.records import RecordError

CHAT_INSTRUCTION = "Summarize the document above."
BASE_INSTRUCTION = "TL;DR:"
_CONTENT = "{{ document }}\n\n{{ instruction }}"
_MARK = "\ufdd0document\ufdd1"


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        text: the whole prompt, a chat template applied where there is one.
        content: the message of the user: the same without a chat template.
        token_ids: tokens of `text`; None where no tokenizer is at hand.
    """

    text: str
    content: str
    token_ids: list[int] | None


class PromptMaker:
    """Prompts of one job.

    A base model gets the document and then the instruction; a chat model gets the same as the message of the user.

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

        self.chat = chat
        self.tokenizer = tokenizer
        self._instruction = instruction or (CHAT_INSTRUCTION if chat else BASE_INSTRUCTION)
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
        content = self._render(document)
        text = self._with_chat_template(content) if self.chat and self.tokenizer is not None else content
        return Prompt(text, content, self._token_ids(text))

    def with_instruction(self, instruction: str | None) -> "PromptMaker":
        """The same prompts with another instruction, where one is given."""
        if instruction is None:
            return self
        other = object.__new__(PromptMaker)
        other.__dict__ = self.__dict__ | {"_instruction": instruction}
        return other

    def _render(self, document: str) -> str:
        try:
            return self._template.render(document=document, instruction=self._instruction)
        except Exception as error:
            raise RecordError("template", f"{type(error).__name__}: {error}") from None

    def _with_chat_template(self, content: str) -> str:
        messages = [{"role": "user", "content": content}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _token_ids(self, text: str) -> list[int] | None:
        if self.tokenizer is None:
            return None
        # A chat template writes its special tokens itself.
        return list(self.tokenizer.encode(text, add_special_tokens=not self.chat))


def read_template(path: Path | None) -> str | None:
    """The source of a template file.

    Raises:
        ValueError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--template {path}: {error}") from None


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer comes with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))
