"""How far closed-loop thresholds are from the paper's, from each other, and from those interpolated between lengths.

    python benchmarks/closed_loop_thresholds.py examples/passkey-mamba2-4m --books FOLDER \
        --method closed:theta=0.05,n=3 --lengths 2048 4096 8192 16384 --output out/closed_loop.jsonl

Takes the thresholds that closed_loop_research.py has left beside its output, and measures those that are not there. All
figures are over the global channels: quantiles (10, 50 and 90 %) of ratios.
"""

from collections.abc import Sequence

import torch
from closed_loop_research import Study, arguments, parse

from vllm_longmamba.tables import interpolate_thresholds


def main() -> None:
    """Print the tables."""
    parser = arguments()
    parser.add_argument("--method", default="closed:theta=0.01,n=3")
    options = parser.parse_args()
    study = Study(options)
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


def _flat(thresholds: dict[int, torch.Tensor]) -> torch.Tensor:
    return torch.cat([thresholds[layer] for layer in sorted(thresholds)])


def _rows(known: dict[int, torch.Tensor], length: int) -> torch.Tensor:
    rows: Sequence[int] = [1, min(known), length]
    return interpolate_thresholds(list(known), torch.stack(list(known.values())), rows)[2]


def _quantiles(values: torch.Tensor, others: torch.Tensor) -> str:
    both = (values > 0) & (others > 0)
    shares = (values[both] / others[both]).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return f"{', '.join(f'{share:.2f}' for share in shares)} ({int(both.sum())} channels)"


if __name__ == "__main__":
    main()
