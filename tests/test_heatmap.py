"""Grids of coefficients, and how they are shown in a picture and in a terminal."""

from __future__ import annotations

import io
import struct
import zlib

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from mergekit_unconstrained.config.document import Document
from mergekit_unconstrained.config.grid import Cell, ExpertGrid, Grid, build_grid, summary
from mergekit_unconstrained.config.show import print_grid
from mergekit_unconstrained.config.table import Coefficients, parse_table
from mergekit_unconstrained.hub.heatmap import draw
from mergekit_unconstrained.numerics.roles import Role, role_from_name

PARTS = ("self_attn.q_proj", "input_layernorm", "post_attention_layernorm", "mlp.up_proj")


def roles(layers: int) -> dict[str, Role]:
    names = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in PARTS]
    outside = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    return {name: role_from_name(name) for name in (*outside, *names)}


def grid(layers: int, experts: tuple[str, ...] = ("math", "code"), scale: float = 1.0) -> Grid:
    known = roles(layers)
    return build_grid(
        known,
        {
            expert: {
                name: Coefficients(scale * ((n * 7 + i) % 11) / 10, 1.0)
                for n, name in enumerate(known)
            }
            for i, expert in enumerate(experts)
        },
    )


def test_a_grid_shows_what_a_table_says():
    table = parse_table(
        Document.parse(
            "layers: 3\nexperts:\n  math: {default: 0.5, head: 0.0, layers: {1-2: {q: 0.9}}}", "t"
        )
    )
    known = roles(3)
    values = {"math": {name: table.lookup("math", role) for name, role in known.items()}}
    shown = build_grid(known, values)
    assert (shown.layers, shown.kinds) == (3, ("q", "norm", "up"))
    assert shown.outer_kinds == ("embedding", "final_norm", "head")
    expert = shown.experts["math"]
    assert [expert.inner[n, "q"].weight for n in range(3)] == [0.5, 0.9, 0.9]
    assert expert.outer == {"embedding": Cell(0.5), "final_norm": Cell(0.5), "head": Cell(0.0)}
    assert not shown.has_densities


def test_tensors_of_one_place_that_differ_are_averaged_and_marked():
    known = {name: Role("norm", 0, 1) for name in ("a", "b", "c")}
    values = {"a": Coefficients(0.1, 0.5), "b": Coefficients(0.4, 0.5), "c": Coefficients(None)}
    cell = build_grid(known, {"x": values}).experts["x"].inner[0, "norm"]
    assert cell == Cell(0.25, 0.5, frozenset({"weight", "density"}))
    same = build_grid(known, {"x": dict.fromkeys(known, Coefficients(0.1))})
    assert same.experts["x"].inner[0, "norm"] == Cell(0.1)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({(0, "q"): 0.5, (1, "q"): 0.5, (0, "up"): 0.5}, "0.5"),
        ({(0, "q"): 0.1, (1, "q"): 0.9}, "0.10 to 0.90, by layer"),
        ({(0, "q"): -0.1, (0, "up"): 0.9}, "-0.10 to 0.90, by kind"),
        ({(0, "q"): 0.1, (1, "q"): 0.2, (1, "up"): 0.9}, "0.10 to 0.90, by layer and kind"),
        ({}, ""),
    ],
)
def test_a_summary_says_what_the_weights_depend_on(cells, words):
    assert summary(ExpertGrid({place: Cell(weight) for place, weight in cells.items()})) == words


@pytest.mark.parametrize(
    "grid",
    [
        grid(30),
        grid(4, ("one",)),
        grid(126, tuple("abc"), scale=-0.1),
        grid(1),
        grid(2, scale=0.0),
        build_grid({}, {"math": {"model.norm.weight": Coefficients(0.5)}}),
        build_grid({}, {"math": {"model.layers.3.mlp.up_proj.weight": Coefficients(0.5, 0.2)}}),
        build_grid({}, {"math": {}}),
    ],
    ids=["30x2", "4x1", "126x3", "1x2", "zeros", "outer", "densities", "empty"],
)
def test_every_size_of_grid_gives_the_same_picture_twice(grid, tmp_path):
    before = dict(mpl.rcParams)
    for name in ("first.png", "second.png"):
        draw(grid, tmp_path / name, "a title")
    first, second = ((tmp_path / name).read_bytes() for name in ("first.png", "second.png"))
    assert first == second
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first.png", "second.png"]
    assert dict(mpl.rcParams) == before
    chunks = png_chunks(first)
    assert set(chunks) <= {b"IHDR", b"pHYs", b"IDAT", b"IEND"}  # no date, no version
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    assert 300 < width < 1700
    assert 100 < height < 4000


def test_the_colours_follow_the_weights(tmp_path):
    def drawn(weight: float) -> np.ndarray:
        values = {"up": Coefficients(weight), "down": Coefficients(1.0)}
        known = {kind: Role(kind, 0, 1) for kind in values}
        draw(build_grid(known, {"e": values}), tmp_path / "x.png")
        return matplotlib.image.imread(tmp_path / "x.png")

    low, high = drawn(0.0), drawn(1.0)
    assert low.shape == high.shape
    assert low[..., :3].sum() > high[..., :3].sum()  # the larger the darker
    assert not np.array_equal(drawn(-1.0)[..., :3], drawn(0.5)[..., :3])


@pytest.mark.parametrize("name", ["$\\frac{", "数学 🙂", "a\nb\x00", "[red]x", "n" * 300, "%s {0}"])
def test_any_name_can_be_drawn_and_printed(name, tmp_path):
    shown = grid(3, (name, "other"))
    draw(shown, tmp_path / "x.png", title=name)
    console = Console(file=io.StringIO(), width=400)
    print_grid(shown, console)
    if name.isprintable():
        assert name in console.file.getvalue()


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(b"before")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(grid(2), tmp_path / "x.png")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]


def test_the_terminal_shows_ranges_densities_and_marks():
    inner = {(n, "q"): Cell(0.5, 0.2 if n == 3 else 1.0) for n in range(5)}
    inner[4, "up"] = Cell(-0.25, 1.0, frozenset({"weight"}))
    shown = Grid(5, ("q", "up"), ("head",), {"math": ExpertGrid(inner, {"head": Cell(1.0, 1.0)})})
    console = Console(file=io.StringIO(), width=80)
    print_grid(shown, console)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["0-3", "0.50", "·"] in lines
    assert ["4", "0.50", "~-0.25"] in lines
    assert ["3", "0.20", "·"] in lines
    assert ["4", "1.00", "1.00"] in lines
    assert ["head", "1.00"] in lines


def png_chunks(data: bytes) -> dict[bytes, bytes]:
    chunks, at = {}, 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            kind + body
        )
        chunks[kind] = body
        at += 12 + length
    return chunks
