"""`pemoe plan`: memory and FLOPs by hand, collectives, extrapolation, tables, flags."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import sparse_models
from methods import CONFIG, METHODS

from pemoe_jax.analysis.planning import compiled_step, cost_tables, flops, hlo
from pemoe_jax.core import adapters, network, optim, partitioning, routing
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.sparse import Sparse
from pemoe_jax.tools import plan

ROOT = Path(__file__).parents[2]
RATE = 1e-3


def step(method="mov", experts=3, config=CONFIG, rows=4, lengths=(8, 6), **settings):
    chosen = METHODS[method]
    model = network.Transformer(config, chosen.adapters(experts))
    optimizer = optim.adamw(lambda count: RATE)
    return compiled_step.TrainStep(model, chosen.trainable, optimizer, rows, lengths, **settings)


def memory(
    train_step: compiled_step.TrainStep, data: int, model: int, fsdp: bool = False
) -> tuple[int, ...]:
    """Returns a device's bytes of frozen and trainable parameters, and of the optimizer state."""
    arguments = compiled_step.abstract_arguments(train_step, make_mesh(data, model), fsdp)
    state = arguments.state
    return tuple(
        compiled_step.bytes_per_device(part)
        for part in (arguments.frozen, state.params, (state.opt_state, state.step))
    )


def make_mesh(data: int, model: int):
    return partitioning.make_mesh(model, jax.devices()[: data * model])


# --- bytes by hand ---

# D = 16, H·K = 12, F = 20, V = 32; one layer each. Embedding and logits 2·512, relative positions
# 2·2·32, attention 3 · 4·16·12, MLPs 2 · 3·16·20, seven norms of 16.
NORMS = 7 * 16
POSITIONS = 2 * 2 * 32
BASE = 2 * 32 * 16 + POSITIONS + 3 * 4 * 16 * 12 + 2 * 3 * 16 * 20 + NORMS  # 5,488
# MoV-3: vectors [H, E, K] and a router [K, E] at two sites of three attentions, [E, F] and [F, E]
# at two gates.
HEADS, HEAD_ROUTERS, GATES = 3 * 2 * 2 * 3 * 6, 3 * 2 * 6 * 3, 2 * 2 * 3 * 20  # 216, 108, 240
TRAINABLE = HEADS + HEAD_ROUTERS + GATES
COUNTERS = 3 * 4  # int32: step, Adam's count, the schedule's count


def test_memory_of_one_device():
    """Adam has two float32 moments for each trainable parameter."""
    assert memory(step(), 1, 1) == (4 * BASE, 4 * TRAINABLE, 8 * TRAINABLE + COUNTERS)


def test_frozen_matrices_are_bfloat16():
    """Norms and logits stay float32."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    wide = NORMS + 32 * 16
    frozen = 2 * (BASE - wide) + 4 * wide
    assert memory(step(config=config), 1, 1) == (frozen, 4 * TRAINABLE, 8 * TRAINABLE + COUNTERS)


def test_model_parallelism_halves_matrices():
    """Norms are replicated, and so are routers by head, since K is not sharded."""
    trainable = (HEADS + GATES) // 2 + HEAD_ROUTERS
    frozen = (BASE - NORMS) // 2 + NORMS
    assert memory(step(), 1, 2) == (4 * frozen, 4 * trainable, 8 * trainable + COUNTERS)


def test_fsdp_halves_parameters_with_an_embedding_axis():
    """Relative positions and MoV's adapters have no such axis; without FSDP all is replicated."""
    frozen = (BASE - POSITIONS) // 2 + POSITIONS
    assert memory(step(), 2, 1, fsdp=True) == (
        4 * frozen,
        4 * TRAINABLE,
        8 * TRAINABLE + COUNTERS,
    )
    assert memory(step(), 2, 1) == memory(step(), 1, 1)


def test_memory_of_the_batch():
    """Three arrays of inputs and five of targets, int32; half the rows on each of two devices."""
    arguments = compiled_step.abstract_arguments(step(), make_mesh(2, 1))
    assert compiled_step.bytes_per_device(arguments.batch) == 2 * 4 * (3 * 8 + 5 * 6)


def test_sentence_routers_need_embeddings_and_unpacked_rows():
    router = functools.partial(routing.Router, reads="sentence")
    record = adapters.Adapters(
        key=functools.partial(adapters.VectorExperts, num_experts=2, router=router)
    )
    train_step = dataclasses.replace(step(), model=network.Transformer(CONFIG, record))
    batch = compiled_step.abstract_arguments(train_step, make_mesh(1, 1)).batch
    assert batch["sentence_embeddings"].shape == (4, 16)
    assert not [name for name in batch if "segment" in name]


def test_xxl_with_mov_60():
    """D = H·K = 4096, K = 64, F = 10240, V = 32128; 72 attention and 48 MLP blocks.

    Base: 72·4·4096² + 48·3·4096·10240 + 2·32128·4096 + 2·64·32 + 122·4096 norms. MoV-60:
    60 · (72·2·4096 + 48·10240 vectors, 72·2·64 + 48·10240 routers) = 94,924,800.
    """
    config = network.T5Config(
        emb_dim=4096,
        num_heads=64,
        mlp_dim=10240,
        num_encoder_layers=24,
        num_decoder_layers=24,
        dtype="bfloat16",
    )
    norms, logits = (24 * 2 + 24 * 3 + 2) * 4096, 32128 * 4096
    matrices = 72 * 4 * 4096**2 + 48 * 3 * 4096 * 10240 + 32128 * 4096 + 2 * 64 * 32
    xxl = step("mov", 60, config, 32, (1024, 256))
    frozen, trainable, _ = memory(xxl, 1, 1)
    assert frozen == 2 * matrices + 4 * (norms + logits)
    assert trainable == 4 * 94_924_800


# --- the compiled step ---


@functools.cache
def compiled(method: str, data: int, model: int, fsdp: bool = False, dtype: str = "float32"):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    return compiled_step.compile_step(step(method, config=config), make_mesh(data, model), fsdp)


def collectives(*args, **kwargs) -> dict[str, tuple[int, int]]:
    return hlo.collectives(hlo.parse(compiled(*args, **kwargs).as_text()))


def test_one_device_has_no_collectives():
    assert collectives("full", 1, 1) == {}


def test_data_parallelism_reduces_only_gradients():
    """(IA)³ has 3·2·12 + 2·20 parameters; the other sums are scalars."""
    (kind, (arrays, total)), *others = collectives("ia3", 2, 1).items()
    assert kind == "all-reduce" and not others
    vectors = 3 * 2 + 2
    scalars = arrays - vectors
    assert total == 4 * (3 * 2 * 12 + 2 * 20 + scalars) and 0 < scalars < 10


def test_fsdp_gathers_every_matrix_once():
    """12 matrices of attention, 6 of MLPs, logits; of the embedding XLA gathers tokens instead."""
    kinds = collectives("ia3", 2, 1, fsdp=True)
    matrices = 4 * (BASE - POSITIONS - NORMS - 32 * 16)
    assert matrices <= kinds["all-gather"][1] <= matrices + 4 * NORMS + 1000
    assert kinds["all-gather"][0] >= 19


def test_model_parallelism_reduces_activations():
    """At least the outputs of `out` and `wo` of each block, [4, 8, 16] and [4, 6, 16]."""
    kinds = collectives("ia3", 1, 2)
    assert kinds["all-reduce"][1] >= 4 * (2 * 4 * 8 * 16 + 3 * 4 * 6 * 16)
    assert not kinds.get("all-to-all")


def test_bfloat16_halves_the_bytes_of_collectives():
    """As float16, for the CPU compiler would widen it; norms, logits and routers are float32."""
    narrow, wide = collectives("ia3", 1, 2, dtype="bfloat16"), collectives("ia3", 1, 2)
    assert "bf16" not in compiled("ia3", 1, 2, dtype="bfloat16").as_text()
    assert 0.5 <= narrow["all-reduce"][1] / wide["all-reduce"][1] < 0.7


def test_arguments_match_the_compiled_step():
    """XLA counts only arguments that the program reads; it does not read positions."""
    arguments = compiled_step.abstract_arguments(step("ia3"), make_mesh(2, 1))
    unread = [v for k, v in arguments.batch.items() if k.endswith("_positions")]
    expected = compiled_step.bytes_per_device(arguments) - compiled_step.bytes_per_device(unread)
    analysis = compiled("ia3", 2, 1).memory_analysis()
    assert analysis.argument_size_in_bytes - expected in (
        0,
        8,
    )  # a key of 8 bytes, unread without dropout


@pytest.mark.slow
def test_compiler_options_that_save_time_change_no_cost():
    fast = compiled("ia3", 1, 2)
    slow = compiled_step.compile_step(
        step("ia3"),
        make_mesh(1, 2),
        xla_backend_optimization_level="3",
        xla_llvm_disable_expensive_passes=False,
    )
    sizes = [step.memory_analysis().temp_size_in_bytes for step in (fast, slow)]
    assert sizes[0] == sizes[1]
    assert fast.cost_analysis()["flops"] == slow.cost_analysis()["flops"]
    assert hlo.collectives(hlo.parse(slow.as_text())) == collectives("ia3", 1, 2)


def test_recomputation_saves_memory():
    """Eight layers [1024, 512] -> [1024, 512] store their inputs only, not their intermediates."""

    def layer(x, w):
        return jnp.tanh(jnp.exp(jnp.sin(x @ w)) @ w)

    def temporaries(layer):
        def loss(x, ws):
            for w in ws:
                x = layer(x, w)
            return jnp.sum(x)

        x = jax.ShapeDtypeStruct((1024, 512), jnp.float16)
        ws = [jax.ShapeDtypeStruct((512, 512), jnp.float16)] * 8
        compiled = compiled_step.compile_lowered(jax.jit(jax.grad(loss)).lower(x, ws))
        return compiled.memory_analysis().temp_size_in_bytes

    stored, size = temporaries(layer), 2 * 1024 * 512
    recomputed = temporaries(jax.checkpoint(layer))
    assert 8 * size <= recomputed < 14 * size < 24 * size <= stored


# --- FLOPs ---


def model_flops(method: str) -> flops.StepFlops:
    return compiled_step.model_flops(step(method))


def test_flops_of_full_fine_tuning_by_hand():
    """Rows 4, lengths 8 and 6. Matrices: of the encoder 4·16·12 + 3·16·20 a token of 32, of the
    decoder with queries and outputs of the cross-attention 6·16·12 + 3·16·20 + 32·16 a token of 24,
    its keys and values 2·16·12 a token of 32. Attention: 4·4·12·(8·8 + 6·6 + 6·8).
    """
    matrices = 2 * (32 * (768 + 960) + 24 * (1152 + 960 + 512) + 32 * 384)
    attention = 4 * 4 * 12 * (64 + 36 + 48)
    full = model_flops("full")
    assert full.forward == matrices + attention
    assert full.backward == matrices + 2 * attention
    assert full.weights == matrices and full.adapters == 0


def test_flops_of_mov_by_hand():
    """Per token H·K·E for the vectors and as many for the router; F·E twice at the gate."""
    rows = {"attention": 2 * (32 + 24 + 32) * (36 + 36), "gate": (32 + 24) * (60 + 60)}
    mov = model_flops("mov")
    assert mov.adapters == 3 * 2 * sum(rows.values())
    assert mov.weights == 0 and mov.forward == model_flops("full").forward


def test_flops_of_molora_by_hand():
    """E·R = 12 in and out of each pair, and a router [in, E]; α/R is elementwise.

    query, key, value: 16·12 + 12·12 + 16·3; out: 12·12 + 12·16 + 12·3; wi_0: 16·12 + 12·20 + 16·3;
    wo: 20·12 + 12·16 + 20·3.
    """
    qkv, out, wi, wo = 384, 372, 480, 492
    encoder = 3 * qkv + out + wi + wo
    decoder = 3 * qkv + out + qkv + out + wi + wo  # cross-attention: query and out
    expected = 32 * encoder + 24 * decoder + 32 * 2 * qkv
    assert model_flops("molora").adapters == 3 * 2 * expected


def test_sentence_routers_run_once_per_row():
    shapes = {
        "encoder/layers_0/attention/key_adapter/router/kernel": jax.ShapeDtypeStruct((16, 3), "f4"),
        "encoder/layers_0/attention/key_adapter/vectors": jax.ShapeDtypeStruct((2, 3, 6), "f4"),
    }
    by_reads = {
        reads: flops.train_step_flops(
            CONFIG, shapes, set(shapes), 4, (8, 6), {"key": reads}
        ).adapters
        for reads in ("sentence", "x")
    }
    assert by_reads == {"sentence": 6 * (4 * 48 + 32 * 36), "x": 6 * 32 * (48 + 36)}


def test_compiled_products_match_the_formula():
    """In full fine-tuning XLA cannot omit any product."""
    once, total = hlo.matrix_product_flops(hlo.parse(compiled("full", 1, 1).as_text()))
    assert once == total == model_flops("full").total


def sparse_step(name: str, **settings) -> compiled_step.TrainStep:
    """A train step of a model with one dense and one sparse layer in each stack."""
    model = sparse_models.sparse_model(
        dataclasses.replace(sparse_models.ROUTINGS[name], **settings),
        num_heads=2,
        mlp_activations=("relu",),
        logits_via_embedding=True,
    )
    return dataclasses.replace(step("full"), model=model)


@pytest.mark.parametrize(
    ("name", "choices", "slots"),
    [("switch", 1, (8, 8)), ("gshard", 2, (8, 8)), ("ec", 2, (16, 12))],
)
def test_flops_of_sparse_layers_by_hand(name, choices, slots):
    """T5 1.0's MLPs of two matrices and tied logits: 2 · 16 · 20 and 32 · 16 of a token.

    Places of each of 4 experts, in rows of 8 and of 6: 8/4 and round(1.5); round(1.25 · 8/4) and
    round(1.875); 2 · 8/4 and 2 · 6/4.
    """
    mlp, attention = 2 * 16 * 20, 4 * 4 * 12 * 2 * (64 + 36 + 48)
    encoder, decoder = 2 * 768 + mlp + 16 * 4, 2 * 1152 + mlp + 512 + 16 * 4
    others = 2 * (32 * (encoder + 2 * 384) + 24 * decoder) + attention
    result = compiled_step.model_flops(sparse_step(name))
    assert result.forward == others + 2 * mlp * (32 + 24) * choices
    products = 2 * mlp * 4 * sum(slots)  # 4 rows
    assert result.with_places == 3 * (others + products)


def test_compiled_products_of_sparse_layers():
    """XLA counts those of all places, and of statistics alone a few more."""
    train_step = sparse_step("switch")
    mesh = make_mesh(1, 1)
    text = compiled_step.compile_step(train_step, mesh).as_text()
    once, total = hlo.matrix_product_flops(hlo.parse(text))
    expected = compiled_step.model_flops(train_step).with_places
    assert once == total and expected <= total < 1.01 * expected


def test_depths_to_compile_are_whole_periods():
    config = dataclasses.replace(CONFIG, num_encoder_layers=12, num_decoder_layers=12)
    depths = {period: compiled_step.compiled_depths(config, period=period) for period in (1, 2, 3)}
    assert depths == {1: [(2, 2), (4, 4)], 2: [(2, 2), (4, 4)], 3: [(3, 3), (6, 6)]}


def test_a_loop_over_layers_is_not_extrapolated():
    """The products of the loops of two and three layers match the formula."""
    config = dataclasses.replace(
        CONFIG, num_encoder_layers=2, num_decoder_layers=3, scan_layers=True
    )
    train_step = step("full", config=config)
    assert compiled_step.compiled_depths(config) == [(2, 3)]
    once, total = hlo.matrix_product_flops(
        hlo.parse(compiled_step.compile_step(train_step, make_mesh(1, 1)).as_text())
    )
    assert once < total == compiled_step.model_flops(train_step).total


# --- HLO text ---

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


# --- deep models ---


def test_extrapolation():
    """f(encoder, decoder) = 5 + 7e + 11d from three models; 5 + 3e from two."""
    config = dataclasses.replace(CONFIG, num_encoder_layers=9, num_decoder_layers=6)
    depths = compiled_step.compiled_depths(config)
    assert depths == [(2, 2), (4, 2), (2, 4)]
    measured = [{"n": 5 + 7 * e + 11 * d} for e, d in depths]
    assert compiled_step.extrapolate(config, depths, measured) == {"n": 5 + 7 * 9 + 11 * 6}
    equal = dataclasses.replace(CONFIG, num_encoder_layers=24, num_decoder_layers=24)
    assert compiled_step.compiled_depths(equal) == [(2, 2), (4, 4)]
    measured = [{"n": 5 + 3 * e} for e, _ in compiled_step.compiled_depths(equal)]
    assert compiled_step.extrapolate(equal, compiled_step.compiled_depths(equal), measured) == {
        "n": 5 + 3 * 24
    }
    assert compiled_step.compiled_depths(equal, every_layer=True) == [(24, 24)]


def test_shallow_stacks_are_not_extrapolated():
    for encoder, decoder, depths in ((4, 3, [(4, 3)]), (6, 1, [(2, 1), (4, 1)])):
        config = dataclasses.replace(CONFIG, num_encoder_layers=encoder, num_decoder_layers=decoder)
        assert compiled_step.compiled_depths(config) == depths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layout"),
    [("ia3", cost_tables.MeshLayout(1, 2)), ("mov", cost_tables.MeshLayout(2, 1, fsdp=True))],
)
def test_extrapolated_costs_match_compiled_ones(method, layout):
    """Collectives and FLOPs are equal; temporaries, which share memory, agree within 3 %."""
    config = dataclasses.replace(CONFIG, num_encoder_layers=5, num_decoder_layers=5)
    train_step = step(method, config=config)
    extrapolated, whole = (
        compiled_step.estimate_cost(train_step, layout, every_layer)
        for every_layer in (False, True)
    )
    assert "4+4" in extrapolated.compiled and whole.compiled == "the whole model"
    assert extrapolated.collectives == whole.collectives
    assert extrapolated.flops == pytest.approx(whole.flops, rel=1e-3)
    name = "activations and temporaries"
    assert extrapolated.memory.pop(name) == pytest.approx(whole.memory.pop(name), rel=0.03)
    assert extrapolated.memory == whole.memory


@pytest.mark.slow
def test_microbatches_need_less_memory_for_the_same_products():
    """Their loop is compiled once and counted four times."""
    single = step("mov", rows=8, lengths=(32, 16))
    looped = dataclasses.replace(single, microbatches=4)
    steps = [compiled_step.compile_step(config, make_mesh(2, 1)) for config in (single, looped)]
    once, total = zip(
        *(hlo.matrix_product_flops(hlo.parse(step.as_text())) for step in steps), strict=True
    )
    assert total[1] == total[0] == once[0] and once[1] == once[0] // 4
    sizes = [step.memory_analysis().temp_size_in_bytes for step in steps]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_plan_with_experts_on_several_devices():
    """Of 4 experts each device holds two, and with them half of their states."""
    config = dataclasses.replace(CONFIG, num_encoder_layers=2, num_decoder_layers=2)
    model = network.Transformer(config, sparse=Sparse(num_experts=4))
    train_step = compiled_step.TrainStep(model, [".*"], optim.adamw(lambda _: 1e-3), 4, (8, 4))
    sizes = []
    for layout in map(cost_tables.MeshLayout.parse, ("2x1", "1x2x1")):
        mesh = compiled_step.make_mesh(train_step, layout)
        arguments = compiled_step.abstract_arguments(train_step, mesh)
        sizes.append(compiled_step.bytes_per_device(arguments.state.params))
        assert compiled_step.bytes_per_device(arguments.batch) * 2 == sum(
            leaf.size * leaf.dtype.itemsize for leaf in arguments.batch.values()
        )
    assert sizes[0] - sizes[1] == 2 * 2 * 3 * 16 * 20 * 4  # layers, experts, matrices, D, F, bytes
    assert str(cost_tables.MeshLayout.parse("2x4x1:fsdp")) == "2x4x1 FSDP"


# --- the command ---

TINY = ["--gin_file=models/t5_1_1_tiny.gin", "--gin_file=methods/mov.gin"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--mesh=4"],
            "--mesh must be DATAxMODEL or DATAxEXPERTxMODEL, or one with :fsdp, got '4'",
        ),
        (["--mesh=0x2"], "got '0x2'"),
        (["--mesh=2x1:zero"], "got '2x1:zero'"),
        (
            ["--mesh=2x1", "--batch_size=3"],
            "BATCH_SIZE must be a positive multiple of 2 (2 devices), got 3",
        ),
        (
            ["--mesh=1x1", "--mesh=2x1", "--batch_size=3"],
            "BATCH_SIZE must be a positive multiple of 2",
        ),
        (["--mesh=64x1"], "--mesh must have at most 2 devices, those of this process, got 64x1"),
        (["--batch_size=0"], "--batch_size must be at least 1, got 0"),
        (["--microbatches=0"], "--microbatches must be at least 1, got 0"),
        (["--microbatches=3", "--batch_size=4"], "× 3 microbatches"),
        (["--lengths=1024"], "--lengths must be INPUTS,TARGETS, got '1024'"),
        (["--hbm=lots"], "--hbm must be a size such as 32GB, or one of v2"),
        (["--output=plan.txt"], "--output must end in .md or .json"),
        (["--output=/no/such/folder/plan.md"], "--output must be in an existing folder"),
        (["--gin.TRAINABLE=['nothing']"], "TRAINABLE matched 0"),
        (["--gin.REMAT_POLICY=some"], "REMAT_POLICY must be one of ['none', 'minimal', 'full']"),
        (["--gin.NO_SUCH=1"], "no gin file has a macro of this name"),
    ],
)
def test_wrong_flags_are_a_one_line_error(capsys, monkeypatch, flags, message):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert plan.main([*TINY, *flags]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [([], "no gin file"), (TINY[:1], "TRAINABLE"), (TINY[1:], "MODEL is not set")],
)
def test_missing_files_are_named(capsys, monkeypatch, files, message):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert plan.main([*files, "--mesh=1x1"]) == 1
    assert message in capsys.readouterr().err


def test_parse_memory():
    assert plan.parse_memory("v4") == ("32 GB (v4)", 32 * 10**9)
    assert plan.parse_memory("79.5GB") == ("79.5 GB", 79_500_000_000)
    assert plan.parse_memory("16 GiB") == ("16 GiB", 16 * 2**30)
    with pytest.raises(InputError):
        plan.parse_memory("0GB")


def test_tables():
    """By hand: 1.5 GB of 2 GB is 75 %; 3 devices with 4 G each of 10 G compute 1.2 times that."""
    memory = dict(
        zip(cost_tables.MEMORY, [10**9, 10**6, 2 * 10**6, 1000, 496_999_000], strict=True)
    )
    model = flops.StepFlops(4 * 10**9, 5 * 10**9, 0, 10**9)
    collectives = {"all-reduce": (1234, 5_678_000)}
    cost = cost_tables.StepCost(
        "3x1", 3, memory, collectives, 4 * 10**9, model, 1000, "the whole model"
    )
    other = dataclasses.replace(cost, layout="1x3", collectives={})
    table, model_table = cost_tables.to_tables(
        "t", [cost, other], cost_tables.Chip("2 GB", 2 * 10**9)
    )
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.columns == ["on each device", "3x1", "1x3"]
    assert rows["frozen base"][0] == "1.00 GB" and rows["batch"][0] == "1.00 kB"
    assert rows["peak"][0] == "1.50 GB" and rows["of 2 GB"][0] == "75 %, fits"
    assert rows["all-reduce"] == ["1,234 × · 5.68 MB", "–"] and "all-gather" not in rows
    assert rows["FLOPs"][0] == "4.00 G" and rows["of the model"][0] == "1.20 ×"
    assert model_table.rows[0] == ["forward", "4.00 M", "4.00 G"]
    assert model_table.footer == [["total", "10.0 M", "10.0 G"]]
    small = cost_tables.to_tables("t", [cost], cost_tables.Chip("1 GB", 10**9))[0]
    assert ["of 1 GB", "150 %, too much"] in small.rows
    as_data = json.loads(cost_tables.to_json("t", [cost], cost_tables.Chip("1 GB", 10**9)))
    assert as_data["plans"][0]["peak"] == 1_500_000_000 and not as_data["plans"][0]["fits"]


def cells(markdown: str) -> dict[str, list[str]]:
    """Returns name -> values of the first table of costs."""
    table = markdown[markdown.index("| on each device ") :].split("\n\n")[0]
    header, _, *lines = table.splitlines()
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in [header, *lines])
    return {name: values for name, *values in rows}


def figure(cell: str) -> tuple[float, str]:
    """Returns the last number of a cell, and the rest of it: the unit, or whether it fits."""
    number = re.findall(r"[0-9][0-9.,]*", cell)[-1]
    return float(number.replace(",", "")), cell.replace(number, "")


XXL = r"""pemoe plan --gin_file=models/t5_1_1_xxl.gin --gin_file=methods/mov.gin \
  --gin.NUM_EXPERTS=60 --gin.DTYPE=bfloat16 --mesh 32x1:fsdp --mesh 4x8 --mesh 1x32 --hbm v4
"""


@pytest.mark.slow
def test_documents_show_what_their_command_prints():
    """XXL with MoV-60 on 32 devices; of three meshes only 4x8, since each compiles for a minute.

    All figures are equal, except the compiler's temporaries, which agree within 3 %.
    """
    texts = [(ROOT / document).read_text() for document in ("README.md", "docs/pods.md")]
    assert all(XXL in text for text in texts)
    table, other = map(cells, texts)
    assert table == other
    meshes = re.findall(r"--mesh (\S+)", XXL)
    assert table["on each device"] == [mesh.replace(":fsdp", " FSDP") for mesh in meshes]
    column = meshes.index("4x8")

    command = re.sub(r" --mesh (?!4x8)\S+", "", XXL.replace("\\\n", "")).split()[1:]
    process = subprocess.run(
        [sys.executable, "-m", "pemoe_jax", *command, "--markdown"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert process.returncode == 0, process.stderr
    printed = cells(process.stdout)
    # A kind of communication has no row if no mesh needs it.
    assert printed.keys() == {name for name in table if table[name][column] != "–"}
    estimates = {"activations and temporaries", "peak", "of 32 GB (v4)"}
    for name, (expected,) in printed.items():
        cell = table[name][column]
        if name not in estimates:
            assert cell == expected, name
            continue
        (value, unit), (expected_value, expected_unit) = figure(cell), figure(expected)
        assert unit == expected_unit and value == pytest.approx(expected_value, rel=0.03), name


@pytest.mark.slow
def test_end_to_end(tmp_path):
    """Eight virtual devices in a process of its own, with two meshes."""
    flags = ["--mesh=8x1", "--mesh=2x4", "--fsdp", "--batch_size=8", "--lengths=32,16"]
    command = [
        sys.executable,
        "-m",
        "pemoe_jax",
        "plan",
        *TINY,
        *flags,
        "--hbm=v4",
        "--markdown",
    ]
    process = subprocess.run(
        [*command, "--gin.DTYPE=bfloat16", f"--output={tmp_path / 'plan.json'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "## t5_1_1_tiny mov-10: 8 rows of 32 + 16 tokens, bfloat16, adafactor" in process.stdout
    assert "8x1 FSDP" in process.stdout and "2x4 FSDP" in process.stdout
    assert os.listdir(tmp_path) == ["plan.json"]
    eight, two = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert eight["fits"] and eight["devices"] == two["devices"] == 8
    assert eight["collectives"]["all-gather"][1] > two["collectives"]["all-gather"][1]
    # The batch is divided over 2 devices instead of 8.
    assert two["memory"]["batch"] == 4 * eight["memory"]["batch"]
