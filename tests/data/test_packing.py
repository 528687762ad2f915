"""Packing of examples into rows and batches."""

import numpy as np

from pemoe_jax.data import packing


def test_packing_is_next_fit_and_truncates():
    def example(inputs, targets):
        return np.arange(1, inputs + 1), np.arange(1, targets + 1)

    # Full by inputs: 3 + 4 > 6; by targets: 2 + 3 > 4; 9 is truncated to 6; an empty input.
    sizes = [(3, 1), (4, 2), (1, 3), (9, 1), (0, 2), (2, 2)]
    batches = packing.BatchIterator(
        iter([example(*size) for size in sizes]), {"inputs": 6, "targets": 4}, 1, True, start=10
    )
    segment_ids, positions = [], []
    for batch in batches:
        sides = ("encoder", "decoder")
        segment_ids.append([batch[f"{side}_segment_ids"][0].tolist() for side in sides])
        positions.append(batches.position["examples"])
    assert segment_ids == [
        [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0]],
        [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0]],
        [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0]],
        [[1, 1, 1, 1, 1, 1], [1, 2, 2, 0]],
        [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0]],
    ]
    assert positions == [11, 12, 13, 15, 16]


def test_last_batch_is_padded_or_dropped():
    example = np.ones(2, np.int32), np.ones(1, np.int32)
    lengths = {"inputs": 2, "targets": 2}
    padded = list(packing.BatchIterator([example] * 3, lengths, 2, pack=False, pad_last=True))
    assert [batch["decoder_loss_weights"].sum() for batch in padded] == [2, 1]
    assert padded[1]["encoder_input_tokens"].tolist() == [[1, 1], [0, 0]]
    assert len(list(packing.BatchIterator([example] * 3, lengths, 2, pack=False))) == 1
