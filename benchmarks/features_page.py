"""Fills the tables of docs/features.md from vllm_longmamba/commands/features.toml.

    python benchmarks/features_page.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; whatever was there is replaced.
"""

import re
from pathlib import Path

from vllm_longmamba.commands.features import FAMILIES, Feature, read_features
from vllm_longmamba.evaluate.markdown import table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "features.md"
BLOCK = re.compile(r"(<!-- table: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, features: list[Feature]) -> str:
    """The page with its tables written anew."""
    tables = {"matrix": matrix(features), "tests": tests(features)}
    return BLOCK.sub(lambda block: f"{block[1]}\n{tables[block[2]]}\n\n{block[3]}", page)


def matrix(features: list[Feature]) -> str:
    """Feature, one column a family, remark."""
    rows = [
        [feature.name, *(feature.entries[family].words for family in FAMILIES), feature.note] for feature in features
    ]
    return table(["feature", *FAMILIES.values(), "remark"], rows, "---")


def tests(features: list[Feature]) -> str:
    """The tests behind each row, one of several families only once."""
    rows = []
    for feature in features:
        named = dict.fromkeys(entry.test for entry in feature.entries.values() if entry.test is not None)
        if named:
            rows.append([feature.name, "<br>".join(f"`{test}`" for test in named)])
    return table(["feature", "tests"], rows, "---")


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(), read_features()))
