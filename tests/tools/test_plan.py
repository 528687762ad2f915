"""`pemoe plan`: flags, tables, and what documents show."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pemoe_jax.analysis.planning import cost_tables, flops
from pemoe_jax.core.errors import InputError
from pemoe_jax.tools import plan

ROOT = Path(__file__).parents[2]

TINY = ["--gin_file=models/t5_1_1_tiny.gin", "--gin_file=methods/mov.gin"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--mesh=4"],
            "--mesh must be DATAxMODEL or DATAxEXPERTxMODEL, optionally with :fsdp at the end, got"
            " '4'",
        ),
        (["--mesh=0x2"], "got '0x2'"),
        (["--mesh=2x1:zero"], "got '2x1:zero'"),
        (
            ["--mesh=2x1", "--batch_size=3"],
            "BATCH_SIZE must be a positive multiple of 2 (data-parallel size 2), got 3",
        ),
        (
            ["--mesh=1x1", "--mesh=2x1", "--batch_size=3"],
            "BATCH_SIZE must be a positive multiple of 2",
        ),
        (["--mesh=64x1"], "--mesh must have at most 2 devices (those of this process), got 64x1"),
        (["--batch_size=0"], "--batch_size must be at least 1, got 0"),
        (["--microbatches=0"], "--microbatches must be at least 1, got 0"),
        (["--microbatches=3", "--batch_size=4"], "× 3 microbatches"),
        (["--lengths=1024"], "--lengths must be INPUTS,TARGETS, got '1024'"),
        (["--hbm=lots"], "--hbm must be a size such as 32GB, or one of v2"),
        (["--output=plan.txt"], "--output must end in .md or .json"),
        (["--output=/no/such/folder/plan.md"], "--output must be in an existing folder"),
        (["--gin.TRAINABLE=['nothing']"], "TRAINABLE matched 0"),
        (["--gin.REMAT_POLICY=some"], "REMAT_POLICY must be one of ['none', 'minimal', 'full']"),
        (["--gin.NO_SUCH=1"], "no gin file has a macro of this name"),
    ],
)
def test_wrong_flags_are_a_one_line_error(capsys, monkeypatch, flags, message):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert plan.main([*TINY, *flags]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [([], "no gin file"), (TINY[:1], "TRAINABLE"), (TINY[1:], "MODEL is not set")],
)
def test_missing_files_are_named(capsys, monkeypatch, files, message):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert plan.main([*files, "--mesh=1x1"]) == 1
    assert message in capsys.readouterr().err


def test_parse_memory():
    assert plan.parse_memory("v4") == ("32 GB (v4)", 32 * 10**9)
    assert plan.parse_memory("79.5GB") == ("79.5 GB", 79_500_000_000)
    assert plan.parse_memory("16 GiB") == ("16 GiB", 16 * 2**30)
    with pytest.raises(InputError):
        plan.parse_memory("0GB")


def test_tables():
    """By hand: 1.5 GB of 2 GB is 75 %; 3 devices with 4 G each of 10 G compute 1.2 times that."""
    memory = dict(
        zip(cost_tables.MEMORY, [10**9, 10**6, 2 * 10**6, 1000, 496_999_000], strict=True)
    )
    model = flops.StepFlops(4 * 10**9, 5 * 10**9, 0, 10**9)
    collectives = {"all-reduce": (1234, 5_678_000)}
    cost = cost_tables.StepCost(
        "3x1", 3, memory, collectives, 4 * 10**9, model, 1000, "the whole model"
    )
    other = dataclasses.replace(cost, layout="1x3", collectives={})
    table, model_table = cost_tables.to_tables(
        "t", [cost, other], cost_tables.Chip("2 GB", 2 * 10**9)
    )
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.columns == ["on each device", "3x1", "1x3"]
    assert rows["frozen base"][0] == "1.00 GB" and rows["batch"][0] == "1.00 kB"
    assert rows["peak"][0] == "1.50 GB" and rows["of 2 GB"][0] == "75 %, fits"
    assert rows["all-reduce"] == ["1,234 × · 5.68 MB", "–"] and "all-gather" not in rows
    assert rows["FLOPs"][0] == "4.00 G"
    assert rows["multiple of the model's FLOPs"][0] == "1.20 ×"
    assert model_table.rows[0] == ["forward", "4.00 M", "4.00 G"]
    assert model_table.footer == [["total", "10.0 M", "10.0 G"]]
    small = cost_tables.to_tables("t", [cost], cost_tables.Chip("1 GB", 10**9))[0]
    assert ["of 1 GB", "150 %, too much"] in small.rows
    as_data = json.loads(cost_tables.to_json("t", [cost], cost_tables.Chip("1 GB", 10**9)))
    assert as_data["plans"][0]["peak"] == 1_500_000_000 and not as_data["plans"][0]["fits"]


def cells(markdown: str) -> dict[str, list[str]]:
    """Returns name -> values of the first table of costs."""
    table = markdown[markdown.index("| on each device ") :].split("\n\n")[0]
    header, _, *lines = table.splitlines()
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in [header, *lines])
    return {name: values for name, *values in rows}


def figure(cell: str) -> tuple[float, str]:
    """Returns the last number of a cell, and the rest of it: the unit, or whether it fits."""
    number = re.findall(r"[0-9][0-9.,]*", cell)[-1]
    return float(number.replace(",", "")), cell.replace(number, "")


XXL = r"""pemoe plan --gin_file=models/t5_1_1_xxl.gin --gin_file=methods/mov.gin \
  --gin.NUM_EXPERTS=60 --gin.DTYPE=bfloat16 --mesh 32x1:fsdp --mesh 4x8 --mesh 1x32 --hbm v4
"""


@pytest.mark.slow
def test_documents_show_what_their_command_prints():
    """XXL with MoV-60 on 32 devices; of three meshes only 4x8, since each compiles for a minute.

    All figures are equal, except the compiler's temporaries, which agree within 3 %.
    """
    texts = [(ROOT / document).read_text() for document in ("README.md", "docs/pods.md")]
    assert all(XXL in text for text in texts)
    table, other = map(cells, texts)
    assert table == other
    meshes = re.findall(r"--mesh (\S+)", XXL)
    assert table["on each device"] == [mesh.replace(":fsdp", " FSDP") for mesh in meshes]
    column = meshes.index("4x8")

    command = re.sub(r" --mesh (?!4x8)\S+", "", XXL.replace("\\\n", "")).split()[1:]
    process = subprocess.run(
        [sys.executable, "-m", "pemoe_jax", *command, "--markdown"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert process.returncode == 0, process.stderr
    printed = cells(process.stdout)
    # A kind of communication has no row if no mesh needs it.
    assert printed.keys() == {name for name in table if table[name][column] != "–"}
    estimates = {"activations and temporaries", "peak", "of 32 GB (v4)"}
    for name, (expected,) in printed.items():
        cell = table[name][column]
        if name not in estimates:
            assert cell == expected, name
            continue
        (value, unit), (expected_value, expected_unit) = figure(cell), figure(expected)
        assert unit == expected_unit and value == pytest.approx(expected_value, rel=0.03), name


@pytest.mark.slow
def test_end_to_end(tmp_path):
    """Eight virtual devices in a process of its own, with two meshes."""
    flags = ["--mesh=8x1", "--mesh=2x4", "--fsdp", "--batch_size=8", "--lengths=32,16"]
    command = [
        sys.executable,
        "-m",
        "pemoe_jax",
        "plan",
        *TINY,
        *flags,
        *(f"--gin.network.T5Config.num_{stack}_layers=1" for stack in ("encoder", "decoder")),
        "--hbm=v4",
        "--markdown",
    ]
    process = subprocess.run(
        [*command, "--gin.DTYPE=bfloat16", f"--output={tmp_path / 'plan.json'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "## t5_1_1_tiny mov-10: 8 rows of 32 + 16 tokens, bfloat16, adafactor" in process.stdout
    assert "8x1 FSDP" in process.stdout and "2x4 FSDP" in process.stdout
    assert os.listdir(tmp_path) == ["plan.json"]
    eight, two = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert eight["fits"] and eight["devices"] == two["devices"] == 8
    assert eight["collectives"]["all-gather"][1] > two["collectives"]["all-gather"][1]
    # The batch is divided over 2 devices instead of 8.
    assert two["memory"]["batch"] == 4 * eight["memory"]["batch"]
