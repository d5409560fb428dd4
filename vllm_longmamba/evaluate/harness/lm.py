"""A model as lm-eval knows one, answered from the store or by vLLM's engine (imports lm-eval)."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from blake3 import blake3
from lm_eval import evaluate
from lm_eval.api.model import LM

from vllm_longmamba.compatibility import errors_only
from vllm_longmamba.evaluate.engine import EngineContestant, EngineRunner
from vllm_longmamba.evaluate.harness.tasks import Cell
from vllm_longmamba.evaluate.store import Store, settings_key

Scored = tuple[Cell, dict[str, Any]]


class StoredLM(LM):  # type: ignore[misc]
    """Completes prompts; the engine starts for the first one that is not in the store.

    Args:
        method: its name.
        contestant: the model.
        store: takes the answers, and has those of earlier runs.
        begin: shows the progress, see `Comparison.progress`.
        engine: closes what was started.
    """

    def __init__(
        self,
        method: str,
        contestant: EngineContestant,
        store: Store,
        begin: Callable[[str, int], Callable[[], None]],
        engine: ExitStack,
    ) -> None:
        super().__init__()
        self._method, self._contestant, self._store, self._begin = method, contestant, store, begin
        self._key = settings_key(contestant.description)
        self._engine = engine
        self._runner: EngineRunner | None = None

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """See `lm_eval.api.model.LM`. Prompts are never cut: vLLM refuses one that is too long."""
        encoder = self._contestant.encoder
        missing = [request for request in requests if self._identity(request) not in self._store]
        if missing and self._runner is None:
            self._runner = self._engine.enter_context(self._contestant.start())
        if missing:
            assert self._runner is not None
            advance = self._begin(self._method, len(missing))
            jobs = ((one, encoder.encode_prompt(one.args[0]), int(one.args[1]["max_gen_toks"])) for one in missing)
            for request, answer in self._runner.complete(jobs):
                for end in (*_ends(request.args[1]), encoder.end_text):
                    answer = answer.partition(end)[0] if end else answer
                self._store.add(self._identity(request), {"answer": answer})
                advance()
        return [str(self._store.result(self._identity(request))["answer"]) for request in requests]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Not asked by these benchmarks."""
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood

    def _identity(self, request: Any) -> dict[str, Any]:
        # Other lengths, seeds and versions of a task are other prompts.
        digest = blake3(json.dumps(request.args, sort_keys=True).encode()).hexdigest()[:32]
        return {"method": self._method, "settings": self._key, "task": request.task_name, "prompt": digest}


def run_cells(
    contestants: Mapping[str, EngineContestant],
    cells: Sequence[Cell],
    limit: int | None,
    store: Store,
    begin: Callable[[str, int], Callable[[], None]],
) -> dict[str, list[Scored]]:
    """Ask and score with every method, each in an engine of its own, one after the other.

    Returns:
        For each method all cells' results: "score" (0 to 1) and, from LongBench, "words" of the context.
    """
    results: dict[str, list[Scored]] = {method: [] for method in contestants}
    for method, contestant in contestants.items():
        # lm-eval warns of RULER's constant metric "4096", and of LongBench's temperature without sampling.
        with ExitStack() as engine, errors_only("lm_eval"):
            lm = StoredLM(method, contestant, store, begin, engine)
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
