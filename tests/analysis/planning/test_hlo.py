"""Collectives and matrix products in the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from pemoe_jax.analysis.planning import hlo

PROGRAM = """\
HloModule jit_f, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %w = f32[4,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %y = f32[8,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%x, %y)
}

%cond (q: (s32[], f32[8,4])) -> pred[] {
  %q = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x0: f32[8,4]) -> f32[8,4] {
  %x0 = f32[8,4]{1,0} parameter(0)
  %in = (s32[], f32[8,4]{1,0}) tuple(%x0, %x0)
  %loop = (s32[], f32[8,4]{1,0}) while(%in), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}
  %o = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  %r = (bf16[8,4]{1,0}, f32[]) all-reduce(%o, %o), replica_groups={{0,1},{2,3}}, to_apply=%add
  %m = f32[2,4]{1,0} reduce-scatter(%o), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
  ROOT %z = f32[8,4]{1,0} add(%o, %o)
}
"""


def test_loops_count_as_often_as_they_run():
    program = hlo.parse(PROGRAM)
    assert hlo.collectives(program) == {
        "all-reduce": (2, 8 * 4 * 2 + 4),
        "all-gather": (5, 5 * 64),
        "reduce-scatter": (1, 4 * 32),  # input of each of four devices, whose output is 32 bytes
    }
    assert hlo.matrix_product_flops(program) == (2 * 8 * 4 * 4, 5 * 2 * 8 * 4 * 4)


def test_loops_of_compiled_programs():
    def seven(w, x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=7)[0]

    square = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    text = jax.jit(seven).lower(square, square).compile().as_text()
    assert hlo.matrix_product_flops(hlo.parse(text)) == (2 * 64**3, 7 * 2 * 64**3)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("f32[8,4]{1,0}", 128), ("(bf16[3]{0}, f32[], pred[2,2]{1,0})", 14), ("f8e4m3fn[5]", 5)],
)
def test_shape_bytes(shape, expected):
    assert hlo.shape_bytes(shape) == expected
