"""Memory of a train step by hand, its collectives, and extrapolation to deep models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from methods import CONFIG
from train_steps import compiled, make_mesh, step

from pemoe_jax.analysis.planning import compiled_step, cost_tables, hlo
from pemoe_jax.core import adapters, network, optim, routing
from pemoe_jax.core.sparse import Sparse


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


# --- deep models ---


def test_depths_to_compile_are_whole_periods():
    config = dataclasses.replace(CONFIG, num_encoder_layers=12, num_decoder_layers=12)
    depths = {period: compiled_step.compiled_depths(config, period=period) for period in (1, 2, 3)}
    assert depths == {1: [(2, 2), (4, 4)], 2: [(2, 2), (4, 4)], 3: [(3, 3), (6, 6)]}


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
    ("method", "layout", "num_decoder_layers", "compiled_layers"),
    [
        ("ia3", cost_tables.MeshLayout(1, 2), 5, "4+4"),
        ("mov", cost_tables.MeshLayout(2, 1, fsdp=True), 1, "4+1"),
    ],
)
def test_extrapolated_costs_match_compiled_ones(
    method, layout, num_decoder_layers, compiled_layers
):
    """Collectives and FLOPs are equal; temporaries, which share memory, agree within 3 %."""
    config = dataclasses.replace(
        CONFIG, num_encoder_layers=5, num_decoder_layers=num_decoder_layers
    )
    train_step = step(method, config=config)
    extrapolated, whole = (
        compiled_step.estimate_cost(train_step, layout, every_layer)
        for every_layer in (False, True)
    )
    assert compiled_layers in extrapolated.compiled and whole.compiled == "the whole model"
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
