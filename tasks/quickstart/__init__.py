"""What the quickstart bundles: a sample of prompted tasks, its vocabulary and a pretrained base."""

from pathlib import Path

_HERE = Path(__file__).parent


def sample() -> str:
    """The folder of <task>/<split>.jsonl."""
    return str(_HERE / "sample")


def vocabulary() -> str:
    """The SentencePiece file of sample and base."""
    return str(_HERE / "vocab.model")


def base() -> str:
    """The pretrained model; `gin/models/quickstart.gin` has its dimensions."""
    return str(_HERE / "base.safetensors")
