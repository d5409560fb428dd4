"""A stub server, the tokenizer of the example model, and jobs in this process."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from example_modules import load_example
from rich.console import Console

from vllm_longmamba.summarize.job import run_job
from vllm_longmamba.summarize.settings import JobSettings

from .documents import stored_rows, write_jsonl
from .stub_server import StubServer

EXAMPLE_MODEL = Path(__file__).resolve().parent.parent.parent / "examples" / "passkey-mamba2-4m"


@pytest.fixture
def server() -> Iterator[StubServer]:
    """A server that answers at once."""
    with StubServer() as server:
        yield server


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token a byte."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EXAMPLE_MODEL)


class Job:
    """Runs jobs against a server, in a folder; keyword arguments are those of `JobSettings`.

    Attributes:
        said: what the last one printed.
    """

    def __init__(self, folder: Path, server: StubServer) -> None:
        self.folder = folder
        self.server = server
        self.said = ""

    def __call__(self, *inputs: Path, output: str = "out.jsonl", **settings: Any) -> int:
        """Run one job; its exit code."""
        text = io.StringIO()
        common = {"base_url": self.server.url, "prompt_kind": "base"}
        given = tuple(map(str, inputs)) or (str(self.folder / "in"),)
        try:
            return run_job(
                JobSettings(inputs=given, output=self.folder / output, **(common | settings)),
                Console(file=text, width=200),
            )
        finally:
            self.said = text.getvalue()

    def rows(self, output: str = "out.jsonl") -> list[dict[str, Any]]:
        """The rows of an output."""
        path = self.folder / output
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
            return found
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def stored(self, output: str = "out.jsonl") -> dict[str, Any]:
        """The same of the store beside an output."""
        return answers_of(stored_rows(self.folder / output))

    def answers(self, output: str = "out.jsonl") -> dict[str, Any]:
        """Summary or error of each id; no id may come twice."""
        return answers_of(self.rows(output))


def answers_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Summary or error of each id; no id may come twice."""
    found = {row["id"]: row["error"] or row["summary"] for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture
def job(tmp_path: Path, server: StubServer) -> Callable[..., int]:
    """A `Job` in a folder of its own."""
    return Job(tmp_path, server)


@pytest.fixture
def documents(tmp_path: Path) -> dict[str, str]:
    """Keys of documents in the folder's inputs that hide a pass key; one more is longer than 4096 tokens."""
    passkey = load_example("passkey")
    tasks = passkey.passkey_tasks(passkey.read_haystack(), [500, 1500], [0.5], trials=6, seed=1)
    rows = [
        {"id": str(number), "text": task.prompt.removesuffix(passkey.QUESTION)} for number, task in enumerate(tasks)
    ]
    write_jsonl(tmp_path / "in" / "rows.jsonl", [*rows, {"id": "long", "text": passkey.read_haystack()[:9000]}])
    return {str(number): task.key for number, task in enumerate(tasks)}
