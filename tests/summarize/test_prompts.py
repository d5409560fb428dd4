"""Prompts, and what is done with documents that are too long for one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_longmamba.summarize.answering import Answerer, make_answerer
from vllm_longmamba.summarize.fitting import room_of, sections, truncated
from vllm_longmamba.summarize.prompts import Prompt, PromptMaker
from vllm_longmamba.summarize.records import RecordError
from vllm_longmamba.summarize.settings import Fit, JobSettings

TEXT = "First paragraph, one sentence. And another one!\n\nSecond paragraph; it is longer than the first. " * 20


def maker(tokenizer: Any = None, instruction: str | None = "Q:", template: str | None = None) -> PromptMaker:
    return PromptMaker(False, instruction, template, tokenizer)


def test_base_prompts(tokenizer: Any) -> None:
    prompt = PromptMaker(False, None, None, tokenizer).prompt("A text {{ x }}.")
    assert prompt.text == prompt.content == "A text {{ x }}.\n\nTL;DR:"
    assert prompt.token_ids == list(prompt.text.encode())
    prompt = PromptMaker(False, "Who?", None, None).prompt("A text.")
    assert (prompt.text, prompt.token_ids) == ("A text.\n\nWho?", None)


def test_chat_prompts(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tokenizer has a chat template and nobody says otherwise."""
    settings = JobSettings(inputs=["in"], output=Path("out.jsonl"), model="m")
    assert not make_answerer(settings, tokenizer, None).maker.chat
    with pytest.raises(ValueError, match="--prompt chat: the tokenizer of m has no chat template"):
        make_answerer(replace(settings, prompt_kind="chat"), tokenizer, None)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert not make_answerer(replace(settings, prompt_kind="base"), tokenizer, None).maker.chat
    prompt = make_answerer(settings, tokenizer, None).maker.prompt("A text.")
    assert prompt.chat
    assert prompt.content == "A text.\n\nSummarize the document above."
    assert prompt.text == f"[user]{prompt.content}[assistant]"
    assert prompt.token_ids == list(prompt.text.encode())


def test_templates() -> None:
    source = "{{ instruction }}\n<doc>{{ document }}</doc>\n"
    assert maker(template=source).prompt("x").text == "Q:\n<doc>x</doc>\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ document", "--template: "),
        ("{{ instruction }}", "must print {{ document }}"),
        ("{{ document.missing.name }}", "--template: template: UndefinedError"),
    ],
)
def test_wrong_templates(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        maker(template=template)


def test_a_template_cannot_reach_the_machine() -> None:
    with pytest.raises(ValueError, match="SecurityError"):
        maker(template="{{ document }}{{ document.__class__.__mro__ }}")


def test_another_instruction(tokenizer: Any) -> None:
    first = maker(tokenizer)
    assert first.with_instruction(None).prompt("x") == first.prompt("x")
    assert first.with_instruction("R:").prompt("x").text == "x\n\nR:"
    assert first.prompt("x").text == "x\n\nQ:"


def test_room(tokenizer: Any) -> None:
    assert room_of(maker(tokenizer), 100) == 100 - len("\n\nQ:") - 4
    with pytest.raises(ValueError, match="the instruction alone takes 4 tokens"):
        room_of(maker(tokenizer), 8)


def test_too_long(tokenizer: Any) -> None:
    def fits(prompt: Prompt, limit: int | None) -> bool:
        return Answerer(maker(tokenizer), Fit(), 1, limit).fits(prompt)

    prompt = maker(tokenizer).prompt("x" * 6)
    assert [fits(prompt, limit) for limit in (9, 10, None)] == [False, True, True]
    assert fits(maker().prompt("x" * 6), 9)


@pytest.mark.parametrize("text", [TEXT, "é" * 1500, "\u6f22\u5b57" * 500], ids=["ASCII", "two bytes", "three bytes"])
@pytest.mark.parametrize("drop", ["end", "middle"])
@pytest.mark.parametrize("limit", [40, 333])
def test_truncated(tokenizer: Any, text: str, drop: str, limit: int) -> None:
    prompt, dropped = truncated(maker(tokenizer), text, limit, drop)
    kept = prompt.text.removesuffix("\n\nQ:")
    tokens = len(prompt.token_ids or [])
    assert limit - 12 <= tokens <= limit
    if drop == "end":
        assert text.startswith(kept)
    else:
        head = next(size for size in range(len(kept), -1, -1) if text.startswith(kept[:size]))
        assert text.endswith(kept[head:])
        assert 0.3 < head / len(kept) < 0.7 or text.count(text[:2]) > 100
    assert dropped == len(text.encode()) - len(kept.encode())


@pytest.mark.parametrize("limit", [60, 200, 1000])
def test_sections(tokenizer: Any, limit: int) -> None:
    found = list(sections(maker(tokenizer), TEXT, limit))
    assert "".join(found) == TEXT
    lengths = [len(maker(tokenizer).prompt(section).token_ids or []) for section in found]
    assert max(lengths) <= limit
    assert min(lengths) > limit / 5
    if limit >= 200:
        assert all(section.endswith("\n\n") for section in found[:-1])


def test_sections_without_a_border(tokenizer: Any) -> None:
    for text in ("x" * 1000, "\u6f22" * 400):
        found = list(sections(maker(tokenizer), text, 100))
        assert "".join(found) == text
        assert max(len(section.encode()) for section in found) <= 100 - 4


def test_nothing_fits(tokenizer: Any) -> None:
    grows = "{{ document }}{{ 'x' * document | length }}{{ instruction }}"
    with pytest.raises(RecordError, match="too long: "):
        truncated(maker(tokenizer, template=grows + "{{ 'y' * 50 if document else '' }}"), TEXT, 30, "end")


def test_spans(tokenizer: Any) -> None:
    assert maker(tokenizer).spans("aé") == [(0, 1), (1, 2), (1, 2)]
