"""Writes docs/reproduction.md and .png from docs/reproduction.json, the results of the claims.

`python docs/write_reproduction.py /tmp/claims` first writes reproduction.json from the claims.json
of the sweep in /tmp/claims; folders of further sweeps may follow. A folder must have the name of
its sweep's file in gin/sweeps/, here `claims`. Without arguments the existing reproduction.json is
used. A test compares the page with the output of this program.
"""

import json
import statistics
import sys
from pathlib import Path

from pemoe_jax.analysis.tables import markdown_table
from pemoe_jax.analysis.zero_shot import claims, claims_report
from pemoe_jax.tools import sweep_choices

DOCS = Path(__file__).parent
VERDICTS = (claims.REPRODUCED, claims.NOT_REPRODUCED, claims.UNDECIDED, claims.NOT_MEASURED)
INTRODUCTION = """\
# Do the papers' claims hold here?

This page is written by `docs/write_reproduction.py` from `docs/reproduction.json`, the results of

```
pemoe embed --gin_file=runs/quickstart_embed.gin
{commands}
```

which `make claims` runs, in one to two hours on two cores. When 90 of the runs were repeated on the
same machine, all accuracies were the same.

The claims paraphrase those of arXiv 2309.05444 (MoV, MoLORA) and arXiv 2305.14705 (FLAN-MoE:
FLAN-Switch, -GS for GShard, -ST for ST-MoE, -EC for expert choice). {files} lists them with the
papers' figures, their sources and the experiments to compare. FLAN-MoE's ablations of freezing and
auxiliary losses are not among them: [flan_moe.md](flan_moe.md) has those.

**What differs from the papers.** The base has {total:,} parameters (theirs have 0.25 to 11 billion)
and is pretrained on text about a small invented world; the tasks ask about this world
([quickstart.md](quickstart.md)). Sparse models are upcycled from it, not pretrained. Most trainings
take {steps:,} steps of AdamW, not up to 500,000 of Adafactor. Learning rates are chosen by accuracy
on validation splits of training tasks, one for each method; most of its variants (experts, routing)
use the same. A claim that holds here may fail at the papers' size, and the reverse. The papers'
figures are quoted second-hand; some are unknown.

**How to read it.** A difference is in percentage points of the accuracy on held-out task types, the
mean over their prompts (chance {chance:.1f}, the base before tuning {base:.1f}). A positive one
favors the claim. It has two 95 % intervals: over seeds, and over prompts and examples. A claim is
reproduced if both lie above the bound, not reproduced if both lie below it, and undecided
otherwise. The bound is 0, and -1 for "as good as". Seeds agree if their difference is above it.
Undecided does not mean equal: half of the intervals over seeds extend {reach:.1f} points or more to
either side. Verdicts are not corrected for the number of claims. The last four claims are scored on
job_board alone, with 4 prompts of 20 examples; the last one compares the two before it that begin
with "Instruction tuning helps".

Claims and rule were fixed before any result. The number of seeds was not: most experiments first
ran with three, and after those results all were given five.

**Result.** {summary}

![Difference of each claim with its intervals](reproduction.png)
"""


def render(results: dict) -> str:
    """Returns the text of docs/reproduction.md."""
    sweeps = results["sweeps"]
    merged = merge(results)
    first = next(iter(sweeps.values()))
    base, tuned = (
        [row for row in first["experiments"] if row["experiment"] == name]
        for name in ("base", "full")
    )
    parts = [
        INTRODUCTION.format(
            commands="\n".join(
                f"pemoe sweep @sweeps/{name}.txt --output=/tmp/{name} --jobs=2" for name in sweeps
            ),
            files=", ".join(f"`gin/sweeps/{name}.json`" for name in sweeps),
            total=tuned[0]["total"],
            steps=tuned[0]["step"],
            reach=_median_reach(merged["claims"]),
            chance=tuned[0]["chance"],
            base=base[0]["accuracy"] if base else float("nan"),
            summary=claims_report.summary(merged) + ".",
        ).rstrip()
    ]
    for verdict in VERDICTS:
        members = [claim for claim in merged["claims"] if claim["verdict"] == verdict]
        if members:
            lines = [
                f"- {claim['claim']} (paper: {claim['paper']}; {_measured(claim)})"
                for claim in members
            ]
            parts.append(f"**{verdict.capitalize()}** ({len(members)}):\n\n" + "\n".join(lines))
    notes: list[str] = []
    for name, report in sweeps.items():
        tables = claims_report.to_tables(report)
        if report["choices"]:
            tables.append(sweep_choices.choices_table(report["choices"]))
        parts.append(f"## `sweeps/{name}.txt`")
        for table in tables:
            parts.append(f"### {table.title}\n\n{markdown_table(table)}")
            notes += [note for note in table.notes if note not in notes]
    parts.append("## How to read the tables\n\n" + "\n\n".join(notes))
    return "\n\n".join(parts) + "\n"


def _median_reach(results: list[dict]) -> float:
    """Returns the median half-width of the intervals over seeds, in percentage points."""
    intervals = [claim["seed_interval"] for claim in results if claim["seed_interval"]]
    return statistics.median((high - low) / 2 for low, high in intervals)


def _measured(claim: dict) -> str:
    if claim["difference"] is None:
        return "no result"
    agree = f"{claim['agree']} of {len(claim['seeds'])} seeds agree"
    # Without the sign of -0.0.
    return f"here {round(claim['difference'], 1) + 0.0:+.1f} points, {agree}"


def merge(results: dict) -> dict:
    """Returns one report with the claims of all sweeps."""
    return {"claims": [c for report in results["sweeps"].values() for c in report["claims"]]}


def main(folders: list[str]) -> None:
    """Writes the page and its plot; with folders of sweeps, first writes reproduction.json."""
    file = DOCS / "reproduction.json"
    if folders:
        sweeps = {
            Path(folder).name: json.loads(
                (Path(folder) / "claims.json").read_text(encoding="utf-8")
            )
            for folder in folders
        }
        file.write_text(
            json.dumps({"sweeps": sweeps}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    results = json.loads(file.read_text(encoding="utf-8"))
    claims_report.draw_forest(merge(results), DOCS / "reproduction.png")
    (DOCS / "reproduction.md").write_text(render(results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
