"""A model as lm-eval knows one, answered from the store or by vLLM's engine (imports lm-eval)."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from blake3 import blake3
from lm_eval import evaluate
from lm_eval.api.model import LM

from vllm_longmamba.compatibility import errors_only
from vllm_longmamba.evaluate.comparison import Comparison, Measured, Progress, Run
from vllm_longmamba.evaluate.engine import EngineContestant, EngineRunner
from vllm_longmamba.evaluate.harness.tasks import Cell

Scored = tuple[Cell, dict[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """What lm-eval asks.

    Attributes:
        request: lm-eval's.
    """

    request: Any

    @property
    def identity(self) -> dict[str, Any]:
        """Other lengths, seeds and versions of a task are other prompts."""
        digest = blake3(json.dumps(self.request.args, sort_keys=True).encode()).hexdigest()[:32]
        return {"task": self.request.task_name, "prompt": digest}


class StoredLM(LM):  # type: ignore[misc]
    """Completes prompts; the engine starts for the first one that is not in the store.

    Args:
        contestant: the model.
        run: takes the answers, and has those of earlier runs.
        progress: shows it, see `Comparison`.
        engine: closes what was started.
    """

    def __init__(self, contestant: EngineContestant, run: Run, progress: Progress, engine: ExitStack) -> None:
        super().__init__()
        self._contestant, self._run, self._progress, self._engine = contestant, run, progress, engine
        self._runner: EngineRunner | None = None

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """See `lm_eval.api.model.LM`. Prompts are never cut: vLLM refuses one that is too long."""
        prompts = [Prompt(request) for request in requests]
        if todo := self._run.missing(prompts):
            if self._runner is None:
                self._runner = self._engine.enter_context(self._contestant.start())
            self._run.add(self._complete(self._runner, todo), self._progress(self._run.name, len(todo)))
        return [str(result["answer"]) for _, result in self._run.results(prompts)]

    def _complete(self, runner: EngineRunner, prompts: list[Prompt]) -> Measured:
        encoder = self._contestant.encoder
        asked = ((prompt, *prompt.request.args) for prompt in prompts)
        jobs = ((prompt, encoder.encode_prompt(text), int(how["max_gen_toks"])) for prompt, text, how in asked)
        for prompt, answer in runner.complete(jobs):
            for end in (*_ends(prompt.request.args[1]), encoder.end_text):
                answer = answer.partition(end)[0] if end else answer
            yield prompt, {"answer": answer}

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Not asked by these benchmarks."""
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def run_cells(comparison: Comparison, cells: Sequence[Cell], limit: int | None) -> dict[str, list[Scored]]:
    """Ask and score with every method, each in an engine of its own, one after the other.

    Returns:
        For each method all cells' results: "score" (0 to 1) and, from LongBench, "words" of the context.
    """
    results: dict[str, list[Scored]] = {method: [] for method in comparison.contestants}
    for method, contestant in comparison.contestants.items():
        # lm-eval warns of RULER's constant metric "4096", and of LongBench's temperature without sampling.
        with ExitStack() as engine, errors_only("lm_eval"):
            lm = StoredLM(contestant, comparison.run(method), comparison.progress, engine)
            for length in dict.fromkeys(cell.length for cell in cells):
                own = {cell.loaded.task_name: cell for cell in cells if cell.length == length}
                tasks = {"tasks": {name: cell.loaded for name, cell in own.items()}}
                output = evaluate(lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=0, log_samples=True)
                for name, cell in own.items():
                    results[method] += [(cell, _result(cell, sample)) for sample in output["samples"][name]]
    return results


def _result(cell: Cell, sample: Mapping[str, Any]) -> dict[str, Any]:
    result = {"score": float(sample[cell.metric])}
    # RULER's "length" is in tokens, LongBench's in words.
    return result if cell.length is not None else result | {"words": int(sample["doc"]["length"])}


def _ends(settings: Mapping[str, Any]) -> Sequence[str]:
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else until
