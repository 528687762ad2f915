"""FLOPs of a train step by hand, and those of compiled steps."""

import dataclasses

import jax
import pytest
import sparse_models
from methods import CONFIG
from train_steps import compiled, make_mesh, step

from pemoe_jax.analysis.planning import compiled_step, flops, hlo


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
