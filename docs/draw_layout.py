"""Draws attention-layout.svg from `sglang_apb.layout`: python docs/draw_layout.py

Rows are queries, columns are keys, a cell is a token. Which tokens are passed on is made up here.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from sglang_apb.config import ApbConfig
from sglang_apb.layout import Layout, Span, plan

CELL = 12
LEFT, TOP = 96, 60
FONT = 'font-family="Helvetica, Arial, DejaVu Sans, sans-serif"'
COLOURS = {
    "anchor": ("#e69f00", "anchor: the context's first tokens"),
    "passing": ("#009e73", "passing: the tokens of earlier blocks that matter most to the question"),
    "local": ("#56b4e9", "its own block, causally"),
    "question": ("#cc79a7", "the question: the whole context, and itself causally"),
    "skipped": ("#eeeeee", "exact attention would do this too; APB skips it"),
}


def passed_on(layout: Layout, block: int) -> list[int]:
    """Tokens of `block` that it hands on, spread over its candidates."""
    span, count = layout.candidates(block), layout.num_passing(block)
    return [span.start + (2 * i + 1) * len(span) // (2 * count) for i in range(count)]


def kind(layout: Layout, query: int, key: int) -> str:
    """Why `query` sees `key`, which is not after it; a key of COLOURS."""
    if query >= layout.context_end:
        return "question"
    block = next(i for i, span in enumerate(layout.blocks) if span.start <= query < span.end)
    if key >= layout.blocks[block].start:
        return "local"
    if key < layout.anchor:
        return "anchor"
    return "passing" if any(key in passed_on(layout, earlier) for earlier in range(block)) else "skipped"


def cells(layout: Layout) -> list[str]:
    """One rectangle for each run of cells of one colour in a row."""
    lines = []
    for query in range(layout.num_tokens):
        for name, run in itertools.groupby(range(query + 1), lambda key, query=query: kind(layout, query, key)):
            keys = list(run)
            x, y, width = LEFT + keys[0] * CELL, TOP + query * CELL, len(keys) * CELL
            lines.append(f'<rect x="{x}" y="{y}" width="{width}" height="{CELL - 1}" fill="{COLOURS[name][0]}"/>')
    return lines


def text(x: float, y: float, content: str, anchor: str = "middle", size: int = 12) -> str:
    return f'<text x="{x}" y="{y}" {FONT} font-size="{size}" text-anchor="{anchor}" fill="#222">{content}</text>'


def labels(layout: Layout) -> list[str]:
    names = [(span, f"block {i}", f"rank {layout.owners[i]}") for i, span in enumerate(layout.blocks)]
    names.append((layout.question, "question", "every rank"))
    lines = []
    for span, name, owner in names:
        middle = (span.start + span.end) / 2 * CELL
        lines.append(text(LEFT - 10, TOP + middle, name, "end"))
        lines.append(text(LEFT - 10, TOP + middle + 13, owner, "end", 10))
        lines.append(text(LEFT + middle, TOP - 10, name))
    lines.append(text(LEFT + layout.num_tokens * CELL / 2, TOP - 32, "keys, in the prompt's order"))
    return lines


def borders(layout: Layout) -> list[str]:
    size = layout.num_tokens * CELL
    lines = []
    for span in (*layout.blocks, layout.question, Span(layout.num_tokens, layout.num_tokens)):
        at = span.start * CELL - 0.5
        for x1, y1, x2, y2 in ((at, 0, at, size), (0, at, size, at)):
            lines.append(f'<path d="M{LEFT + x1} {TOP + y1}L{LEFT + x2} {TOP + y2}" stroke="#999" stroke-width="0.7"/>')
    return lines


def legend(top: int) -> list[str]:
    lines = []
    for i, (colour, meaning) in enumerate(COLOURS.values()):
        y = top + i * 19
        lines.append(f'<rect x="{LEFT}" y="{y}" width="12" height="12" fill="{colour}" stroke="#999"/>')
        lines.append(text(LEFT + 20, y + 10, meaning, "start"))
    return lines


def main() -> None:
    layout = plan(36, ApbConfig(block=8, anchor=3, passing=2, question_tokens=4, min_tokens=0), num_ranks=2)
    side = layout.num_tokens * CELL
    width, height = LEFT + side + 30, TOP + side + 20 + 19 * len(COLOURS) + 8
    body = "\n".join([*cells(layout), *borders(layout), *labels(layout), *legend(TOP + side + 16)])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    background = f'<rect width="{width}" height="{height}" fill="white"/>'
    target = Path(__file__).with_name("attention-layout.svg")
    target.write_text(f"{head}\n<title>Which keys each query sees</title>\n{background}\n{body}\n</svg>\n")


if __name__ == "__main__":
    main()
