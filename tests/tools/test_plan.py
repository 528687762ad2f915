"""`pemoe plan`: bytes and FLOPs by hand, collectives where they belong, its flags."""

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
from methods import CONFIG, METHODS

from pemoe_jax.analysis.planning import compile, flops, hlo, tables
from pemoe_jax.core import adapters, network, optim, partitioning, routing
from pemoe_jax.core.errors import InputError
from pemoe_jax.tools import plan

ROOT = Path(__file__).parents[2]
RATE = 1e-3


def step(method="mov", experts=3, config=CONFIG, rows=4, lengths=(8, 6), **settings):
    chosen = METHODS[method]
    model = network.Transformer(config, chosen.adapters(experts))
    optimizer = optim.adamw(lambda count: RATE)
    return compile.Step(model, chosen.trainable, optimizer, rows, lengths, **settings)


def memory(one: compile.Step, data: int, model: int, fsdp: bool = False) -> tuple[int, ...]:
    """Bytes on a device of frozen parameters, trainable ones and their optimizer's state."""
    given = compile.arguments(one, mesh_of(data, model), fsdp)
    state = given.state
    return tuple(
        compile.bytes_on_device(part)
        for part in (given.frozen, state.params, (state.opt_state, state.step))
    )


def mesh_of(data: int, model: int):
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
COUNTS = 3 * 4  # the step, Adam's and the schedule's


def test_bytes_of_one_device():
    """Float32; Adam keeps two moments of each trainable parameter."""
    assert memory(step(), 1, 1) == (4 * BASE, 4 * TRAINABLE, 8 * TRAINABLE + COUNTS)


def test_frozen_matrices_are_kept_in_bfloat16():
    """Norms and logits stay float32."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    wide = NORMS + 32 * 16
    frozen = 2 * (BASE - wide) + 4 * wide
    assert memory(step(config=config), 1, 1) == (frozen, 4 * TRAINABLE, 8 * TRAINABLE + COUNTS)


def test_model_parallelism_halves_matrices():
    """All but norms; routers by head are whole on each device, for K is not spread."""
    trainable = (HEADS + GATES) // 2 + HEAD_ROUTERS
    frozen = (BASE - NORMS) // 2 + NORMS
    assert memory(step(), 1, 2) == (4 * frozen, 4 * trainable, 8 * trainable + COUNTS)


def test_fsdp_halves_what_has_an_embedding_axis():
    """All but relative positions; MoV's adapters have none. Without it nothing is halved."""
    frozen = (BASE - POSITIONS) // 2 + POSITIONS
    assert memory(step(), 2, 1, fsdp=True) == (
        4 * frozen,
        4 * TRAINABLE,
        8 * TRAINABLE + COUNTS,
    )
    assert memory(step(), 2, 1) == memory(step(), 1, 1)


def test_batch_bytes():
    """Three arrays of inputs and five of targets, int32; half the rows on each of two devices."""
    given = compile.arguments(step(), mesh_of(2, 1))
    assert compile.bytes_on_device(given.batch) == 2 * 4 * (3 * 8 + 5 * 6)


def test_routers_of_sentences_get_embeddings_and_whole_rows():
    sites = {"key": functools.partial(routing.Router, reads="sentence")}
    record = adapters.Adapters(
        key=functools.partial(adapters.VectorExperts, num_experts=2, router=sites["key"])
    )
    one = dataclasses.replace(step(), model=network.Transformer(CONFIG, record))
    batch = compile.arguments(one, mesh_of(1, 1)).batch
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
    return compile.compile_step(step(method, config=config), mesh_of(data, model), fsdp)


def moved(*args, **kwargs) -> dict[str, tuple[int, int]]:
    return hlo.collectives(hlo.parse(compiled(*args, **kwargs).as_text()))


def test_one_device_talks_to_none():
    assert moved("full", 1, 1) == {}


def test_data_parallelism_reduces_gradients_alone():
    """(IA)³ has 3·2·12 + 2·20 parameters; beside their gradients some sums are scalars."""
    (kind, (arrays, total)), *others = moved("ia3", 2, 1).items()
    assert kind == "all-reduce" and not others
    vectors = 3 * 2 + 2
    scalars = arrays - vectors
    assert total == 4 * (3 * 2 * 12 + 2 * 20 + scalars) and 0 < scalars < 10


def test_fsdp_gathers_every_matrix_once():
    """Attention 12, MLPs 6, logits; of the embedding XLA gathers tokens instead."""
    found = moved("ia3", 2, 1, fsdp=True)
    matrices = 4 * (BASE - POSITIONS - NORMS - 32 * 16)
    assert matrices <= found["all-gather"][1] <= matrices + 4 * NORMS + 1000
    assert found["all-gather"][0] >= 19


def test_model_parallelism_reduces_activations():
    """The products of `out` and `wo` of each block at the least, [4, 8, 16] and [4, 6, 16]."""
    found = moved("ia3", 1, 2)
    assert found["all-reduce"][1] >= 4 * (2 * 4 * 8 * 16 + 3 * 4 * 6 * 16)
    assert not found.get("all-to-all")


def test_bfloat16_moves_half_the_bytes():
    """XLA's compiler for CPUs would widen it; norms, logits and routers are float32 anyhow."""
    narrow, wide = moved("ia3", 1, 2, dtype="bfloat16"), moved("ia3", 1, 2)
    assert "bf16" not in compiled("ia3", 1, 2, dtype="bfloat16").as_text()
    assert 0.5 <= narrow["all-reduce"][1] / wide["all-reduce"][1] < 0.7


def test_arguments_are_those_of_the_compiled_step():
    """XLA's own count; positions are not read, and the key is two words."""
    one = step("ia3")
    given = compile.arguments(one, mesh_of(2, 1))
    unread = [v for k, v in given.batch.items() if k.endswith("_positions")]
    expected = compile.bytes_on_device(given) - compile.bytes_on_device(unread)
    analysis = compiled("ia3", 2, 1).memory_analysis()
    assert analysis.argument_size_in_bytes - expected in (0, 8)  # without dropout it is not read


@pytest.mark.slow
def test_what_saves_time_changes_no_figure():
    fast = compiled("ia3", 1, 2)
    slow = compile.compile_step(
        step("ia3"),
        mesh_of(1, 2),
        xla_backend_optimization_level="3",
        xla_llvm_disable_expensive_passes=False,
    )
    sizes = [one.memory_analysis().temp_size_in_bytes for one in (fast, slow)]
    assert sizes[0] == sizes[1]
    assert fast.cost_analysis()["flops"] == slow.cost_analysis()["flops"]
    assert hlo.collectives(hlo.parse(slow.as_text())) == moved("ia3", 1, 2)


def test_recomputation_saves_memory():
    """Eight layers [1024, 512] -> [1024, 512]: of each its input is kept, and not all in it."""

    def layer(x, w):
        return jnp.tanh(jnp.exp(jnp.sin(x @ w)) @ w)

    def temporaries(of_layer):
        def loss(x, ws):
            for w in ws:
                x = of_layer(x, w)
            return jnp.sum(x)

        x = jax.ShapeDtypeStruct((1024, 512), jnp.float16)
        ws = [jax.ShapeDtypeStruct((512, 512), jnp.float16)] * 8
        done = compile.compile_lowered(jax.jit(jax.grad(loss)).lower(x, ws))
        return done.memory_analysis().temp_size_in_bytes

    kept, size = temporaries(layer), 2 * 1024 * 512
    recomputed = temporaries(jax.checkpoint(layer))
    assert 8 * size <= recomputed < 14 * size < 24 * size <= kept


# --- FLOPs ---


def by_hand(method: str) -> flops.Flops:
    one = step(method)
    return compile.model_flops(one)


def test_flops_by_hand():
    """Rows 4, lengths 8 and 6. Matrices: of the encoder 4·16·12 + 3·16·20 a token of 32, of the
    decoder with queries and outputs of the cross-attention 6·16·12 + 3·16·20 + 32·16 a token of 24,
    its keys and values 2·16·12 a token of 32. Attention: 4·4·12·(8·8 + 6·6 + 6·8).
    """
    matrices = 2 * (32 * (768 + 960) + 24 * (1152 + 960 + 512) + 32 * 384)
    attention = 4 * 4 * 12 * (64 + 36 + 48)
    found = by_hand("full")
    assert found.forward == matrices + attention
    assert found.backward == matrices + 2 * attention
    assert found.weights == matrices and found.adapters == 0


def test_flops_of_mov_by_hand():
    """A token takes H·K·E for its vectors and as much for its router, F·E twice at the gate."""
    rows = {"attention": 2 * (32 + 24 + 32) * (36 + 36), "gate": (32 + 24) * (60 + 60)}
    found = by_hand("mov")
    assert found.adapters == 3 * 2 * sum(rows.values())
    assert found.weights == 0 and found.forward == by_hand("full").forward


def test_flops_of_molora_by_hand():
    """E·R = 12 in and out of each pair, and a router [in, E]; α/R is elementwise.

    query, key, value: 16·12 + 12·12 + 16·3; out: 12·12 + 12·16 + 12·3; wi_0: 16·12 + 12·20 + 16·3;
    wo: 20·12 + 12·16 + 20·3.
    """
    qkv, out, wi, wo = 384, 372, 480, 492
    encoder = 3 * qkv + out + wi + wo
    decoder = 3 * qkv + out + qkv + out + wi + wo  # cross-attention: query and out
    expected = 32 * encoder + 24 * decoder + 32 * 2 * qkv
    assert by_hand("molora").adapters == 3 * 2 * expected


def test_routers_that_read_a_sentence_run_once_a_row():
    shapes = {
        "encoder/layers_0/attention/key_adapter/router/kernel": jax.ShapeDtypeStruct((16, 3), "f4"),
        "encoder/layers_0/attention/key_adapter/vectors": jax.ShapeDtypeStruct((2, 3, 6), "f4"),
    }
    found = {
        reads: flops.of_step(CONFIG, shapes, set(shapes), 4, (8, 6), {"key": reads}).adapters
        for reads in ("sentence", "x")
    }
    assert found == {"sentence": 6 * (4 * 48 + 32 * 36), "x": 6 * 32 * (48 + 36)}


def sums_of_biases(config: network.T5Config) -> int:
    """Operations of products that only sum up rows: gradients of the position biases, 4 rows."""
    pairs = config.num_encoder_layers * 8**2 + config.num_decoder_layers * 6**2
    return 2 * 4 * config.num_heads * pairs


def test_compiled_products_are_those_by_hand():
    """Where all trains, XLA leaves none out."""
    once, whole = hlo.products(hlo.parse(compiled("full", 1, 1).as_text()))
    assert once == whole == by_hand("full").together + sums_of_biases(CONFIG)


def test_a_loop_over_layers_is_compiled_whole():
    """Its products are those of three and of five layers, by hand; nothing is reckoned up."""
    config = dataclasses.replace(
        CONFIG, num_encoder_layers=3, num_decoder_layers=5, scan_layers=True
    )
    one = step("full", config=config)
    assert compile.depths(config) == [(3, 5)]
    once, whole = hlo.products(hlo.parse(compile.compile_step(one, mesh_of(1, 1)).as_text()))
    assert once < whole == compile.model_flops(one).together + sums_of_biases(config)


# --- programs as text ---

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


def test_a_loop_counts_as_often_as_it_runs():
    program = hlo.parse(PROGRAM)
    assert hlo.collectives(program) == {
        "all-reduce": (2, 8 * 4 * 2 + 4),
        "all-gather": (5, 5 * 64),
        "reduce-scatter": (1, 4 * 32),  # four devices give 32 bytes each what they add up
    }
    assert hlo.products(program) == (2 * 8 * 4 * 4, 5 * 2 * 8 * 4 * 4)


def test_loops_of_real_programs():
    def seven(w, x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=7)[0]

    square = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    text = jax.jit(seven).lower(square, square).compile().as_text()
    assert hlo.products(hlo.parse(text)) == (2 * 64**3, 7 * 2 * 64**3)


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[8,4]{1,0}", 128), ("(bf16[3]{0}, f32[], pred[2,2]{1,0})", 14), ("f8e4m3fn[5]", 5)],
)
def test_sizes(shape, size):
    assert hlo.size(shape) == size


# --- deep models ---


def test_what_a_layer_adds_is_added_for_the_rest():
    """f(encoder, decoder) = 5 + 7e + 11d from three models; 5 + 3e from two."""
    config = dataclasses.replace(CONFIG, num_encoder_layers=9, num_decoder_layers=6)
    depths = compile.depths(config)
    assert depths == [(2, 2), (4, 2), (2, 4)]
    measured = [{"n": 5 + 7 * e + 11 * d} for e, d in depths]
    assert compile.extrapolate(config, depths, measured) == {"n": 5 + 7 * 9 + 11 * 6}
    alike = dataclasses.replace(CONFIG, num_encoder_layers=24, num_decoder_layers=24)
    assert compile.depths(alike) == [(2, 2), (4, 4)]
    measured = [{"n": 5 + 3 * e} for e, _ in compile.depths(alike)]
    assert compile.extrapolate(alike, compile.depths(alike), measured) == {"n": 5 + 3 * 24}
    assert compile.depths(alike, every_layer=True) == [(24, 24)]


def test_shallow_stacks_are_compiled_whole():
    for encoder, decoder, depths in ((4, 3, [(4, 3)]), (6, 1, [(2, 1), (4, 1)])):
        config = dataclasses.replace(CONFIG, num_encoder_layers=encoder, num_decoder_layers=decoder)
        assert compile.depths(config) == depths


@pytest.mark.slow
@pytest.mark.parametrize(("data", "model", "fsdp"), [(1, 2, False), (2, 1, True)])
def test_reckoned_up_equals_compiled(data, model, fsdp):
    """Collectives and products exactly; temporaries, which share memory, within 3 %."""
    config = dataclasses.replace(CONFIG, num_encoder_layers=6, num_decoder_layers=6)
    layout = tables.Layout(data, model, fsdp)
    one = step("mov", config=config)
    reckoned, whole = (compile.plan(one, layout, every_layer) for every_layer in (False, True))
    assert "4+4" in reckoned.compiled and whole.compiled == "the whole model"
    assert reckoned.collectives == whole.collectives
    assert reckoned.flops == pytest.approx(whole.flops, rel=1e-3)
    name = "activations and temporaries"
    assert reckoned.memory.pop(name) == pytest.approx(whole.memory.pop(name), rel=0.03)
    assert reckoned.memory == whole.memory


@pytest.mark.slow
def test_microbatches_take_less_memory_for_the_same_products():
    """Their loop is compiled once and counted four times."""
    one = step("mov", rows=8, lengths=(32, 16))
    pieces = dataclasses.replace(one, microbatches=4)
    done = [compile.compile_step(each, mesh_of(2, 1)) for each in (one, pieces)]
    whole, looped = (hlo.products(hlo.parse(each.as_text())) for each in done)
    assert looped[1] == whole[1] == whole[0] and looped[0] == whole[0] // 4
    sizes = [each.memory_analysis().temp_size_in_bytes for each in done]
    assert sizes[1] < 0.6 * sizes[0]


# --- the command ---

TINY = ["--gin_file=models/t5_1_1_tiny.gin", "--gin_file=methods/mov.gin"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--mesh=4"], "--mesh: expected DATAxMODEL or DATAxMODEL:fsdp, found '4'"),
        (["--mesh=0x2"], "found '0x2'"),
        (["--mesh=2x1:zero"], "found '2x1:zero'"),
        (
            ["--mesh=2x1", "--batch_size=3"],
            "BATCH_SIZE must be a positive multiple of 2 (2 devices), got 3",
        ),
        (
            ["--mesh=1x1", "--mesh=2x1", "--batch_size=3"],
            "BATCH_SIZE must be a positive multiple of 2",
        ),
        (["--mesh=64x1"], "--mesh 64x1 needs 64 devices: jax was started with 2"),
        (["--batch_size=0"], "--batch_size: expected at least 1, found 0"),
        (["--microbatches=0"], "--microbatches: expected at least 1, found 0"),
        (["--microbatches=3", "--batch_size=4"], "× 3 microbatches"),
        (["--lengths=1024"], "--lengths: expected lengths of inputs and targets, found '1024'"),
        (["--hbm=lots"], "--hbm: expected a size as 32GB, or one of v2"),
        (["--output=plan.txt"], "--output: expected a file that ends in .md or .json"),
        (["--output=/no/such/folder/plan.md"], "expected a file in a folder that exists"),
        (["--gin.TRAINABLE=['nothing']"], "TRAINABLE matched 0"),
        (["--gin.REMAT_POLICY=some"], "REMAT_POLICY must be one of ['none', 'minimal', 'full']"),
        (["--gin.NO_SUCH=1"], "no gin file has a macro of this name"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, flags, said):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert plan.main([*TINY, *flags]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize(
    ("files", "said"), [([], "no gin file"), (TINY[:1], "TRAINABLE"), (TINY[1:], "no model")]
)
def test_what_is_missing_is_named(capsys, monkeypatch, files, said):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert plan.main([*files, "--mesh=1x1"]) == 1
    assert said in capsys.readouterr().err


def test_memory_of_devices():
    assert plan.memory("v4") == ("32 GB (v4)", 32 * 10**9)
    assert plan.memory("79.5GB") == ("79.5 GB", 79_500_000_000)
    assert plan.memory("16 GiB") == ("16 GiB", 16 * 2**30)
    with pytest.raises(InputError):
        plan.memory("0GB")


def test_table():
    """By hand: 1.5 GB of 2 GB are 75 %; 3 devices at 4 G of 10 G are 1.2 times it."""
    kept = dict(zip(tables.MEMORY, [10**9, 10**6, 2 * 10**6, 1000, 496_999_000], strict=True))
    model = flops.Flops(4 * 10**9, 5 * 10**9, 0, 10**9)
    moved = {"all-reduce": (1234, 5_678_000)}
    one = tables.Plan("3x1", 3, kept, moved, 4 * 10**9, model, 1000, "the whole model")
    other = dataclasses.replace(one, layout="1x3", collectives={})
    table, of_model = tables.to_tables("t", [one, other], tables.Chip("2 GB", 2 * 10**9))
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.columns == ["on each device", "3x1", "1x3"]
    assert rows["frozen base"][0] == "1.00 GB" and rows["batch"][0] == "1.00 kB"
    assert rows["peak"][0] == "1.50 GB" and rows["of 2 GB"][0] == "75 %, fits"
    assert rows["all-reduce"] == ["1,234 × · 5.68 MB", "–"] and "all-gather" not in rows
    assert rows["FLOPs"][0] == "4.00 G" and rows["of the model"][0] == "1.20 ×"
    assert of_model.rows[0] == ["forward", "4.00 M", "4.00 G"]
    assert of_model.below == [["together", "10.0 M", "10.0 G"]]
    small = tables.to_tables("t", [one], tables.Chip("1 GB", 10**9))[0]
    assert ["of 1 GB", "150 %, too much"] in small.rows
    as_data = json.loads(tables.to_json("t", [one], tables.Chip("1 GB", 10**9)))
    assert as_data["plans"][0]["peak"] == 1_500_000_000 and not as_data["plans"][0]["fits"]


def cells(markdown: str) -> dict[str, list[str]]:
    """Name -> what stands behind it, of the first table of layouts."""
    lines = markdown[markdown.index("| on each device ") :].split("\n\n")[0].splitlines()
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: values for name, *values in rows}


def figure(cell: str) -> tuple[float, str]:
    """The last number of a cell, and what is written around it: units and whether it fits."""
    number = re.findall(r"[0-9][0-9.,]*", cell)[-1]
    return float(number.replace(",", "")), cell.replace(number, "")


@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", "docs/pods.md"])
def test_tables_of_documents_are_what_their_command_prints(xxl, document):
    """Weights and products exactly; temporaries and what is sent, the compiler's, within 3 %."""
    text = (ROOT / document).read_text()
    assert XXL in text
    shown = cells(text)
    assert shown.keys() == xxl.keys() and shown["on each device"] == xxl["on each device"]
    estimates = {"activations and temporaries", "peak", "of 32 GB (v4)"}
    for name in shown.keys() - {"on each device"}:
        for found, expected in zip(shown[name], xxl[name], strict=True):
            if name not in estimates:
                assert found == expected, name
                continue
            (value, around), (other, of_other) = figure(found), figure(expected)
            assert around == of_other and value == pytest.approx(other, rel=0.03), name


XXL = r"""pemoe plan --gin_file=models/t5_1_1_xxl.gin --gin_file=methods/mov.gin \
  --gin.NUM_EXPERTS=60 --gin.DTYPE=bfloat16 --mesh 32x1:fsdp --mesh 4x8 --mesh 1x32 --hbm v4
"""


@pytest.fixture(scope="module")
def xxl() -> dict[str, list[str]]:
    """XXL with MoV-60 on 32 devices: FSDP, model parallelism and both, as the documents ask."""
    command = [sys.executable, *XXL.replace("\\\n", "").split()[1:], "--markdown"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    return cells(done.stdout)


@pytest.mark.slow
def test_end_to_end(tmp_path):
    """Eight virtual devices in a process of its own, two layouts side by side."""
    flags = ["--mesh=8x1", "--mesh=2x4", "--fsdp", "--batch_size=8", "--lengths=32,16"]
    command = [
        sys.executable,
        "-m",
        "pemoe_jax.tools.plan",
        *TINY,
        *flags,
        "--hbm=v4",
        "--markdown",
    ]
    done = subprocess.run(
        [*command, "--gin.DTYPE=bfloat16", f"--output={tmp_path / 'plan.json'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "## t5_1_1_tiny mov-10: 8 rows of 32 + 16 tokens, bfloat16, adafactor" in done.stdout
    assert "8x1 FSDP" in done.stdout and "2x4 FSDP" in done.stdout
    assert os.listdir(tmp_path) == ["plan.json"]
    eight, two = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert eight["fits"] and eight["devices"] == two["devices"] == 8
    assert eight["collectives"]["all-gather"][1] > two["collectives"]["all-gather"][1]
    # 64 to 16 tokens a row over 2 and not 8 devices: four times the batch
    assert two["memory"]["batch"] == 4 * eight["memory"]["batch"]
