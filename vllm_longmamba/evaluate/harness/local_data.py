"""Local copies of what lm-eval's tasks download, as changes of their configurations."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_longmamba.evaluate.texts import read_books

# What the tasks with essays around the needles give lm-eval's generator (lm_eval/tasks/ruler/niah_utils.py).
ESSAY_NEEDLES: Mapping[str, Mapping[str, Any]] = {
    "niah_single_2": {"type_needle_v": "numbers"},
    "niah_single_3": {"type_needle_v": "uuids"},
    "niah_multikey_1": {"type_needle_v": "numbers", "num_needle_k": 4},
    "niah_multivalue": {"type_needle_v": "numbers", "num_needle_v": 4},
    "niah_multiquery": {"type_needle_v": "numbers", "num_needle_q": 4},
}
_SAMPLES = 500

Overrides = dict[str, dict[str, Any]]


def ruler_overrides(essays: list[Path] | None, squad: Path | None, hotpot: Path | None) -> Overrides:
    """Let RULER's tasks read local files.

    Args:
        essays: text files or folders of them, in place of Paul Graham's essays from the hub.
        squad: SQuAD's dev-v2.0.json.
        hotpot: HotpotQA's hotpot_dev_distractor_v1.json.

    Returns:
        lm-eval's name of a task -> entries of its configuration.

    Raises:
        ValueError: a file is not what it must be.
    """
    overrides: Overrides = {}
    if essays:
        words = re.sub(r"\s+", " ", " ".join(book.text for book in read_books(essays))).split(" ")
        overrides |= {task: {"custom_dataset": _essay_task(words, task)} for task in ESSAY_NEEDLES}
    if squad is not None:
        overrides["ruler_qa_squad"] = {"custom_dataset": _question_task(*read_squad(squad))}
    if hotpot is not None:
        overrides["ruler_qa_hotpot"] = {"custom_dataset": _question_task(*read_hotpot(hotpot))}
    return overrides


def longbench_overrides(folder: Path, tasks: Mapping[str, str]) -> Overrides:
    """Let LongBench-E's tasks read the hub's files: qasper_e.jsonl and so on, as in LongBench's data.zip.

    Args:
        folder: with the files, or with a folder "data" that has them.
        tasks: short name -> lm-eval's name.

    Raises:
        ValueError: files are missing.
    """
    inner = folder / "data"
    root = inner if inner.is_dir() else folder
    files = {name: root / f"{name}_e.jsonl" for name in tasks}
    if missing := [file.name for file in files.values() if not file.is_file()]:
        raise ValueError(
            f"--data {folder}: {', '.join(missing)} missing there; unpack LongBench's data.zip (hub: THUDM/LongBench), "
            "or name only the tasks that you have with --tasks"
        )
    local = {"dataset_path": "json", "dataset_name": None, "process_docs": _as_on_the_hub}
    return {
        task: local | {"dataset_kwargs": {"data_files": {"test": str(files[name])}}} for name, task in tasks.items()
    }


def _as_on_the_hub(documents: Any) -> Any:
    """LongBench's files call "input" what the copy on the hub that lm-eval reads, and its prompts, call "question"."""
    if "question" not in documents.column_names and "input" in documents.column_names:
        documents = documents.rename_column("input", "question")
    if missing := {"context", "question", "answers", "all_classes", "length"} - set(documents.column_names):
        raise ValueError(f"no file of LongBench: the fields {', '.join(sorted(missing))} are missing")
    return documents


def read_squad(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Questions and documents of a file in SQuAD 2.0's format, as lm-eval's `read_squad` makes them of the download.

    Returns:
        Questions that have an answer, and all documents; a question's "context" and "more_context" (others of its
        article) are indices of documents.

    Raises:
        ValueError: another format.
    """
    with _parsed(path, "SQuAD 2.0 (dev-v2.0.json)") as content:
        articles = [article["paragraphs"] for article in content["data"]]
        documents = sorted({paragraph["context"] for article in articles for paragraph in article})
        index = {document: number for number, document in enumerate(documents)}
        questions = [
            {
                "query": question["question"],
                "outputs": [answer["text"] for answer in question["answers"]],
                "context": [index[paragraph["context"]]],
                "more_context": [
                    index[other["context"]] for other in article if other["context"] != paragraph["context"]
                ],
            }
            for article in articles
            for paragraph in article
            for question in paragraph["qas"]
            if not question["is_impossible"]
        ]
    return questions, documents


def read_hotpot(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The same of a file in HotpotQA's format (distractor setting)."""
    with _parsed(path, "HotpotQA (hotpot_dev_distractor_v1.json)") as content:
        contexts = [[f"{title}\n{''.join(lines)}" for title, lines in entry["context"]] for entry in content]
        documents = sorted({document for context in contexts for document in context})
        index = {document: number for number, document in enumerate(documents)}
        questions = [
            {
                "query": entry["question"],
                "outputs": [entry["answer"]],
                "context": [index[document] for document in context],
            }
            for entry, context in zip(content, contexts, strict=True)
        ]
    return questions, documents


@contextmanager
def _parsed(path: Path, name: str) -> Iterator[Any]:
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: must be a file of {name}, but it differs: {error!r}") from error


def _essay_task(words: list[str], task: str) -> Callable[..., Any]:
    def essay_task(**settings: Any) -> Any:
        from lm_eval.tasks.ruler.niah_utils import TEMPLATE
        from lm_eval.tasks.ruler.prepare_niah import generate_samples

        return _test_split(
            generate_samples(
                words,
                max_seq_length=length,
                template=TEMPLATE,
                type_haystack="essay",
                type_needle_k="words",
                num_samples=_SAMPLES,
                TOKENIZER=_tokenizer(settings),
                **ESSAY_NEEDLES[task],
            )
            for length in settings["max_seq_lengths"]
        )

    return essay_task


def _question_task(questions: list[dict[str, Any]], documents: list[str]) -> Callable[..., Any]:
    def question_task(**settings: Any) -> Any:
        from lm_eval.tasks.ruler.qa_utils import generate_samples

        return _test_split(
            generate_samples(
                tokenizer=_tokenizer(settings),
                docs=documents,
                qas=questions,
                num_samples=min(_SAMPLES, len(questions)),
                max_seq_length=length,
            )
            for length in settings["max_seq_lengths"]
        )

    return question_task


def _test_split(samples_of_lengths: Iterable[list[dict[str, Any]]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list([sample for samples in samples_of_lengths for sample in samples])}


def _tokenizer(settings: Mapping[str, Any]) -> Any:
    from lm_eval.tasks.ruler.common_utils import get_tokenizer

    return get_tokenizer(settings["tokenizer"])
