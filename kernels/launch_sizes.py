"""Arithmetic of launch sizes. Triton's own functions for it take more time, since kernels may call them as well."""


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up; b above 0."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0
