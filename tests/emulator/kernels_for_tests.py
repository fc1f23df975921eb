"""Triton functions that do what the interpreter must catch, or must compute as a GPU does."""

import triton
import triton.language as tl


@triton.jit
def copy_one_too_many(source, target, count, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index, mask=index <= count), mask=index < count)


@triton.jit
def all_write_first(source, target, count, BLOCK: tl.constexpr):
    tl.store(target, tl.load(source + tl.program_id(0)))


@triton.jit
def read_neighbour(source, target, count, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(target + program + 1, tl.load(target + program))


@triton.jit
def bfloat16_sum(source, target, count, BLOCK: tl.constexpr):
    value = tl.load(source + tl.arange(0, BLOCK))
    above = (value > 0.0).to(tl.bfloat16)
    tl.store(target + tl.arange(0, BLOCK), value + value * above)


@triton.jit
def float32_dot(source, target, count, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    value = tl.load(source + row * BLOCK + column)
    tl.store(target + row * BLOCK + column, tl.dot(value, value))
