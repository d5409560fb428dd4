"""What is run of lm-eval: the tasks of the paper's tables (LongMamba, arXiv 2504.16053), and how they are scored."""

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_longmamba.evaluate.terminal import read_names


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of lm-eval.

    Attributes:
        name: the command, "ruler" or "longbench-e".
        title: in reports.
        folder: of its tasks in lm-eval (lm_eval/tasks/).
        tasks: short name -> lm-eval's name; the first `in_tables` of them are those of the paper's tables.
        in_tables: how many.
        modules: what its tasks import, besides lm-eval itself.
    """

    name: str
    title: str
    folder: str
    tasks: Mapping[str, str]
    in_tables: int
    modules: tuple[str, ...]

    def chosen(self, names: str | None) -> list[str]:
        """Short names of the tasks the user asked for; those of the paper's tables where nothing was asked.

        Args:
            names: short names or lm-eval's, separated by commas, or None.

        Raises:
            ValueError: an unknown name, or one that comes twice.
        """
        if names is None:
            return list(self.tasks)[: self.in_tables]
        short = {full: name for name, full in self.tasks.items()}
        wanted = [short.get(name.strip(), name) for name in names.split(",")]
        return read_names("--tasks", ",".join(wanted), self.tasks)


# Names as in the paper's table; MK2 and MK3 are RULER's, but not in that table.
RULER = Benchmark(
    name="ruler",
    title="RULER",
    folder="ruler",
    tasks={
        "S1": "niah_single_1",
        "S2": "niah_single_2",
        "S3": "niah_single_3",
        "MK1": "niah_multikey_1",
        "MV": "niah_multivalue",
        "MQ": "niah_multiquery",
        "VT": "ruler_vt",
        "CWE": "ruler_cwe",
        "FWE": "ruler_fwe",
        "QA1": "ruler_qa_squad",
        "QA2": "ruler_qa_hotpot",
        "MK2": "niah_multikey_2",
        "MK3": "niah_multikey_3",
    },
    in_tables=11,
    modules=("nltk", "wonderwords", "scipy"),
)

# The 13 sets of the E split. lm-eval's own group longbench_e leaves out summarization and the synthetic tasks.
_LONGBENCH_E = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip
LONGBENCH_E = Benchmark(
    name="longbench-e",
    title="LongBench-E",
    folder="longbench",
    tasks={name: f"longbench_{name}_e" for name in _LONGBENCH_E},
    in_tables=len(_LONGBENCH_E),
    modules=("jieba", "fuzzywuzzy", "rouge"),
)
