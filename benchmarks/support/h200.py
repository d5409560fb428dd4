"""What an H200 does in a microsecond, for floors."""

# measured by a copy
BYTES_PER_US = 4.3e6
# measured by products of bfloat16 matrices; a multiplication and an addition are two
FLOPS_PER_US = 7.9e8
# of 132 multiprocessors, 16 a cycle at 1.98 GHz
EXPONENTIALS_PER_US = 132 * 16 * 1.98e3
