"""Pictures of attacks: what is drawn is what was given."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from fs_psm_hf.evaluation.cells import Cell, Result
from fs_psm_hf.plots_attacks import attack_figure, objective_figure, plot_attacks, strength_figure


CELL = Cell(
    "m", "org", "FS", "foa", "adaptive", 16 / 255, "head", sigma=0.25, gradient="end-to-end", draws=8, steps=10
)
CLEAN = np.full((4, 4, 3), 0.5)
ADVERSARIAL = CLEAN + np.array([16, -8, 0]) / 255


def test_the_change_is_magnified_around_grey():
    views = {"clean": (CLEAN, "a cat"), "adversarial": (ADVERSARIAL, "a dog"), "purified": (CLEAN, "one draw")}
    axes = attack_figure([("title", views)], magnify=4).axes
    assert [place.get_xlabel().splitlines() for place in axes] == [
        ["clean", "a cat"], ["adversarial", "a dog"], ["change × 4", "at most 16/255"], ["purified", "one draw"],
    ]  # fmt: skip
    shown = axes[2].get_images()[0].get_array()
    np.testing.assert_allclose(shown[0, 0], 0.5 + 2 * np.array([16, -8, 0]) / 255)
    assert axes[0].get_title(loc="left") == "title"


def test_a_picture_is_written(tmp_path):
    plot_attacks([("x", {"clean": (CLEAN, ""), "adversarial": (ADVERSARIAL, "")})] * 2, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > picture.height * 0.9
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "at least one image, got none"),
        ([("x", {"clean": (CLEAN, "")})], "'x' lacks adversarial"),
        ([("x", {"clean": (CLEAN, ""), "adversarial": (CLEAN[:2], "")})], "must hold pictures of one size"),
    ],
)
def test_what_cannot_be_drawn(rows, words):
    with pytest.raises(ValueError, match=words):
        attack_figure(rows)


def test_strength_is_drawn_in_the_order_of_steps():
    results = [
        Result(dataclasses.replace(CELL, steps=steps, draws=draws), 5, 0.5, steps / 100, 0.1)
        for steps, draws in ((40, 8), (10, 8), (20, 8), (20, 16))
    ]
    (line,) = strength_figure(results).axes[0].get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([10, 20, 40], [0.1, 0.2, 0.4])
    (line,) = strength_figure(results, by="draws", figure="fcs").axes[0].get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([8, 16], [0.5, 0.5])
    with pytest.raises(ValueError, match="at least two numbers of steps, got none"):
        strength_figure(results[:1])
    for options in ({"by": "time"}, {"figure": "psnr"}):
        with pytest.raises(ValueError, match="must be"):
            strength_figure(results, **options)


def test_objectives_are_drawn_as_they_are():
    axes = objective_figure({"a": ([0, 5], [0.1, 0.4]), "b": ([0, 9], [0.2, 0.3])}).axes[0]
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[0.1, 0.4], [0.2, 0.3]]
    with pytest.raises(ValueError, match="at least one attack"):
        objective_figure({})
