"""The quickstart bundle: a sample of prompted tasks, its vocabulary and a pretrained base model."""

from pathlib import Path

_HERE = Path(__file__).parent


def sample() -> str:
    """Returns the path of the folder of <task>/<split>.jsonl."""
    return str(_HERE / "sample")


def vocabulary() -> str:
    """Returns the path of the SentencePiece model."""
    return str(_HERE / "vocab.model")


def base() -> str:
    """Returns the path of the base model; `gin/models/quickstart.gin` has its dimensions."""
    return str(_HERE / "base.safetensors")
