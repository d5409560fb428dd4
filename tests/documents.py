"""The commands, Python snippets and links of README, CONTRIBUTING and docs/."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Blocks of these languages hold commands; others are settings, logs or data.
SHELL = ("", "bash", "sh", "console")
_BLOCK = re.compile(
    r"^```(?P<language>[a-z]*)\n(?P<fenced>(?s:.*?))^```$|(?<=\n\n)(?P<indented>(?:    .*\n|\n(?=    ))+)",
    re.MULTILINE,
)
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_PROGRAMS = ("bash", "docker", "longmamba", "make", "mkdocs", "pip", "python", "python3", "vllm")
_SETTING = re.compile(r"[A-Z_0-9]+=\S*$")
_HUB = re.compile(r"(?:state-spaces|tiiuae|Zyphra|ai21labs|nvidia|ibm-granite)/")
_PLACEHOLDER = re.compile(r"[A-Z]{3,}(?:[|_][A-Z]+)*|.*\.\.\..*|(?:books|reports|notes)/.*|.*-longmamba")


@dataclass(frozen=True)
class Command:
    """One command of a page.

    Attributes:
        page: file name.
        words: as a shell splits it, without comments and without settings of variables before the program.
    """

    page: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """For messages."""
        return f"{self.page}: {shlex.join(self.words)}"

    @property
    def is_concrete(self) -> bool:
        """Whether it runs as it is in a clone: it names no placeholder and no model of a hub."""
        return not any(_HUB.match(word) or _PLACEHOLDER.fullmatch(word) for word in self.words[1:])


@dataclass(frozen=True)
class Snippet:
    """Python code of a page: a block with those before it, on which it builds."""

    page: str
    code: str

    @property
    def text(self) -> str:
        """For messages."""
        return f"{self.page}: {self.code}"


def steps(page: Path) -> list[Command | Snippet]:
    """Commands and snippets of a page in their order."""
    found: list[Command | Snippet] = []
    code = ""
    for language, block in _blocks(page):
        if language == "python":
            code += block
            found.append(Snippet(page.name, code))
        elif language in SHELL:
            found += _commands(block, page.name)
    return found


def all_commands(program: str) -> list[Command]:
    """The commands of all pages that start a program."""
    every = [step for page in PAGES for step in steps(page)]
    return [step for step in every if isinstance(step, Command) and step.words[0] == program]


def links(page: Path) -> list[str]:
    """Targets of a page's links; code is left out."""
    text = re.sub(r"`[^`\n]*`", "", _BLOCK.sub("", "\n" + page.read_text()))
    return [match["target"] for match in _LINK.finditer(text)]


def _blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, content) of each code block; indented ones have the language ""."""
    for match in _BLOCK.finditer("\n" + page.read_text()):
        if match["indented"] is None:
            yield match["language"], match["fenced"]
        else:
            yield "", re.sub(r"^    ", "", match["indented"], flags=re.MULTILINE)


def _commands(block: str, page: str) -> Iterator[Command]:
    for line in block.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        while words and _SETTING.match(words[0]):
            words = words[1:]
        if words and words[0] in _PROGRAMS:
            yield Command(page, tuple(words))
