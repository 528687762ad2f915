"""The network: T5X's names and shapes, sites, positions and masks; test_hf_parity.py has values."""

import dataclasses
import functools
import zlib

import archives
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import (
    CONFIG,
    METHODS,
    example_batch,
    forward,
    largest_difference,
    model,
    model_inputs,
    random_params,
)

from pemoe_jax.core import network, params
from pemoe_jax.core.adapters import SITES, Adapters, LoRAExperts, VectorExperts
from pemoe_jax.core.errors import InputError
from pemoe_jax.core.layers import MlpBlock, relative_position_bucket
from pemoe_jax.core.routing import Router
from pemoe_jax.core.sparse import Sparse

DEEP = dataclasses.replace(CONFIG, num_decoder_layers=2)


def flat_shapes(transformer) -> dict:
    return {
        path: leaf.shape for path, leaf in params.flatten(network.param_shapes(transformer)).items()
    }


def flat_axes(transformer) -> dict:
    """Returns the axis names by path, as T5X reads them."""
    tokens = jnp.ones((1, 4), jnp.int32)
    init = functools.partial(transformer.init, enable_dropout=False)
    variables = jax.eval_shape(init, jax.random.PRNGKey(0), tokens, tokens, tokens)
    return {path: leaf.names for path, leaf in params.flatten(variables["params_axes"]).items()}


def test_parameter_tree_is_t5x():
    """Names and shapes of T5X's minimal T5: heads joined, D = 16, H = 2, K = 6, F = 20, V = 32."""
    mlp = {"mlp/wi_0/kernel": (16, 20), "mlp/wi_1/kernel": (16, 20), "mlp/wo/kernel": (20, 16)}

    def attention(name):
        return {
            f"{name}/query/kernel": (16, 12),
            f"{name}/key/kernel": (16, 12),
            f"{name}/value/kernel": (16, 12),
            f"{name}/out/kernel": (12, 16),
        }

    encoder_layer = {
        **attention("attention"),
        **mlp,
        "pre_attention_layer_norm/scale": (16,),
        "pre_mlp_layer_norm/scale": (16,),
    }
    decoder_layer = {
        **attention("self_attention"),
        **attention("encoder_decoder_attention"),
        **mlp,
        "pre_self_attention_layer_norm/scale": (16,),
        "pre_cross_attention_layer_norm/scale": (16,),
        "pre_mlp_layer_norm/scale": (16,),
    }
    expected = {
        "token_embedder/embedding": (32, 16),
        "encoder/relpos_bias/rel_embedding": (2, 32),
        "encoder/encoder_norm/scale": (16,),
        "decoder/relpos_bias/rel_embedding": (2, 32),
        "decoder/decoder_norm/scale": (16,),
        "decoder/logits_dense/kernel": (16, 32),
        **{f"encoder/layers_0/{k}": v for k, v in encoder_layer.items()},
        **{f"decoder/layers_{i}/{k}": v for i in (0, 1) for k, v in decoder_layer.items()},
    }
    assert flat_shapes(network.Transformer(DEEP)) == expected


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_names_its_axes(method):
    """`params_axes` has an entry for each parameter, with a name for each of its axes."""
    transformer = network.Transformer(DEEP, METHODS[method].adapters())
    shapes, axes = flat_shapes(transformer), flat_axes(transformer)
    assert {f"{path}_axes" for path in shapes} == set(axes)
    for path, shape in shapes.items():
        names = axes[f"{path}_axes"]
        assert len(names) == len(shape) and all(isinstance(n, str) for n in names), path


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_at_the_sites_of_the_method(method):
    """Every block has the base's parameters and `<site>_adapter/...`, and nothing else."""
    base = flat_shapes(network.Transformer(DEEP))
    shapes = flat_shapes(network.Transformer(DEEP, METHODS[method].adapters()))
    assert {k: v for k, v in shapes.items() if "_adapter/" not in k} == base
    blocks = ["encoder/layers_0/attention", "encoder/layers_0/mlp"] + [
        f"decoder/layers_{i}/{block}"
        for i in (0, 1)
        for block in ("self_attention", "encoder_decoder_attention", "mlp")
    ]
    in_mlp = {"wi_0", "wi_1", "gate", "wo"}
    expected = {
        f"{block}/{site}_adapter"
        for block in blocks
        for site in METHODS[method].sites
        if (site in in_mlp) == block.endswith("mlp")
    }
    actual = {k.split("_adapter/")[0] + "_adapter" for k in shapes if "_adapter/" in k}
    assert actual == expected


def test_vectors_and_pairs_fit_every_site():
    """All eight sites at once; adapters take their shapes from x and y."""
    joined = {"query": (16, 12), "key": (16, 12), "value": (16, 12), "out": (12, 16)}
    mlp = {"wi_0": (16, 20), "wi_1": (16, 20), "gate": (16, 20), "wo": (20, 16)}
    # One attention block in the encoder, two in each of two decoder layers, and three MLPs.
    blocks = 5 * len(joined) + 3 * len(mlp)
    for expert, tensors in ((VectorExperts, 1), (LoRAExperts, 2)):
        shapes = flat_shapes(network.Transformer(DEEP, Adapters(**dict.fromkeys(SITES, expert))))
        adapted = {path: shape for path, shape in shapes.items() if "_adapter/" in path}
        assert len(adapted) == blocks * tensors
        for path, shape in adapted.items():
            site, leaf = path.split("/")[-2].removesuffix("_adapter"), path.split("/")[-1]
            features_in, features_out = (joined | mlp)[site]
            by_head = site in ("query", "key", "value")
            assert (
                shape
                == {
                    "vectors": (2, 1, 6) if by_head else (1, features_out),
                    "lora_a": (features_in, 1, 4),
                    "lora_b": (1, 4, features_out),
                }[leaf]
            ), path


def test_gate_is_between_the_activation_and_the_product():
    """mlp(x) = wo(l * gelu(wi_0 x) * wi_1 x).

    Doubling l or the output of wi_1 doubles the output; doubling the output of wi_0 does not.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 3, 8)).astype(np.float32)
    kernels = {
        name: {"kernel": rng.standard_normal(shape).astype(np.float32)}
        for name, shape in {"wi_0": (8, 12), "wi_1": (8, 12), "wo": (12, 8)}.items()
    }

    def mlp(site, value):
        module = MlpBlock(mlp_dim=12, adapters=Adapters(**{site: VectorExperts}))
        weights = kernels | {f"{site}_adapter": {"vectors": jnp.full((1, 12), value)}}
        return np.asarray(module.apply({"params": weights}, x))

    plain = mlp("gate", 1.0)
    np.testing.assert_array_equal(mlp("gate", 0.0), 0)
    np.testing.assert_allclose(mlp("gate", 2.0), 2 * plain, rtol=1e-5)
    np.testing.assert_allclose(mlp("wi_1", 2.0), 2 * plain, rtol=1e-5)
    assert largest_difference(mlp("wi_0", 2.0), 2 * plain) > 0.01


# --- initial parameters ---


def test_initial_parameters_are_t5x():
    """Standard deviations of T5X: kernels 1 / sqrt(inputs), queries 1 / sqrt(inputs * K).

    Embedding 1; logits as other kernels; norms one; rel_embedding uniform with variance
    2 / (H + 32) (fan average). With 2,000 draws or more, 5 % is over 3 standard errors.
    """
    config = dataclasses.replace(CONFIG, emb_dim=64, num_heads=8, head_dim=16, mlp_dim=96)
    weights = network.init_params(
        network.Transformer(dataclasses.replace(config, vocab_size=64)), 0, lambda _: True
    )
    flat = {path: np.asarray(leaf) for path, leaf in params.flatten(weights).items()}
    expected = {
        "token_embedder/embedding": 1,
        "encoder/layers_0/attention/query/kernel": (64 * 16) ** -0.5,
        "encoder/layers_0/attention/key/kernel": 64**-0.5,
        "encoder/layers_0/attention/out/kernel": 128**-0.5,
        "decoder/layers_0/encoder_decoder_attention/value/kernel": 64**-0.5,
        "decoder/layers_0/mlp/wi_1/kernel": 64**-0.5,
        "decoder/layers_0/mlp/wo/kernel": 96**-0.5,
        "decoder/logits_dense/kernel": 64**-0.5,
    }
    for path, deviation in expected.items():
        assert flat[path].std() == pytest.approx(deviation, rel=0.05), path
    relative = flat["encoder/relpos_bias/rel_embedding"]
    assert relative.std() == pytest.approx((2 / 40) ** 0.5, rel=0.1)  # 256 draws
    norms = [leaf for path, leaf in flat.items() if path.endswith("scale")]
    assert len(norms) == 7 and all((leaf == 1).all() for leaf in norms)
    kernels = [leaf for path, leaf in flat.items() if path.endswith("kernel")]
    assert len({leaf.ravel()[0] for leaf in kernels}) == len(kernels)  # none drawn twice


def test_initial_parameters_depend_on_path_and_seed_alone():
    """The base is the same with and without adapters; another seed has another base."""

    def draw(method, seed, predicate=lambda _: True):
        return params.flatten(network.init_params(model(method), seed, predicate))

    base, adapted = draw("full", 3), draw("molora", 3)
    assert base.keys() < adapted.keys()
    for path, leaf in base.items():
        np.testing.assert_array_equal(adapted[path], leaf)
    adapters = draw("molora", 3, params.is_adapter)
    assert adapters.keys() == adapted.keys() - base.keys()
    path = "token_embedder/embedding"
    assert (draw("full", 4, path.__eq__)[path] != base[path]).any()


@pytest.mark.parametrize(("sparse", "depths"), [(None, (3, 2)), (Sparse(sparse_step=3), (6, 3))])
def test_tracing_one_layer_of_each_kind_suffices(sparse, depths):
    """Shapes, axes and draws are those of tracing the whole network."""
    config = dataclasses.replace(CONFIG, num_encoder_layers=depths[0], num_decoder_layers=depths[1])
    routed = {"num_experts": 3, "router": Router}
    vectors = functools.partial(VectorExperts, **routed)
    pairs = functools.partial(LoRAExperts, **routed)
    adapters = Adapters(key=vectors, gate=vectors, out=pairs)
    transformer = network.Transformer(config, adapters, sparse)
    tokens = jnp.ones((1, 1), jnp.int32)
    init = functools.partial(transformer.init, enable_dropout=False)
    with params.record_specs() as specs:
        whole = jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens)["params"]

    assert network.param_shapes(transformer) == whole
    # Attention blocks have key and out, dense MLPs gate.
    attention = depths[0] + 2 * depths[1]
    mlps = sum(depths) if sparse is None else sum(depths) // 3 * 2
    adapter_paths = [path for path in params.flatten(whole) if "_adapter/" in path]
    assert len(adapter_paths) == attention * (2 + 3) + mlps * 2
    assert network.param_axes(transformer) == {path: spec.axes for path, spec in specs.items()}
    expected = params.flatten(params.initialize(specs, 5))
    drawn = params.flatten(network.init_params(transformer, 5, lambda _: True))
    assert drawn.keys() == expected.keys() == params.flatten(whole).keys()
    for path, leaf in drawn.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    first, second = (f"decoder/layers_{i}/mlp/wo/kernel" for i in (0, 1))
    assert (drawn[first] != drawn[second]).any()


def test_xxl_is_traced_as_two_layers_of_a_stack(monkeypatch):
    """Its shapes take 0.2 s at most, whatever the depth and the step."""
    traced = []
    make_layer = network._make_layer
    monkeypatch.setattr(
        network, "_make_layer", lambda *args, **kw: traced.append(args) or make_layer(*args, **kw)
    )
    xxl = network.T5Config(
        emb_dim=4096, num_heads=64, mlp_dim=10240, num_encoder_layers=24, num_decoder_layers=24
    )
    transformer = network.Transformer(xxl, sparse=Sparse(num_experts=64, sparse_step=4))
    # 11.1e9 parameters, and 63 further MLPs and a router in each of 6 + 6 layers.
    extra = 12 * (63 * 3 * 4096 * 10240 + 4096 * 64)
    dense = network.Transformer(xxl)
    assert params.count(network.param_shapes(dense)) == 11_135_332_352
    assert params.count(network.param_shapes(transformer)) == 11_135_332_352 + extra
    assert len(traced) == 2 + 4


# --- positions ---


def test_position_buckets_by_hand():
    """32 buckets to distance 128 (T5).

    Decoder: 16 exact; beyond, 16 + floor(16 ln(d/16) / ln(128/16)): d = 32 gives 16 / 3 = 5.33
    -> 21, d = 64 gives 32 / 3 = 10.67 -> 26, 128 and more the last, 31; to the right all are 0.
    Encoder: 16 for each side, 8 exact; beyond, 8 + floor(8 ln(d/8) / ln(128/8)): d = 20 gives
    8 * 0.3305 = 2.64 -> 10, d = 100 gives 8 * 0.911 = 7.29 -> 15; to the right 16 are added.
    """
    decoder = relative_position_bucket(np.array([3, 0, -1, -15, -16, -32, -64, -128, -500]), False)
    assert decoder.tolist() == [0, 0, 1, 15, 16, 21, 26, 31, 31]
    encoder = relative_position_bucket(np.array([0, -7, -8, -20, -100, -300, 1, 7, 20, 300]), True)
    assert encoder.tolist() == [0, 7, 8, 10, 15, 15, 17, 23, 26, 31]


# --- masks ---


def test_padding_changes_nothing():
    """The same rows in wider arrays have the same logits at the same positions."""
    narrow = example_batch()
    wide = {k: np.pad(v, ((0, 0), (0, 3))) for k, v in narrow.items()}
    weights = random_params("mov")
    a, b = forward("mov")(weights, narrow), forward("mov")(weights, wide)
    real = narrow["decoder_target_tokens"] > 0
    assert largest_difference(b[:, : real.shape[1]][real], a[real]) < 1e-5


def test_decoder_is_causal_and_attends_to_the_encoder():
    batch = example_batch(inputs=(8, 8, 8, 8), targets=(6, 6, 6, 6))
    weights = random_params("full")
    before = np.asarray(forward("full")(weights, batch))

    def change(name, position):
        """Returns the change of the logits at each decoder position [B, L]."""
        changed = {k: v.copy() for k, v in batch.items()}
        changed[name][:, position] = 2
        return np.abs(np.asarray(forward("full")(weights, changed)) - before).max(-1)

    later = change("decoder_input_tokens", 3)
    assert later[:, :3].max() < 1e-5 and later[:, 3:].min() > 1e-3
    assert change("encoder_input_tokens", 7).min() > 1e-4


def test_encoder_attends_in_both_directions():
    transformer, weights = model("full"), random_params("full")
    encode = jax.jit(
        lambda tokens: transformer.apply(
            {"params": weights}, tokens, enable_dropout=False, method=transformer.encode
        )
    )
    tokens = example_batch(inputs=(6,), targets=(2,), widths=(6, 6))["encoder_input_tokens"]
    changed = tokens.copy()
    changed[0, 3] = 2
    assert np.abs(np.asarray(encode(changed) - encode(tokens)))[0].max(-1).min() > 1e-4


# --- dropout ---


def test_dropout_needs_a_key_and_differs_by_key():
    transformer = model("ia3", dropout_rate=0.5)
    weights = random_params("ia3")
    inputs = model_inputs(example_batch())

    @jax.jit
    def dropped(key):
        return transformer.apply({"params": weights}, **inputs, rngs={"dropout": key})

    a, b, again = (dropped(jax.random.PRNGKey(seed)) for seed in (0, 1, 0))
    np.testing.assert_array_equal(a, again)
    assert largest_difference(a, b) > 0.01
    assert largest_difference(a, forward("ia3")(weights, example_batch())) > 0.01


@pytest.mark.parametrize("source", ["t5x", "flaxformer"])
def test_dropout_is_that_of_t5x_or_flaxformer(monkeypatch, source):
    """Goldens of both (goldens/make_dropout.py): under equal masks the logits are equal.

    By hand: a mask [B, 1, D or F] for embeddings, MLPs and residual branches and [B, H, 1, L] for
    attention; for the encoder's output, the tenth after two layers, [B, L, D] in T5X's minimal T5.
    """
    shapes = []

    def bernoulli(key, p, shape):
        shapes.append((*shape, *[1] * (4 - len(shape))))
        return jnp.asarray(np.random.default_rng(len(shapes)).random(shape) < p)

    golden = np.load(archives.GOLDENS / "dropout.npz")
    sizes = {key[7:]: int(golden[key]) for key in golden if key.startswith("config/")}
    settings = {"broadcast_encoder_dropout": True} if source == "flaxformer" else {}
    config = network.T5Config(**sizes, dropout_rate=float(golden["rate"]), **settings)
    transformer = network.Transformer(config)
    weights = {
        path: np.random.default_rng(zlib.crc32(path.encode())).normal(0.0, 0.4, leaf.shape)
        for path, leaf in params.flatten(network.param_shapes(transformer)).items()
    }
    tokens = {key: golden[key] for key in golden if key.endswith("_tokens")}
    monkeypatch.setattr(jax.random, "bernoulli", bernoulli)
    rngs = {"dropout": jax.random.key(0)}
    logits = transformer.apply({"params": params.unflatten(weights)}, **tokens, rngs=rngs)
    assert shapes == [*map(tuple, golden[f"{source}/shapes"].tolist())]
    assert shapes[9] == (2, 6 if source == "t5x" else 1, 12, 1)
    real = tokens["decoder_target_tokens"] > 0
    assert largest_difference(logits[real], golden[f"{source}/logits"][real]) < 1e-5


# --- configuration ---


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("dtype", "float16", "float32 or bfloat16"),
        ("dropout_rate", 1.5, "got 1.5"),
        ("broadcast_encoder_dropout", 1, "must be True or False, got 1"),
    ],
)
def test_wrong_configuration(field, value, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **{field: value})


def test_config_round_trip():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    assert network.T5Config(**config.as_dict()) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 1.5),
        ("num_heads", True),
        ("emb_dim", "8"),
        ("sentence_dim", "8"),
        ("mlp_dim", 0),
    ],
)
def test_dimensions_are_positive_integers(field, value):
    with pytest.raises(InputError, match=f"T5Config.{field} must be a positive integer, got"):
        network.T5Config(**{field: value})
