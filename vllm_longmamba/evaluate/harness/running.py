"""Asks a model the prompts that have no answer in the records yet, through lm-eval's `evaluate`."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_longmamba.evaluate.harness.loading import Cell
from vllm_longmamba.evaluate.harness.model import HarnessContestant
from vllm_longmamba.evaluate.records import Records, settings_key

if TYPE_CHECKING:
    from vllm_longmamba.evaluate.harness.strict_vllm import StrictVLLM

Scored = tuple[Cell, dict[str, Any]]


def run_cells(
    contestants: Mapping[str, HarnessContestant],
    cells: Sequence[Cell],
    max_model_len: int,
    records: Records,
    say: Callable[[str], None],
) -> dict[str, list[Scored]]:
    """Run all methods, each in an engine of its own, one after the other.

    Args:
        contestants: by method.
        cells: the prompts.
        max_model_len: tokens of the longest prompt and its answer.
        records: takes the answers, and has those of earlier runs.
        say: told what is going on.

    Returns:
        For each method all cells' results: "score" (0 to 1), "answer", "expected" and, from LongBench, "words" of
        the context.
    """
    results: dict[str, list[Scored]] = {}
    for method, contestant in contestants.items():
        run = {"method": method, "key": settings_key(contestant.description)}

        def missing(cell: Cell, run: Mapping[str, str] = run) -> list[int]:
            return [number for number in sorted(cell.prompts) if {**run, **cell.identity(number)} not in records]

        todo = [(cell, missing(cell)) for cell in cells]
        if any(numbers for _, numbers in todo):
            say(f"{method}: {sum(len(numbers) for _, numbers in todo)} prompts")
            with contestant.start_lm(max_model_len) as lm:
                for cell, numbers in todo:
                    if numbers:
                        at = f" at {cell.length} tokens" if cell.length is not None else ""
                        say(f"{method}: {cell.task}{at}, {len(numbers)} prompts")
                        for number, result in ask(lm, cell, numbers):
                            records.add({**run, **cell.identity(number)}, result)
        results[method] = [
            (cell, records.result({**run, **cell.identity(number)})) for cell in cells for number in cell.prompts
        ]
    return results


def ask(lm: "StrictVLLM", cell: Cell, numbers: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Ask some prompts of a cell.

    Args:
        lm: a started model of lm-eval.
        cell: the prompts.
        numbers: of the documents, at least one, in ascending order (lm-eval goes through them in that order).

    Returns:
        Number and result, as above.
    """
    from lm_eval import evaluate

    name = cell.full_name
    with _quiet():
        output = evaluate(
            lm=lm,
            task_dict={"tasks": {name: cell.loaded}},
            samples={name: list(numbers)},
            bootstrap_iters=0,
            log_samples=True,
        )
    for sample in output["samples"][name]:
        document = sample["doc"]
        result = {
            "score": float(sample[cell.metric]),
            "answer": sample["filtered_resps"][0],
            "expected": document["outputs"] if "outputs" in document else document["answers"],
        }
        # RULER's "length" is in tokens, LongBench's in words.
        if cell.length is None:
            result["words"] = int(document["length"])
        yield sample["doc_id"], result


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's warnings, of RULER's constant metric "4096" and of LongBench's temperature without sampling."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
