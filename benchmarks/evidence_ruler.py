"""The prompts of RULER for evidence.py, made by lm-eval's own tasks; where they are asked, lm-eval is not needed.

    python benchmarks/evidence_ruler.py MODEL --essays BOOKS --tasks S1,MV --lengths 2048,8192 -o out/ruler-prompts

Needs `pip install "vllm-longmamba[lm-eval]"`. The lengths are tokens of the model's tokenizer, answers included. Text
in place of Paul Graham's essays keeps this off the network. So does a sentence splitter that knows no abbreviations,
which takes the place of NLTK's where that is not installed; it only decides where between two words a needle may stand.
"""

import argparse
import json
import lzma
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

from support.evidence_texts import read_documents, ruler_file

from vllm_longmamba.evaluate.harness.benchmarks import RULER
from vllm_longmamba.evaluate.harness.tasks import load_cells, ruler_overrides

_PUNKT = ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab")


def provide_splitter(folder: Path) -> None:
    """A sentence splitter in NLTK's format, without any abbreviation, where there is none."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        english = folder / "tokenizers" / "punkt_tab" / "english"
        english.mkdir(parents=True)
        for name in _PUNKT:
            (english / name).write_text("")
        nltk.data.path.append(str(folder))


def main() -> None:
    """Write a file for each task and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name or folder of the tokenizer")
    parser.add_argument("--essays", type=Path, required=True, help="documents for the haystack, .txt or .txt.xz")
    parser.add_argument("--tasks", default="S1,S2,MK1,MV,MQ", help="[%(default)s]")
    parser.add_argument("--lengths", default="2048,4096,8192,16384,32768,65536,131072", help="[%(default)s]")
    parser.add_argument("--limit", type=int, default=100, help="prompts of each [%(default)s]")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/ruler-prompts"), help="[%(default)s]")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        provide_splitter(Path(folder))
        essays = Path(folder) / "essays.txt"
        essays.write_text("\n\n".join(book.text for book in read_documents(options.essays)), encoding="utf-8")
        overrides = ruler_overrides([essays], None, None)
        from lm_eval.tasks.ruler import prepare_niah

        # lm-eval always makes 500; the first ones are the same. Its tasks import this function when they are loaded.
        fewer: Callable[..., object] = partial(_fewer, prepare_niah.generate_samples, options.limit)
        with mock.patch.object(prepare_niah, "generate_samples", fewer):
            for length in map(int, options.lengths.split(",")):
                for task in RULER.chosen(options.tasks):
                    [cell] = load_cells(RULER, [task], [length], options.model, 0, options.limit, overrides)
                    outputs = [document["outputs"] for document in cell.loaded.test_docs()]
                    prompts = [
                        {"prompt": prompt, "outputs": values}
                        for prompt, values in zip(cell.prompts, outputs, strict=False)
                    ]
                    file = ruler_file(options.output, task, length)
                    with lzma.open(file, "wt", encoding="utf-8", preset=1) as content:
                        json.dump(prompts, content)
                    print(f"{file}: {len(prompts)} prompts, {file.stat().st_size} bytes", flush=True)


def _fewer(generate: Callable[..., object], limit: int, *given: object, **settings: object) -> object:
    return generate(*given, **settings | {"num_samples": limit})


if __name__ == "__main__":
    main()
