"""Beam search and sampling against Hugging Face; goldens/make_generate.py writes the goldens."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from pemoe_jax.core import beam_search, decoding, network, params, sampling

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
LENGTH = 12


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def model() -> network.Transformer:
    fields = {k.partition("/")[2]: int(v) for k, v in arrays("hf_t5").items() if "config/" in k}
    return network.Transformer(network.T5Config(**fields))


def weights(name: str) -> dict:
    prefix = "params/"
    flat = {k.removeprefix(prefix): v for k, v in arrays("hf_t5").items() if k.startswith(prefix)}
    return params.unflatten(flat | {"decoder/logits_dense/kernel": goldens()[f"{name}/kernel"]})


def goldens() -> dict[str, np.ndarray]:
    return arrays("hf_generate")


@pytest.mark.parametrize("name", ["flat", "middle", "sharp"])
@pytest.mark.parametrize("beams", [2, 3, 4])
def test_beams_are_those_of_hugging_face(name, beams):
    expected = {k: v for k, v in goldens().items() if k.startswith(f"{name}/beams {beams} ")}
    assert len(expected) == 6, "three length penalties, with early stopping and without"
    loaded, eos_id = weights(name), int(goldens()[f"{name}/eos_id"])
    for key, tokens in expected.items():
        _, _, _, penalty, _, early = key.split()
        np.testing.assert_array_equal(
            beam_search.beam_search_decode(
                *(model(), loaded, goldens()["inputs"], LENGTH, beams),
                *(float(penalty), early == "1", eos_id),
            ),
            tokens,
            err_msg=key,
        )


def test_the_goldens_differ():
    """By beams, penalty and early stopping; rows end at different times, and some do not."""
    for setting in ("beams {} penalty 1.0 early 0", "beams 3 penalty {} early 0"):
        values = (2, 3, 4) if "beams {}" in setting else (0.5, 1.0, 2.0)
        results = [goldens()[f"flat/{setting.format(value)}"].tobytes() for value in values]
        assert len(set(results)) > 1, setting
    early = [k for k in goldens() if k.endswith("early 1")]
    late = [goldens()[k.removesuffix("1") + "0"] for k in early]
    assert any((goldens()[k] != other).any() for k, other in zip(early, late, strict=True))
    lengths = {int(n) for k in early for n in (goldens()[k] > 0).sum(1)}
    assert len(lengths) > 4 and LENGTH in lengths


def test_greedy_and_one_beam_are_those_of_hugging_face():
    for name in ("flat", "middle", "sharp"):
        loaded, eos_id = weights(name), int(goldens()[f"{name}/eos_id"])
        settings = model(), loaded, goldens()["inputs"], LENGTH
        expected = goldens()[f"{name}/greedy"]
        np.testing.assert_array_equal(decoding.greedy_decode(*settings, eos_id), expected)
        single = beam_search.beam_search_decode(*settings, 1, 1.0, True, eos_id)
        np.testing.assert_array_equal(single, expected)


def test_rows_of_a_beam_search_do_not_depend_on_each_other():
    loaded, inputs = weights("flat"), goldens()["inputs"]
    eos_id = int(goldens()["flat/eos_id"])
    search = functools.partial(
        beam_search.beam_search_decode, model(), loaded, max_decode_length=LENGTH, num_beams=3
    )
    together = np.asarray(search(encoder_input_tokens=inputs, eos_id=eos_id))
    for row in (0, 3):
        copies = np.repeat(inputs[row : row + 1], 6, axis=0)
        alone = np.asarray(search(encoder_input_tokens=copies, eos_id=eos_id))
        np.testing.assert_array_equal(alone, np.repeat(together[row : row + 1], 6, axis=0))


def test_logits_that_are_not_finite_end_a_beam_search():
    flat = params.flatten(weights("flat"))
    flat["decoder/decoder_norm/scale"] = np.full(20, np.nan, np.float32)
    tokens = beam_search.beam_search_decode(
        model(), params.unflatten(flat), goldens()["inputs"], LENGTH, 3
    )
    assert (np.asarray(tokens)[:, 0] == decoding.NOT_FINITE).all()


def test_top_k_and_top_p_are_those_of_hugging_face():
    cases = [key for key in goldens() if key.startswith("filtered/")]
    assert len(cases) == 5
    for key in cases:
        _, top_k, _, top_p = key.split()
        filtered = sampling.truncate_logits(goldens()["logits"], int(top_k), float(top_p))
        np.testing.assert_array_equal(filtered, goldens()[key], err_msg=key)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 64, 1.0), (0.5, 64, 1.0), (2.0, 6, 1.0), (1.0, 64, 0.5)],
)
def test_draws_have_the_probabilities_of_the_logits(temperature, top_k, top_p):
    """The first tokens of 4096 rows of one input, against the logits of the network."""
    count = 4096
    inputs, loaded = goldens()["inputs"][:1], weights("flat")
    zeros = np.zeros((1, 1), np.int32)
    logits = model().apply({"params": loaded}, inputs, zeros, zeros + 1, enable_dropout=False)[0, 0]
    probs = np.asarray(jax.nn.softmax(logits / temperature))
    order = np.argsort(-probs)
    kept = order[:top_k]
    kept = kept[: 1 + int((np.cumsum(probs[kept] / probs[kept].sum()) < top_p).sum())]
    expected = np.zeros_like(probs)
    expected[kept] = probs[kept] / probs[kept].sum()
    tokens = sampling.sample_decode(
        *(model(), loaded, np.repeat(inputs, count, axis=0), 1, 7, np.arange(count)),
        *(temperature, top_k, top_p),
        truncate=top_k < 64 or top_p < 1,
    )
    counts = np.bincount(np.asarray(tokens)[:, 0], minlength=64)
    assert set(np.flatnonzero(counts)) <= set(kept)
    # χ², with the tokens of fewer than five expected draws as one; five standard deviations
    is_rare = count * expected < 5
    drawn, due = (np.append(a[~is_rare], a[is_rare].sum()) for a in (counts, count * expected))
    chi_square = np.sum((drawn - due) ** 2 / np.maximum(due, 1))
    assert chi_square < len(due) + 5 * np.sqrt(2 * len(due))


def test_draws_depend_on_the_row_and_the_seed_alone():
    loaded, inputs = weights("flat"), goldens()["inputs"]
    draw = functools.partial(
        sampling.sample_decode, model(), loaded, max_decode_length=8, eos_id=63, truncate=False
    )
    rows = np.arange(6)
    settings = {"temperature": 1.0, "top_k": 64, "top_p": 1.0}
    tokens = np.asarray(draw(encoder_input_tokens=inputs, seed=0, row_ids=rows, **settings))
    flipped = draw(encoder_input_tokens=inputs[::-1], seed=0, row_ids=rows[::-1], **settings)
    np.testing.assert_array_equal(flipped, tokens[::-1])
    other = np.asarray(draw(encoder_input_tokens=inputs, seed=1, row_ids=rows, **settings))
    assert (other != tokens).any(axis=1).all()
    same = np.asarray(
        draw(encoder_input_tokens=np.repeat(inputs[:1], 6, 0), seed=0, row_ids=rows, **settings)
    )
    assert len({row.tobytes() for row in same}) == 6, "rows of one input draw by themselves"
