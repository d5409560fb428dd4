"""What closed-loop thresholds keep of books, and how far they are from the paper's, each other and interpolated ones.

    python benchmarks/closed_loop_thresholds.py examples/passkey-mamba2-4m --books FOLDER \
        --method closed:theta=0.05,n=3 --lengths 2048 4096 8192 16384 --output out/closed_loop.jsonl

Takes the thresholds that closed_loop_research.py has left beside its output, and measures those that are not there.
`--kept` prints only how the sum of dt that each of the named methods keeps of held-out text (a piece of every book)
compares with the budget, the sum over calibration texts of the training length. All figures are over the global
channels: quantiles (10, 50 and 90 %) of ratios.
"""

from collections.abc import Sequence

import torch
from closed_loop_research import Study, arguments
from support.closed_loop_methods import Keeping
from support.closed_loop_specs import parse

from vllm_longmamba.tables import interpolate_thresholds


def main() -> None:
    """Print the tables."""
    parser = arguments()
    parser.add_argument("--method", default="closed:theta=0.01,n=3")
    parser.add_argument("--kept", nargs="+", default=[], metavar="METHOD", help="such as paper:theta=0.01 closed")
    options = parser.parse_args()
    study = Study(options)
    for length in options.lengths if options.kept else []:
        for method in options.kept:
            print(f"{length}, {method}: kept / budget {_kept(study, method, length)}", flush=True)
    if options.kept:
        return
    _, spec = parse(options.method)
    closed = {length: _flat(study.closed(spec, length)) for length in options.lengths}
    each = {
        length: torch.stack([_flat(study.closed({**spec, "only": number}, length)) for number in range(spec["n"])])
        for length in options.lengths
    }
    for length in options.lengths:
        paper = _flat(study.thresholds("paper", spec, length))
        spread = each[length].amax(0) / each[length].amin(0)
        print(f"{length}: closed loop / paper {_quantiles(closed[length], paper)}")
        print(f"{length}: largest / smallest of the sequences {_quantiles(spread, closed[length].sign())}")
    lengths = sorted(options.lengths)
    for left, middle, right in zip(lengths, lengths[1:], lengths[2:], strict=False):
        known = {length: closed[length] for length in (left, right)}
        print(f"{middle} between {left} and {right}: {_quantiles(_rows(known, middle), closed[middle])}")
        known = {length: closed[length] for length in (left, middle)}
        print(f"{right} beyond {left} and {middle}: {_quantiles(_rows(known, right), closed[right])}")


def _kept(study: Study, method: str, length: int) -> str:
    kind, spec = parse(method)
    keeping = Keeping(study.thresholds(kind, spec, length))
    pieces = [text[len(text) // 2 : len(text) // 2 + length] for text in study.books.values()]
    kept = torch.cat([_flat(study.measure([piece], keeping)) for piece in pieces])
    budgets = _flat(study.measuring(spec, length, None).budgets)
    # Of local channels it is infinite, and they are left out.
    return _quantiles(kept, budgets.where(torch.isfinite(budgets), 0.0).cpu().repeat(len(pieces), 1))


def _flat(thresholds: dict[int, torch.Tensor]) -> torch.Tensor:
    return torch.cat([thresholds[layer] for layer in sorted(thresholds)], dim=-1)


def _rows(known: dict[int, torch.Tensor], length: int) -> torch.Tensor:
    rows: Sequence[int] = [1, min(known), length]
    return interpolate_thresholds(list(known), torch.stack(list(known.values())), rows)[2]


def _quantiles(values: torch.Tensor, others: torch.Tensor) -> str:
    both = (values > 0) & (others > 0)
    shares = (values[both] / others[both]).float().quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return f"{', '.join(f'{share:.2f}' for share in shares)} ({int(both.sum())} values)"


if __name__ == "__main__":
    main()
