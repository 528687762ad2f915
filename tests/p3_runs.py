"""Flags for `pemoe_jax.train` on a folder of P3, with a tiny model of random weights."""

import pathlib

from pemoe_jax import tasks

VOCAB = pathlib.Path(tasks.__file__).parent / "quickstart" / "vocab.model"
_DIMENSIONS = {
    "emb_dim": 8,
    "num_heads": 1,
    "head_dim": 4,
    "mlp_dim": 8,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}


def train_flags(model_dir: pathlib.Path, task: str, **macros) -> list[str]:
    """(IA)3, 30 steps of 64 rows, a checkpoint every 5 of them."""
    settings = {
        "INITIAL_CHECKPOINT_PATH": None,
        "MODEL_DIR": model_dir,
        "MIXTURE_OR_TASK_NAME": task,
        "VOCAB_PATH": VOCAB,
        "VOCAB_SIZE": 1152,
        "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 8},
        "BATCH_SIZE": 64,
        "PACK": False,
        "TRAIN_STEPS": 30,
        "LOG_PERIOD": 10,
        "CHECKPOINT_PERIOD": 5,
        **macros,
    }
    return [
        "--gin_file=models/t5_1_1_tiny.gin",
        "--gin_file=methods/ia3.gin",
        "--gin_file=runs/finetune.gin",
        *(f"--gin.network.T5Config.{name}={value}" for name, value in _DIMENSIONS.items()),
        *(f"--gin.{name}={value}" for name, value in settings.items()),
    ]
