"""Archives of golden files."""

import pathlib
import tarfile

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def unpack(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Unpacks goldens/<name>.tar.gz into a folder, and returns it."""
    with tarfile.open(GOLDENS / f"{name}.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    return folder
