"""Loads tasks through lm-eval's `TaskManager`, one length at a time, and builds their prompts."""

import importlib.util
import io
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from vllm_longmamba.evaluate.harness.benchmarks import Benchmark

# Where a task's data come from, for those that download them: what to give instead.
_ADVICE = {
    "niah_single_2": "--essays FILE_OR_FOLDER (text for the haystack)",
    "niah_single_3": "--essays FILE_OR_FOLDER (text for the haystack)",
    "niah_multikey_1": "--essays FILE_OR_FOLDER (text for the haystack)",
    "niah_multivalue": "--essays FILE_OR_FOLDER (text for the haystack)",
    "niah_multiquery": "--essays FILE_OR_FOLDER (text for the haystack)",
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
        metric: the task's metric that counts.
        loaded: lm-eval's task object.
    """

    task: str
    length: int | None
    metric: str
    loaded: Any

    @property
    def full_name(self) -> str:
        """lm-eval's name of the task."""
        return str(self.loaded.task_name)

    @cached_property
    def prompts(self) -> dict[int, str]:
        """Prompts by number of the document."""
        return {instance.doc_id: instance.args[0] for instance in self.loaded.instances}

    @property
    def room(self) -> int:
        """Tokens that may be generated."""
        return int(self.loaded.config.generation_kwargs["max_gen_toks"])

    def identity(self, document: int) -> dict[str, Any]:
        """What tells a prompt's result from all others; a digest stands for the prompt, and how it is answered."""
        asked = [self.prompts[document], self.loaded.config.generation_kwargs, self.loaded.VERSION]
        digest = blake3(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        return {"task": self.full_name, "length": self.length, "document": document, "prompt": digest}


def require(benchmark: Benchmark) -> None:
    """Check that lm-eval and what the benchmark's tasks import are installed.

    Raises:
        ValueError: something is missing.
    """
    if missing := [name for name in ("lm_eval", *benchmark.modules) if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{', '.join(missing)} not installed; run pip install 'vllm-longmamba[lm-eval]'")


def load_cells(
    benchmark: Benchmark,
    tasks: Iterable[str],
    lengths: Iterable[int],
    tokenizer: str,
    seed: int,
    limit: int | None,
    overrides: Mapping[str, Mapping[str, Any]],
) -> list[Cell]:
    """Load tasks and build their prompts.

    Args:
        benchmark: what the tasks are of.
        tasks: short names.
        lengths: tokens of the prompts, answers included; for a benchmark without lengths, nothing.
        tokenizer: name or folder; RULER makes its prompts with it.
        seed: of RULER's prompts. Which other tasks are loaded does not change them.
        limit: at most so many prompts of each task and length, the first ones.
        overrides: lm-eval's name of a task -> changes of its configuration.

    Raises:
        ValueError: data that are not there, or a length that is too short.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.tasks.__file__).parent / benchmark.folder
    cells = []
    every: list[int | None] = [*lengths] or [None]
    for length in every:
        metadata = {"tokenizer": tokenizer} | ({"max_seq_lengths": [length]} if length is not None else {})
        manager = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
        metric = benchmark.metric(length)
        for task in tasks:
            name = benchmark.tasks[task]
            if length is not None:
                check_length(name, length, tokenizer)
            # RULER knows metrics of powers of two only.
            counted = {"metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]}
            random.seed(seed)
            np.random.seed(seed)
            with _data_errors(name, length), redirect_stdout(io.StringIO()):
                changed = {"task": name, **counted, **overrides.get(name, {})}
                # Changes of a registered task go through a group.
                loaded = manager.load([{"group": benchmark.name, "task": [changed]}])["tasks"][name]
                loaded.build_all_requests(limit=limit)
            cells.append(Cell(task, length, metric, loaded))
    return cells


def check_length(task: str, length: int, tokenizer: str) -> None:
    """Refuse what two generators of lm-eval would try for ever: a length that not even their smallest prompt fits.

    Args:
        task: lm-eval's name.
        length: tokens.
        tokenizer: name or folder.

    Raises:
        ValueError: the length is too short, or the tokenizer too fine for the example that ruler_vt begins with.
    """
    if task not in ("ruler_vt", "ruler_cwe"):
        return
    from lm_eval.tasks.ruler import cwe_utils, vt_utils
    from lm_eval.tasks.ruler.common_utils import get_tokenizer

    encode = get_tokenizer(tokenizer)

    def tokens(text: str) -> int:
        # Random words are not always of the same length.
        return int(1.1 * len(encode(text).input_ids))

    if task == "ruler_cwe":
        _, smallest, _ = cwe_utils.generate_input_output(_SMALLEST_UNITS, length)
        needed = tokens(smallest) + _ROOM[task]
    else:
        example = tokens(vt_utils.generate_input_output(_VT_EXAMPLE_UNITS, 1, 4, is_icl=True)[0])
        if example + _ROOM[task] > _VT_EXAMPLE_LENGTH:
            raise ValueError(
                f"{task}: its example must fit {_VT_EXAMPLE_LENGTH} tokens, but takes {example + _ROOM[task]} with "
                "this tokenizer; leave the task out (--tasks)"
            )
        needed = tokens(vt_utils.generate_input_output(_SMALLEST_UNITS, 1, 4)[0]) + example + _ROOM[task]
    if needed > length:
        raise ValueError(
            f"{task}: a length of {length} tokens is too short for its smallest prompt, about {needed} with this "
            "tokenizer; raise --lengths, or leave the task out (--tasks)"
        )


def longest(cells: Iterable[Cell], tokenizer: str, trust_remote_code: bool) -> int:
    """Tokens of the longest prompt with its answer: what the engine's `max_model_len` must be."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
    return max(
        max(len(tokens) for tokens in encode(list(cell.prompts.values())).input_ids) + cell.room for cell in cells
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
