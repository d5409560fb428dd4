"""Loads lm-eval's own tasks, one length at a time, with local copies of what they would download."""

import importlib
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from vllm_longmamba.evaluate.harness.benchmarks import Benchmark
from vllm_longmamba.evaluate.texts import Encoder, read_books

# Changes of lm-eval's tasks, by their names.
Overrides = Mapping[str, Mapping[str, Any]]

_WITH_ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
# Where a task's data come from, for those that download them: what to give instead.
_ADVICE = {
    **dict.fromkeys(_WITH_ESSAYS, "--essays FILE_OR_FOLDER (text for the haystack)"),
    "ruler_qa_squad": "--squad dev-v2.0.json (SQuAD 2.0)",
    "ruler_qa_hotpot": "--hotpot hotpot_dev_distractor_v1.json (HotpotQA)",
}
# lm_eval/tasks/ruler: the fewest sentences or words that the generators begin with, tokens kept for the answer, and
# the example of ruler_vt.
_SMALLEST_UNITS = 10
_VT_EXAMPLE_UNITS = 5
_VT_EXAMPLE_LENGTH = 500
_ROOM = {"ruler_vt": 30, "ruler_cwe": 120}


@dataclass(frozen=True)
class Cell:
    """The prompts of one task and length.

    Attributes:
        task: short name.
        length: tokens that the prompts were made for, answer included; None where the benchmark has no lengths.
        loaded: lm-eval's task object.
    """

    task: str
    length: int | None
    loaded: Any

    @property
    def metric(self) -> str:
        """The metric that counts: RULER names it after the length."""
        return "score" if self.length is None else str(self.length)

    @cached_property
    def prompts(self) -> list[str]:
        """What is asked."""
        return [instance.args[0] for instance in self.loaded.instances]

    def longest(self, encoder: Encoder) -> int:
        """Tokens of the longest prompt with its answer."""
        room = int(self.loaded.config.generation_kwargs["max_gen_toks"])
        return max(len(encoder.encode_prompt(prompt)) for prompt in self.prompts) + room


def load_cells(
    benchmark: Benchmark,
    tasks: Iterable[str],
    lengths: Iterable[int | None],
    tokenizer: str,
    seed: int,
    limit: int | None,
    overrides: Overrides,
) -> list[Cell]:
    """Load tasks and build their prompts.

    Args:
        benchmark: what the tasks are of.
        tasks: short names.
        lengths: tokens of the prompts, answers included; None where the benchmark has no lengths.
        tokenizer: name or folder; RULER makes its prompts with it.
        seed: of RULER's prompts. Which other tasks are loaded does not change them.
        limit: at most so many prompts of each task and length, the first ones.
        overrides: see `ruler_overrides` and `longbench_overrides`.

    Raises:
        ValueError: data that are not there, or a length that is too short.
    """
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / benchmark.folder
    cells = []
    for length in lengths:
        metadata = {"tokenizer": tokenizer} | ({"max_seq_lengths": [length]} if length is not None else {})
        manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
        for task in tasks:
            name = benchmark.tasks[task]
            if length is not None:
                check_length(name, length, tokenizer)
            random.seed(seed)
            np.random.seed(seed)
            with _data_errors(name, length), redirect_stdout(io.StringIO()):
                # Changes of a registered task go through a group.
                changed = {"task": name, **overrides.get(name, {})}
                loaded = manager.load([{"group": benchmark.name, "task": [changed]}])["tasks"][name]
                loaded.build_all_requests(limit=limit)
            cells.append(Cell(task, length, loaded))
    return cells


def ruler_overrides(essays: list[Path] | None, squad: Path | None, hotpot: Path | None) -> Overrides:
    """Let RULER's tasks read local files instead of downloads.

    Args:
        essays: text files or folders of them, in place of Paul Graham's essays from the hub.
        squad: SQuAD's dev-v2.0.json.
        hotpot: HotpotQA's hotpot_dev_distractor_v1.json.
    """
    overrides: dict[str, Mapping[str, Any]] = {}
    if essays:
        words = re.sub(r"\s+", " ", " ".join(book.text for book in read_books(essays))).split(" ")
        for task in _WITH_ESSAYS:
            overrides[task] = {"custom_dataset": _replacing("niah_utils", "get_haystack", lambda **_: words, task)}
    for task, path, function in (("squad", squad, "get_squad"), ("hotpot", hotpot, "get_hotpotqa")):
        if path is not None:
            given = _replacing("qa_utils", "download_json", lambda _, path=path: _read_json(path), function)
            overrides[f"ruler_qa_{task}"] = {"custom_dataset": given}
    return overrides


def _replacing(module: str, name: str, replacement: Callable[..., Any], function: str) -> Callable[..., Any]:
    """lm-eval's function that makes a task's data, with its download replaced."""

    def make_data(**settings: Any) -> Any:
        theirs = importlib.import_module(f"lm_eval.tasks.ruler.{module}")
        for cached in (getattr(theirs, cached, None) for cached in ("read_squad", "read_hotpotqa")):
            if cached is not None:
                cached.cache_clear()
        with mock.patch.object(theirs, name, replacement):
            try:
                return getattr(theirs, function)(**settings)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"the local copy has another format ({error!r}); see docs/lm_eval.md") from error
            except IndexError as error:
                raise ValueError("the local copy must have at least 500 questions, as the original has") from error

    return make_data


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON file ({error}); see docs/lm_eval.md for what it must be") from error


def longbench_overrides(folder: Path, tasks: Mapping[str, str]) -> Overrides:
    """Let LongBench-E's tasks read the hub's files: qasper_e.jsonl and so on, as in LongBench's data.zip.

    Args:
        folder: with the files, or with a folder "data" that has them.
        tasks: short name -> lm-eval's name.

    Raises:
        ValueError: files are missing.
    """
    root = folder / "data" if (folder / "data").is_dir() else folder
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


def check_length(task: str, length: int, tokenizer: str) -> None:
    """Refuse what two generators of lm-eval would try for ever: a length that not even their smallest prompt fits.

    Args:
        task: lm-eval's name.
        length: tokens.
        tokenizer: name or folder.

    Raises:
        ValueError: the length is too short, or the tokenizer too fine for the example that ruler_vt begins with.
    """
    if task not in _ROOM:
        return
    from lm_eval.tasks.ruler import cwe_utils, vt_utils
    from lm_eval.tasks.ruler.common_utils import get_tokenizer

    def tokens(text: str) -> int:
        # Random words are not always of the same length.
        return int(1.1 * len(get_tokenizer(tokenizer)(text).input_ids)) + _ROOM[task]

    if task == "ruler_cwe":
        needed = tokens(cwe_utils.generate_input_output(_SMALLEST_UNITS, length)[1])
    else:
        example = tokens(vt_utils.generate_input_output(_VT_EXAMPLE_UNITS, 1, 4, is_icl=True)[0])
        if example > _VT_EXAMPLE_LENGTH:
            raise ValueError(
                f"{task}: its example must fit {_VT_EXAMPLE_LENGTH} tokens, but takes {example} with this tokenizer; "
                "leave the task out (--tasks)"
            )
        needed = tokens(vt_utils.generate_input_output(_SMALLEST_UNITS, 1, 4)[0]) + example - _ROOM[task]
    if needed > length:
        raise ValueError(
            f"{task}: a length of {length} tokens is too short for its smallest prompt, about {needed} with this "
            "tokenizer; raise --lengths, or leave the task out (--tasks)"
        )


@contextmanager
def _data_errors(task: str, length: int | None) -> Iterator[None]:
    """Say what to give where a download failed. The libraries raise many kinds of errors for that."""
    try:
        yield
    except LookupError as error:
        if "nltk" not in str(error):
            raise
        raise ValueError(
            f"{task}: NLTK's sentence splitter is missing; run python -m nltk.downloader punkt_tab, or copy "
            "nltk_data/tokenizers/punkt_tab from elsewhere (NLTK_DATA names the folder)"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("datasets", "huggingface_hub"):
            advice = _ADVICE.get(task, "--data FOLDER (LongBench's data.zip, unpacked)")
            raise ValueError(f"{task}: its data could not be had ({error}); give a local copy, {advice}") from error
        if isinstance(error, ValueError):
            where = f" at {length} tokens" if length is not None else ""
            raise ValueError(f"{task}{where}: {error}") from error
        raise
