"""`pemoe count`: counts by hand, flags, width on the terminal, memory and time."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pemoe_jax.analysis import counts, tables
from pemoe_jax.runtime import gin_flags
from pemoe_jax.tools import count

ROOT = Path(__file__).parents[2]
XL = ["--gin_file=models/t5_1_1_xl.gin"]
FLAN_FILES = ("flan_switch", "flan_gshard", "flan_st", "flan_ec")
METHOD_FILES = ("full", "ia3", "lora", "mov", "molora", *FLAN_FILES)


def number(cell: str) -> int:
    return 0 if cell in ("–", "") else int(cell.replace(",", ""))


def read(markdown: str) -> dict[str, dict[str, dict[str, str]]]:
    """Returns title -> first cell of a row -> column -> cell."""
    result: dict[str, dict[str, dict[str, str]]] = {}
    for part in markdown.split("## ")[1:]:
        title, *lines = part.splitlines()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
        columns, _rule, *rows = rows
        result[title] = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    return result


# Counts XXL, prints the process's peak memory in kB (VmHWM: rusage would include the parent's) and
# CPU time, then prints all sizes and methods.
_SCRIPT = """
import contextlib, io, sys, time
from pemoe_jax.tools import count
with contextlib.redirect_stdout(io.StringIO()) as out:
    code = count.main(["--gin_file=models/t5_1_1_xxl.gin", "--gin_file=methods/mov.gin"])
assert code == 0 and "11,135,332,352" in out.getvalue(), out.getvalue()
status = open("/proc/self/status").read()
print(status.split("VmHWM:")[1].split()[0], time.process_time())
sys.exit(count.main(["--markdown"]))
"""


@pytest.fixture(scope="module")
def process() -> str:
    """Returns the output of the script, in a process of its own."""
    command = [sys.executable, "-c", _SCRIPT]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def sizes(process) -> dict[str, list[dict[str, dict[str, str]]]]:
    """Returns size -> [table of methods, table of their sites]."""
    tables_by_size: dict[str, list[dict[str, dict[str, str]]]] = {}
    for title, rows in read(process).items():
        tables_by_size.setdefault(title.partition(":")[0], []).append(rows)
    return tables_by_size


def run(capsys, *flags: str) -> dict[str, dict[str, dict[str, str]]]:
    assert count.main([*flags, "--markdown"]) == 0, capsys.readouterr().err
    return read(capsys.readouterr().out)


# --- counts by hand ---

# T5 v1.1 XL: D = H·K = 2048, K = 64, F = 5120; 72 attention and 48 MLP blocks.
VECTORS = 72 * 2 * 2048 + 48 * 5120  # (IA)³ at key, value and gate: 540,672
VECTOR_ROUTERS = 72 * 2 * 64 + 48 * 5120  # of one expert; by head at key and value
PAIRS = 72 * 4 * 4 * (2048 + 2048) + 48 * 2 * 4 * (2048 + 5120)  # LoRA of rank 4: 7,471,104
PAIR_ROUTERS = 72 * 4 * 2048 + 48 * (2048 + 5120)
BASE = 2_849_757_184  # by hand in test_gin.py


@pytest.mark.parametrize(
    ("method", "trainable"),
    [
        ("full", BASE),
        ("ia3", VECTORS),
        ("lora r4", PAIRS),
        ("mov-10", 10 * (VECTORS + VECTOR_ROUTERS)),
        ("mov-30", 30 * (VECTORS + VECTOR_ROUTERS)),
        ("mov-60", 60 * (VECTORS + VECTOR_ROUTERS)),
        ("molora-10 r4", 10 * (PAIRS + PAIR_ROUTERS)),
        ("molora-15 r4", 15 * (PAIRS + PAIR_ROUTERS)),
    ],
)
def test_xl_by_hand(sizes, method, trainable):
    row = sizes["t5_1_1_xl"][0][method]
    assert number(row["trainable"]) == trainable
    assert number(row["total"]) == BASE + (0 if method == "full" else trainable)


def test_sites_of_xl_by_hand(sizes):
    """mov-30: key 72·2048·30, gate 48·5120·30, routers 30·(72·2·64 + 48·5120)."""
    row = sizes["t5_1_1_xl"][1]["mov-30"]
    assert {site: number(cell) for site, cell in row.items() if site != "method"} == {
        "mlp/experts": 0,
        "base": 0,
        "query": 0,
        "key": 4_423_680,
        "value": 4_423_680,
        "out": 0,
        "wi_0": 0,
        "gate": 7_372_800,
        "wo": 0,
        "routers": 7_649_280,
    }


def test_sites_and_routers_sum_to_the_trainable_parameters(sizes):
    for size, (methods, sites) in sizes.items():
        assert set(methods) - set(sites) == {"full"}, size
        for method, row in sites.items():
            total = sum(number(cell) for name, cell in row.items() if name != "method")
            assert total == number(methods[method]["trainable"]), (size, method)


def test_shares(sizes):
    """Of base and adapters together: 540,672 / 2,850,297,856 = 0.01897 %."""
    shares = {method: row["share"] for method, row in sizes["t5_1_1_xl"][0].items()}
    assert shares["ia3"] == "0.0190 %"
    assert shares["mov-10"] == "0.278 %"  # 7,956,480 / 2,857,713,664 = 0.27842 %
    assert shares["molora-15 r4"] == "4.24 %"  # 126,074,880 / 2,975,832,064 = 4.23662 %
    of_base = {method: row["of base"] for method, row in sizes["t5_1_1_xl"][0].items()}
    assert of_base["mov-10"] == "0.279 %"  # 7,956,480 / 2,849,757,184 = 0.27920 %
    assert of_base["molora-15 r4"] == "4.42 %"  # 126,074,880 / 2,849,757,184 = 4.42406 %
    assert [methods["full"]["share"] for methods, _ in sizes.values()] == ["100 %"] * 5


def test_every_size_and_method_file_is_in_the_table(sizes):
    models = {file.stem for file in (gin_flags.GIN_DIR / "models").glob("t5_1_1_*.gin")}
    assert set(sizes) == models - {"t5_1_1_tiny"}
    files = {file.stem for file in (gin_flags.GIN_DIR / "methods").glob("*.gin")}
    assert set(METHOD_FILES) <= files
    assert {method for method, _ in count.METHODS} == set(METHOD_FILES)
    for methods, _ in sizes.values():
        assert len(methods) == len(count.METHODS)


def test_sparse_models_of_base_by_hand(sizes):
    """T5 v1.1 Base: D = 768, F = 2048, 6 + 6 sparse layers; dense methods use all parameters."""
    matrices, routers, dense = 3 * 768 * 2048, 12 * 768 * 8, 247_577_856
    methods, sites = sizes["t5_1_1_base"]
    for method, top_k, extra in (("switch", 1, 0), ("gshard", 2, 0), ("ec", 2, 0), ("st", 2, 1)):
        row, sparse = methods[f"flan_{method}-8"], sites[f"flan_{method}-8"]
        total = dense + 12 * (7 + extra) * matrices + routers + extra * 12 * 768
        assert number(row["total"]) == number(row["trainable"]) == total
        assert number(row["activated"]) == total - 12 * (8 - top_k) * matrices
        assert number(sparse["mlp/experts"]) == 12 * 8 * matrices
        assert number(sparse["routers"]) == routers
    assert {
        number(methods[m]["activated"]) - number(methods[m]["total"]) for m in ("full", "mov-10")
    } == {0}
    flops = {method: row["FLOPs"] for method, row in methods.items()}
    # Of an input and a target token: 24 MLPs, 36 attentions of 4·768², logits 768·32128.
    assert flops["full"] == "446 M"
    assert flops["flan_switch-8"] == "446 M" and methods["flan_switch-8"]["with places"] == "474 M"
    # Another expert in each of 12 layers: 446 + 113; places for 1.25 experts, however large k is.
    assert flops["flan_gshard-8"] == "559 M" and methods["flan_gshard-8"]["with places"] == "474 M"
    assert flops["flan_ec-8"] == methods["flan_ec-8"]["with places"] == "559 M"


def test_documents_show_what_the_command_prints(sizes):
    text = (ROOT / "docs" / "flan_moe.md").read_text()
    table = text.split("| T5 v1.1 Base |")[1].split("\n\n")[0].splitlines()[2:]
    documented = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table]
    methods = ["full", "mov-10", "molora-10 r4", *(f"{name}-8" for name in FLAN_FILES)]
    columns = ("total", "activated", "FLOPs", "with places")
    rows = sizes["t5_1_1_base"][0]
    assert documented == [[rows[method][column] for column in columns] for method in methods]


@pytest.mark.parametrize(
    ("page", "method"),
    [
        *(("full", "full"), ("ia3", "ia3"), ("lora", "lora r4")),
        *(("mov", "mov-10"), ("molora", "molora-10 r4")),
    ],
)
def test_pages_of_methods_show_what_the_command_prints(sizes, page, method):
    table = (ROOT / "docs" / "methods" / f"{page}.md").read_text().split("| base |")[1]
    documented = [line.split(" | ") for line in table.split("\n\n")[0].splitlines()[2:]]
    for (name, base, trainable, share), size in zip(
        documented, ("large", "xl", "xxl"), strict=True
    ):
        rows = sizes[f"t5_1_1_{size}"][0]
        assert name.lower() == f"| t5 v1.1 {size}"
        assert base == rows["full"]["total"]
        assert [trainable, share.strip("| ")] == [rows[method][k] for k in ("trainable", "share")]


def test_adapters_of_a_sparse_model(capsys):
    """Sites of the MLP are in the 12 dense layers, those of attention in all 36."""
    flags = [f"--gin_file={name}.gin" for name in ("models/t5_1_1_base", "methods/flan_switch")]
    flags += ["--gin_file=methods/mov.gin", "--gin.sparse.Sparse.num_experts=8"]
    assert count.main([*flags, "--markdown"]) == 0
    text = capsys.readouterr().out
    summary, sites = read(text).values()
    assert summary["mov-10 on 8 experts"]["total"] == f"{644_013_312 + 1_090_560:,}"
    assert sites["key"]["blocks"] == "36" and sites["gate"]["blocks"] == "12"
    assert "adapters of MLP sites are in its dense layers alone" in text


# --- published figures ---


def test_published_figures_have_a_source(sizes):
    published = {
        (size, method): row["paper"]
        for size, (methods, _) in sizes.items()
        for method, row in methods.items()
        if row.get("paper", "–") != "–"
    }
    assert published == {
        ("t5_1_1_xl", "ia3"): "0.018 %",
        ("t5_1_1_xl", "lora r4"): "0.3 %",
        ("t5_1_1_xl", "mov-10"): "0.32 %",
        ("t5_1_1_xl", "mov-30"): "0.68 %",
        ("t5_1_1_xl", "molora-15 r4"): "4.69 %",
        ("t5_1_1_xxl", "mov-60"): "0.86 %",
    }
    assert "paper" not in sizes["t5_1_1_large"][0]["ia3"]


# Parameters of one adapter at T5 3B in the appendix of arXiv 2205.05638. By hand: (IA)³ and LoRA
# of rank 4 at q, k, v, o, wi_0, wi_1, wo with all norms, 2·D in an encoder layer, 3·D in a decoder
# layer, D at the end of a stack.
STATED_VECTORS, STATED_PAIRS = 540e3, 9.1e6
PAIRS_AND_NORMS = PAIRS + 48 * 4 * (2048 + 5120) + 24 * 5 * 2048 + 2 * 2048


def test_arithmetic_of_the_note_on_published_figures():
    assert round(VECTORS, -4) == STATED_VECTORS
    assert PAIRS_AND_NORMS == 9_097_216 and round(PAIRS_AND_NORMS, -5) == STATED_PAIRS

    def fits(figure, experts, adapter, routers=4.2e6):
        digits = len(figure.partition(".")[2])
        return f"{100 * (experts * adapter + routers) / 3e9:.{digits}f}" == figure

    assert fits("0.018", 1, STATED_VECTORS, 0) and fits("0.3", 1, STATED_PAIRS, 0)
    assert fits("0.32", 10, STATED_VECTORS) and fits("0.68", 30, STATED_VECTORS)
    assert fits("4.69", 15, STATED_PAIRS)
    # The routers of the paper's code do not fit.
    assert not fits("0.32", 10, STATED_VECTORS, 10 * VECTOR_ROUTERS)
    assert not fits("0.68", 30, STATED_VECTORS, 30 * VECTOR_ROUTERS)
    # XXL: D = H·K = 4096, F = 10240
    routers = 60 * (72 * 2 * 64 + 48 * 10240)
    assert f"{100 * (60 * (72 * 2 * 4096 + 48 * 10240) + routers) / 11e9:.2f}" == "0.86"


# --- a configured model ---


def test_flags_change_the_count(capsys):
    """LoRA of rank 16 at wi_1 too: 48·16·(2048 + 5120) = 5,505,024."""
    summary, sites = run(
        capsys,
        *XL,
        "--gin_file=methods/lora.gin",
        "--gin.RANK=16",
        "--gin.adapters.Adapters.wi_1=@adapters.LoRAExperts",
    ).values()
    assert number(summary["lora r16"]["trainable"]) == 4 * PAIRS + 5_505_024
    assert sites["wi_1"] == {
        "site": "wi_1",
        "blocks": "48",
        "experts": "5,505,024",
        "routers": "–",
        "trainable": "5,505,024",
    }
    assert list(sites) == ["query", "key", "value", "out", "wi_0", "wi_1", "wo", "total"]


def test_sites_of_one_configuration(capsys):
    summary, sites = run(capsys, *XL, "--gin_file=methods/mov.gin", "--gin.NUM_EXPERTS=30").values()
    assert summary["mov-30"]["paper"] == "0.68 %"
    gate = 48 * 30 * 5120
    assert [number(sites["gate"][c]) for c in ("blocks", "experts", "routers", "trainable")] == [
        48,
        gate,
        gate,
        2 * gate,
    ]
    for column in ("experts", "routers", "trainable"):
        parts = [number(row[column]) for site, row in sites.items() if site != "total"]
        assert number(sites["total"][column]) == sum(parts)


def test_other_configurations_have_no_published_figure(capsys):
    """Another site, or trainable norms: 24·5·2048 + 2·2048 = 249,856."""
    wi_1 = "--gin.adapters.Adapters.wi_1=@adapters.LoRAExperts"
    (summary, _) = run(capsys, *XL, "--gin_file=methods/lora.gin", wi_1).values()
    assert "paper" not in summary["lora r4"]
    norms = "--gin.TRAINABLE=['.*_adapter/.*', '.*norm/scale']"
    summary, sites = run(capsys, *XL, "--gin_file=methods/ia3.gin", norms).values()
    assert "paper" not in summary["ia3"]
    assert number(sites["base"]["trainable"]) == 249_856
    assert number(sites["total"]["trainable"]) == VECTORS + 249_856


def test_full_fine_tuning_has_no_sites(capsys):
    (summary,) = run(capsys, *XL, "--gin_file=methods/full.gin").values()
    assert summary["full"]["share"] == "100 %"


def test_a_run_file_is_accepted(capsys):
    flags = ["--gin_file=methods/mov.gin", "--gin_file=runs/quickstart.gin"]
    (summary, _) = run(capsys, *flags).values()
    assert number(summary["mov-10"]["trainable"]) == 39_680  # docs/quickstart.md


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (XL, "TRAINABLE is not set: pass --gin_file=methods/…"),
        (["--gin_file=methods/mov.gin"], "MODEL is not set: pass --gin_file=models/…"),
        (["--gin.NUM_EXPERTS=3"], "no gin file"),
        (["--gin_file=models/no_such.gin"], "no_such.gin"),
        ([*XL, "--gin_file=methods/mov.gin", "--gin.NUM_EXPERT=3"], "close: NUM_EXPERTS"),
        (
            [*XL, "--gin_file=methods/mov.gin", "--gin.NUM_EXPERTS=0"],
            "NUM_EXPERTS must be a positive integer up to 16777216, got 0",
        ),
        ([*XL, "--gin_file=methods/mov.gin", "--gin.TRAINABLE=['x']"], "TRAINABLE matched 0 of"),
    ],
)
def test_wrong_flags_are_a_one_line_error(capsys, flags, message):
    assert count.main(flags) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and message in err
    assert err.count("\n") == 1


# --- the terminal ---


@pytest.fixture(scope="module")
def xxl_tables() -> list[tables.Table]:
    """Returns the tables of MoLORA at XXL."""
    args = count.FLAGS.parse_args([])
    files = ["models/t5_1_1_xxl.gin", "methods/molora.gin"]
    return counts.site_tables("xxl", count._count_files(args, files, []))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_the_terminal(xxl_tables, capsys, monkeypatch, width):
    """No line is wider, and no number is wrapped."""
    monkeypatch.setenv("COLUMNS", str(width))
    tables.print_tables(xxl_tables)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert "11,303,432,192" in out and "168,099,840" in out


def test_a_wide_table_is_split_by_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    wide = counts.ParameterCount(
        "molora-15 r4",
        10**9,
        2 * 10**9,
        10**9,
        {s: counts.SiteCount(72, 10**8, 0) for s in counts.SITES},
    )
    tables.print_tables(counts.method_tables("size", [wide]))
    lines = capsys.readouterr().out.splitlines()
    headings = [line.split() for line in lines if line.startswith("method ")]
    assert len(headings) == 3  # the methods, and two halves of their sites
    assert [name for heading in headings[1:] for name in heading[1:]] == [
        *counts.SITES,
        "routers",
        "base",
    ]
    assert max(map(len, lines)) <= 80
    assert sum(line.count("100,000,000") for line in lines) == len(counts.SITES)


# --- the process ---


def test_xxl_needs_no_weights(process):
    """11B parameters, 44 GB in float32, are counted in seconds with less than 1 GB."""
    kilobytes, seconds = map(float, process.splitlines()[0].split())
    assert 1e4 < kilobytes < 1e6
    assert seconds < 10


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from pemoe_jax.tools import count\n"
        "try: count.main(['--help'])\n"
        "finally: print(sorted({'jax', 'flax', 'gin', 'rich', 'seqio'} & set(sys.modules)))"
    )
    help_process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert help_process.stdout.rstrip().endswith("[]")
    assert "usage: pemoe count" in help_process.stdout
    for expected in ("--gin_file", "--markdown", "NUM_EXPERTS", "models/t5_1_1_xxl.gin"):
        assert expected in help_process.stdout
    assert re.search(r"^example:$", help_process.stdout, re.MULTILINE)
