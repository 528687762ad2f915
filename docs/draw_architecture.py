"""Draws docs/architecture.svg from the import table in tests/test_imports.py.

Run `python docs/draw_architecture.py` after a change of the table; a test compares the two.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parent

PURPOSES = {
    "core": "T5, adapters, routers, steps; kernels/",
    "runtime": "options, processes, loop, files",
    "data": "seqio tasks to numpy batches",
    "checkpoints": "base models, runs, adapters",
    "tasks": "P3, JSON lines, metrics",
    "analysis": "accuracy, routing, planning, counts",
    "train": "training",
    "evaluate": "zero-shot accuracy",
    "infer": "generation",
    "tools": "the other commands",
    "api": "from Python: load, rank, generate",
    "t5x_bridge": "the only import of t5x",
    "torch": "adapters on transformers' T5",
}
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 250, 50, 24, 36, 12


def layers(parts: Mapping[str, set[str]]) -> dict[str, int]:
    """Returns each part's height in the picture: one more than the highest part it imports."""
    heights: dict[str, int] = {}

    def height(part: str) -> int:
        if part not in heights:
            heights[part] = 1 + max(map(height, parts[part]), default=-1)
        return heights[part]

    for part in parts:
        height(part)
    return heights


def direct_imports(parts: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Returns the arrows that no path of other arrows implies (the transitive reduction)."""
    return [
        (part, target)
        for part, targets in parts.items()
        for target in sorted(targets)
        if not any(target in parts[other] for other in targets)
    ]


def draw(parts: Mapping[str, set[str]]) -> str:
    """Returns the SVG: a box for each part, an arrow from a part to each part it imports."""
    heights = layers(parts)
    rows = [[p for p in parts if heights[p] == h] for h in range(max(heights.values()) + 1)]
    columns = max(map(len, rows))
    width = columns * (WIDTH + GAP_X) - GAP_X + 2 * MARGIN
    height = len(rows) * (HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    corners: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(rows):
        row_width = len(row) * (WIDTH + GAP_X) - GAP_X
        for column, part in enumerate(row):
            x = (width - row_width) / 2 + column * (WIDTH + GAP_X)
            corners[part] = (x, MARGIN + (len(rows) - 1 - level) * (HEIGHT + GAP_Y))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" font-family="sans-serif" text-anchor="middle">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8"'
        ' markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for part, target in direct_imports(parts):
        (x1, y1), (x2, y2) = corners[part], corners[target]
        lines.append(
            f'<line x1="{x1 + WIDTH / 2}" y1="{y1 + HEIGHT}" x2="{x2 + WIDTH / 2}" y2="{y2}"'
            ' stroke="#555" stroke-width="1.5" marker-end="url(#tip)"/>'
        )
    for part, (x, y) in corners.items():
        lines += [
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#eef3fb"'
            ' stroke="#4a6fa5"/>',
            f'<text x="{x + WIDTH / 2}" y="{y + 21}" font-size="15"'
            f' font-weight="bold">{part}</text>',
            f'<text x="{x + WIDTH / 2}" y="{y + 39}" font-size="12">{PURPOSES[part]}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    """Writes the picture."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    from test_imports import PARTS

    (DOCS / "architecture.svg").write_text(draw(PARTS), encoding="utf-8")


if __name__ == "__main__":
    main()
