"""docs/reproduction.md is what docs/write_reproduction.py makes of the committed results."""

import importlib.util
import json
from pathlib import Path

from pemoe_jax.analysis.zero_shot import claims, claims_report

ROOT = Path(__file__).parents[1]


def load_program():
    path = ROOT / "docs" / "write_reproduction.py"
    spec = importlib.util.spec_from_file_location("write_reproduction", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_results() -> dict:
    """Results of two claims, one reproduced and one not."""
    experiments = [
        {
            "experiment": name,
            **{"variant": name, "trainable": 5, "total": 2_000_000, "used": 5, "step": 300},
            **{"seeds": [0, 1], "accuracies": scores, "accuracy": sum(scores) / 2, "chance": 50.0},
            "datasets": {"cb": sum(scores) / 2},
        }
        for name, scores in {"full": [60.0, 62.0], "mov": [70.0, 70.0]}.items()
    ]
    common = {"paper": "unknown", "source": "a file", "expect": "better", "margin": 0.0}
    common |= {"seeds": [0, 1], "prompts": 3, "examples": 9, "datasets": ["*"]}
    results = [
        {
            **common,
            **{"id": name, "claim": f"{name} is better", "plus": [name], "minus": [other]},
            **{"differences": [sign * 10.0, sign * 8.0], "difference": sign * 9.0},
            **{"seed_interval": [sign * 9 - 1, sign * 9 + 1]},
            **{"prompt_interval": [sign * 9 - 2, sign * 9 + 2]},
            **{"agree": 2 if sign > 0 else 0, "verdict": verdict},
        }
        for name, other, sign, verdict in (
            ("mov", "full", 1, claims.REPRODUCED),
            ("full", "mov", -1, claims.NOT_REPRODUCED),
        )
    ]
    choice = {"experiment": "mov", "setting": "LEARNING_RATE", "value": "1e-2"}
    choice["scores"] = {"1e-2": 70.0, "3e-2": None}
    report = {"rule": "", "experiments": experiments, "choices": [choice], "claims": results}
    return {"sweeps": {"claims": report}}


def test_page_has_all_claims_and_their_numbers(tmp_path, monkeypatch):
    program = load_program()
    monkeypatch.setattr(program, "DOCS", tmp_path)
    (tmp_path / "claims").mkdir()
    report = small_results()["sweeps"]["claims"]
    (tmp_path / "claims" / "claims.json").write_text(json.dumps(report))
    program.main([str(tmp_path / "claims")])
    assert json.loads((tmp_path / "reproduction.json").read_text()) == small_results()
    assert (tmp_path / "reproduction.png").is_file()
    page = (tmp_path / "reproduction.md").read_text()
    assert "2 claims: 1 reproduced, 1 not reproduced." in page
    reproduced, failed = page.index("**Reproduced** (1):"), page.index("**Not reproduced** (1):")
    assert reproduced < failed < page.index("- full is better (paper: unknown; here -9.0 points")
    assert "2,000,000 parameters" in page and "take 300 steps" in page
    assert "| -10.0 to -8.0 | -11.0 to -7.0 | 0 of 2 |" in " ".join(page.split())
    assert "1e-2: 70.0  3e-2: –" in page and "61.0 ±1.4" in page


def test_page_is_that_of_the_committed_results():
    """All claims of gin/sweeps/ are on the page, with their texts of today."""
    program = load_program()
    file = ROOT / "docs" / "reproduction.json"
    for results in [json.loads(file.read_text())] if file.exists() else []:
        assert (ROOT / "docs" / "reproduction.md").read_text() == program.render(results)
        summary = claims_report.summary(program.merge(results))
        assert f"{summary}." in (ROOT / "README.md").read_text()
        for name, report in results["sweeps"].items():
            loaded = claims.load_claims(ROOT / "gin" / "sweeps" / f"{name}.json")
            for claim, entry in zip(loaded, report["claims"], strict=True):
                assert {**entry, **json.loads(json.dumps(vars(claim)))} == entry
