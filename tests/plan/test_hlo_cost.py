"""FLOPs and bytes of compiled programs, by hand: a text as a TPU's compiler writes it, and a program for this CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.plan.hlo import array_bytes, parse
from glm45_jax.plan.hlo_cost import matrix_flops, memory_bytes

TPU = """HloModule jit_step, num_partitions=1
%fused_weight (p0: bf16[46,512,256], p1: s32[], p2: bf16[64,256]) -> bf16[64,512] {
  %p0 = bf16[46,512,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %w = bf16[1,512,256]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,512,256}
  %b = bf16[512,256]{1,0} bitcast(%w)
  %p2 = bf16[64,256]{1,0} parameter(2)
  ROOT %c = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} convolution(%p2, %b), dim_labels=bf_oi->bf
}
%fused_cache (p0: bf16[46,64,2048], p1: bf16[1,64,1], p2: s32[]) -> bf16[46,64,2048] {
  %p0 = bf16[46,64,2048]{2,1,0} parameter(0)
  %p1 = bf16[1,64,1]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %u = bf16[46,64,2048]{2,1,0} dynamic-update-slice(%p0, %p1, %p2, %p2, %p2)
  ROOT %r = bf16[46,64,2048]{2,1,0} bitcast(%u)
}
ENTRY %main (w: bf16[46,512,256], x: bf16[64,256], c: bf16[46,64,2048], n: bf16[1,64,1], i: s32[]) -> bf16[46] {
  %w = bf16[46,512,256]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(1)
  %cache = bf16[46,64,2048]{2,1,0} parameter(2)
  %new = bf16[1,64,1]{2,1,0:S(1)} parameter(3)
  %i = s32[] parameter(4)
  %fast = (bf16[64,256]{1,0:T(8,128)(2,1)S(1)}, bf16[64,256]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %done = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} copy-done(%fast)
  %y = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %i, %done), kind=kOutput, calls=%fused_weight
  %k = bf16[64,512]{1,0} custom-call(%y), custom_call_target="tpu_custom_call"
  ROOT %u = bf16[46,64,2048]{2,1,0} fusion(%cache, %new, %i), kind=kLoop, calls=%fused_cache
}
"""


def test_bytes_of_types() -> None:
    assert array_bytes("(bf16[4,8]{1,0:T(8,128)(2,1)}, s4[16], pred[3], f8e4m3fn[2], u32[]{:S(2)}, token[])") == (
        64 + 8 + 3 + 2 + 4
    )


def test_a_program_of_a_tpu() -> None:
    """A layer's weight read out of the stack, x brought into VMEM, values put into the cache; the kernel is free."""
    program = parse(TPU)
    assert matrix_flops(program) == 2 * 64 * 512 * 256
    weight, x, index, update = 512 * 256 * 2, 64 * 256 * 2, 4, 64 * 2
    assert memory_bytes(program) == weight + x + index + update + index


RELAID = """HloModule jit_step, num_partitions=1
%retiled (p0: s8[46,512,256]) -> s8[46,512,256] {
  %p0 = s8[46,512,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copied = s8[46,512,256]{2,1,0:T(8,128)(4,1)} copy(%p0)
}
%layer (p0: s8[46,512,256], p1: s32[]) -> bf16[512,256] {
  %p0 = s8[46,512,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %f = s8[46,512,256]{2,1,0:T(8,128)(4,1)} fusion(%p0), kind=kLoop, calls=%retiled
  %wide = bf16[46,512,256]{2,1,0} convert(%f)
  %w = bf16[1,512,256]{2,1,0} dynamic-slice(%wide, %p1, %zero, %zero), dynamic_slice_sizes={1,512,256}
  ROOT %b = bf16[512,256]{1,0} bitcast(%w)
}
%fused_weight (p0: s8[46,512,256], p1: s32[], p2: bf16[64,256]) -> bf16[64,512] {
  %p0 = s8[46,512,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  %p1 = s32[] parameter(1)
  %b = bf16[512,256]{1,0} fusion(%p0, %p1), kind=kLoop, calls=%layer
  %p2 = bf16[64,256]{1,0} parameter(2)
  ROOT %c = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} convolution(%p2, %b), dim_labels=bf_oi->bf
}
ENTRY %main (w: s8[46,512,256], x: bf16[64,256], i: s32[]) -> bf16[64,512] {
  %w = s8[46,512,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  %x = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[] parameter(2)
  ROOT %y = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %i, %x), kind=kOutput, calls=%fused_weight
}
"""


def test_a_layer_of_quantised_weights_laid_out_anew_on_the_way() -> None:
    """Inside a fusion a conversion and a change of layout are of the slice alone, in the bytes that lie in memory."""
    assert memory_bytes(parse(RELAID)) == 512 * 256 + 64 * 256 * 2 + 4


CONVOLUTIONS = [
    # a batch of products as XLA for TPU writes it: the batch as a window of which each output meets one place
    ("bf16[8,3,5]", "bf16[8,7,5]", "bf16[8,3,7]", "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf", 8),
    ("bf16[3,5,4]", "bf16[4,7,5]", "bf16[3,4,7]", "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0oi->b0f", 0),
    ("bf16[3,5]", "bf16[7,5]", "bf16[3,7]", "dim_labels=bf_oi->bf", 1),
]


@pytest.mark.parametrize(("lhs", "rhs", "out", "how", "pairs"), CONVOLUTIONS)
def test_convolutions(lhs: str, rhs: str, out: str, how: str, pairs: int) -> None:
    text = f"""HloModule c
ENTRY %main (a: {lhs}, b: {rhs}) -> {out} {{
  %a = {lhs} parameter(0)
  %b = {rhs} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {how}
}}
"""
    if not pairs:  # places of a window of four that meet four values, at four places of the output
        pairs = sum(0 <= o - 3 + k < 4 for o in range(4) for k in range(4))
    assert matrix_flops(parse(text)) == 2 * pairs * 3 * 7 * 5


def test_a_program_for_this_machine_agrees_with_the_hand_count() -> None:
    def f(x, w):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((128, 256), (5, 256, 256))]
    program = parse(jax.jit(f).lower(*shapes).compile().as_text())
    assert matrix_flops(program) == 5 * 2 * 128 * 256 * 256
    least = 4 * (5 * 256 * 256 + 2 * 128 * 256)
    # the carry twice a round in and out of memory, the weights at most copied once out of the stack
    assert least <= memory_bytes(program) <= 4 * (3 * 5 * 256 * 256 + 5 * 5 * 128 * 256 + 2 * 128 * 256)
