import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm

from fs_psm_hf.certification import certify_scores
from fs_psm_hf.certification.folder import certify_saved
from fs_psm_hf.certification.question import Question
from fs_psm_hf.certification.saved import save_draws
from fs_psm_hf.cli import main
from fs_psm_hf.plots import (
    certificate_curve,
    check_picture,
    new_figure,
    plot_results,
    plot_rows,
    results_figure,
    save_figure,
)


EPSILONS = (0.3, 0.0, 0.1, 0.2, 0.5)  # not sorted: the curve must be


def certificate(method="cdf", seed=0, sigma=0.12, epsilons=EPSILONS):
    scores = np.random.default_rng(seed).beta(45, 5, 1000)
    return certify_scores(scores, sigma=sigma, epsilons=epsilons, method=method)


def drawn(certificates, null_cosine=None):
    return certificate_curve(new_figure(4, 3).subplots(), certificates, null_cosine)


def test_lines_are_the_bounds_and_end_where_there_is_none():
    certificates = [certificate(), certificate("plugin")]
    axes = drawn(certificates, 0.3)
    certified, plugin, null = axes.get_lines()
    for line, source in zip((certified, plugin), certificates, strict=True):
        expected = dict(zip(source.epsilons, source.cosine_bounds, strict=True))
        assert list(line.get_xdata()) == sorted(EPSILONS)
        for epsilon, shown in zip(*line.get_data(), strict=True):
            assert shown == expected[epsilon] if expected[epsilon] >= 0 else np.isnan(shown)
    assert np.isnan(certified.get_ydata()[-1])
    assert list(null.get_ydata()) == [0.3, 0.3]


def test_what_has_no_confidence_says_so_and_looks_different():
    axes = drawn([certificate(), certificate("plugin")], 0.3)
    assert [line.get_label() for line in axes.get_lines()] == [
        "certified, 99.9 % confidence",
        "plug-in: no confidence",
        "null level: unrelated images",
    ]
    assert [line.get_linestyle() for line in axes.get_lines()] == ["-", ":", "--"]
    assert len({line.get_color() for line in axes.get_lines()}) == 3
    assert "[0, 1] pixels" in axes.get_xlabel()


def test_several_sigmas_are_several_lines():
    lines = drawn([certificate(sigma=0.12), certificate(sigma=0.25)]).get_lines()
    assert [line.get_label().rpartition("σ = ")[2] for line in lines] == ["0.12", "0.25"]


def test_a_negative_null_level_is_in_the_picture():
    assert drawn([certificate()], -0.2).get_ylim()[0] < -0.2


@pytest.mark.parametrize("certificates", [[], [certificate(), certificate(epsilons=(0.1,))]])
def test_curves_of_nothing_or_of_other_radii_are_refused(certificates):
    with pytest.raises(ValueError, match="`certificates` must be one or more with the same `epsilons`"):
        drawn(certificates)


def test_rows_hold_the_pictures_they_were_given(tmp_path):
    views = [np.full((8, 8, 3), colour) for colour in ([0.0, 1.0, 0.0], [1.5, -0.5, 1.2], [0.0, 0.0, 1.0])]
    plot_rows([("a title", views, [certificate()])] * 2, tmp_path / "rows.png", sigma=0.12, null_cosine=0.3)
    pixels = np.asarray(Image.open(tmp_path / "rows.png").convert("RGB")).reshape(-1, 3)
    for colour in ([0, 255, 0], [255, 0, 255], [0, 0, 255]):  # the second was clipped
        assert (pixels == colour).all(1).sum() > 2 * 50 * 50
    with pytest.raises(ValueError, match="`rows` must hold at least one image"):
        plot_rows([], tmp_path / "rows.png", sigma=0.12)


def test_a_picture_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "old.png"
    path.write_bytes(b"old")
    figure = new_figure(2, 2)
    figure.suptitle(r"$\no such symbol$")
    with pytest.raises(ValueError, match="no such symbol"):
        save_figure(figure, path)
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path, results):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "fs-psm-hf\[plots\]"'):
        plot_results(results, tmp_path / "curve.png")
    with pytest.raises(ImportError, match=r'pip install "fs-psm-hf\[plots\]"'):
        check_picture(tmp_path / "curve.png")


def test_a_picture_that_cannot_be_written_is_refused_early(tmp_path):
    for wrong in (tmp_path / "curve.jpg", tmp_path / "curve", tmp_path / "nowhere" / "curve.png"):
        with pytest.raises(ValueError, match=r"`--plot` must be a \.png file in a folder that exists, got .*curve"):
            check_picture(wrong)
    check_picture(tmp_path / "curve.PNG")
    assert list(tmp_path.iterdir()) == []


SIGMA = 0.25
SCORES = [np.random.default_rng(i).normal(0.84 + 0.01 * i, 0.017, 600).clip(0, 1) for i in range(4)]


@pytest.fixture(scope="module")
def scores_folder(tmp_path_factory):
    """Scores of four images, saved as `fs-psm certify --save-scores` does."""
    folder = tmp_path_factory.mktemp("saved") / "scores"
    for i, scores in enumerate(SCORES):
        record = {"image_id": i, "anchor": "clean", "feature": "cls"}
        draws = SimpleNamespace(anchor=torch.tensor([1.0, 0.0] if i % 2 else [0.6, 0.8]), features=None, record=record)
        save_draws(folder, draws, scores, {"file": f"{i}.png", "sigma": SIGMA, "served_samples": 4, "num_looks": 1})
    return folder


@pytest.fixture(scope="module")
def results(scores_folder):
    """Lines of a results file made for real."""
    return certify_saved(
        scores_folder, scores_folder.parent / "out.jsonl", Question(num_samples=None, curve=True)
    ).lines


def made(radii, bounds=(0.5, 0.2, -0.1)):
    """Lines of a results file with these radii, `None` for an image that abstained."""
    header = {"kind": "header", "sigma": 0.1, "alpha": 0.01, "level": 0.3, "beta": 0.1, "served_samples": 8}
    lines = [header | {"anchor": "smoothed"}]
    for radius in radii:
        entry = {"inner_product_bounds": list(bounds), "radius": radius or 0.0, "abstained": radius is None}
        curve = {"epsilons": [0.0, 0.1, 0.2]} | dict.fromkeys(("plugin", "betting", "cdf"), entry)
        lines.append({"kind": "image", "certificates": [{"num_samples": 90, "num_pilot": 10}], "curve": curve})
    return [*lines, {"kind": "summary", "null_cosine": None}]


def test_cosines_are_the_medians_of_the_images(results):
    lines = results_figure(results).axes[0].get_lines()
    assert len(lines) == 5
    epsilons = np.linspace(0, 3 * SIGMA, 61)
    options = {"sigma": SIGMA, "epsilons": epsilons, "alpha": 0.001}
    # The paper's estimate in closed form; what has a confidence from the scores once more.
    truth = [2 * norm.cdf(norm.ppf(scores.mean()) - epsilons / SIGMA) - 1 for scores in SCORES]
    found = [truth]
    for method in ("betting", "cdf"):
        found.append([certify_scores(scores, method=method, **options).inner_product_bounds for scores in SCORES])
    found.append([certify_scores(s, deployed_samples=4, **options).deployed.inner_product_bounds for s in SCORES])
    for line, bounds in zip(lines, found, strict=False):
        assert line.get_xdata() == pytest.approx(epsilons)
        middle = np.array([statistics.median_low(values) for values in zip(*bounds, strict=True)])
        assert (middle < 0).any()
        assert line.get_ydata() == pytest.approx(np.where(middle < 0, np.nan, middle), abs=1e-12, nan_ok=True)
    # Two images with one anchor, two with another at a cosine of 0.6: 2 pairs of six are the same, 4 are not.
    assert list(lines[4].get_ydata()) == pytest.approx([(2 * 1 + 4 * 0.6) / 6] * 2)


def test_no_line_promises_more_between_two_radii_than_at_the_next():
    """The deployed bound has cliffs: its line keeps the lower value up to the radius where it is bounded."""
    lines = made([0.1])
    lines[1]["curve"]["deployed"] = {"inner_product_bounds": [0.6, 0.3, 0.1]}
    assert results_figure(lines).axes[0].get_lines()[3].get_drawstyle() == "steps-pre"


def test_shares_are_counted_exactly():
    radii = [0.1, 0.1, 0.25, "inf", None, 0.0]
    axes = results_figure(made(radii)).axes[1]
    assert len(axes.get_lines()) == 3
    for line in axes.get_lines():
        assert line.get_drawstyle() == "steps-pre"  # the value at a point holds down to the point before
        for r in (0.0, 1e-9, 0.05, 0.1, 0.1 + 1e-9, 0.2, 0.25, 0.25 + 1e-9):
            expected = sum(radius is not None and float(radius) >= r for radius in radii) / 6
            assert line.get_ydata()[np.searchsorted(line.get_xdata(), r)] == pytest.approx(100 * expected), r
    assert axes.get_xlim()[1] > 0.25


def test_the_shares_of_real_results_are_those_of_their_certificates(results):
    cdf = results_figure(results).axes[1].get_lines()[2]
    radii = [entry["radius"] for line in results[1:-1] for entry in line["certificates"] if entry["method"] == "cdf"]
    assert min(radii) > 0
    for index, radius in enumerate(sorted(radii)):
        assert cdf.get_ydata()[np.searchsorted(cdf.get_xdata(), radius)] == 100 - 25 * index


def test_the_picture_says_what_it_shows(results):
    figure = results_figure(results)
    cosines, shares = figure.axes
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [line.get_label() for line in cosines.get_lines()]
    assert ["no confidence" in label for label in labels] == [True, False, False, False, False]
    assert ["99.9 % confidence" in label for label in labels] == [False, True, True, True, False]
    assert "n₀ = 4" in labels[3]
    assert "one query, β = 0.05" in labels[3]
    assert "null level" in labels[4]
    assert len({str(line._dash_pattern) for line in cosines.get_lines()}) == 5
    assert len({line.get_color() for line in cosines.get_lines()}) == 5
    for left, right in zip(cosines.get_lines(), shares.get_lines(), strict=False):
        assert (left.get_color(), left.get_linestyle()) == (right.get_color(), right.get_linestyle())
    assert figure.get_suptitle() == "σ = 0.25, n = 600 draws per image, 4 images"
    for axes in (cosines, shares):
        assert "ℓ₂ norm in [0, 1] pixels" in axes.get_xlabel()
    assert cosines.get_ylabel() == "cosine with the clean feature, at least"
    assert shares.get_ylabel() == "images, %"
    assert "at least 0.5" in shares.get_title()


def test_the_legend_hides_nothing(results):
    figure = results_figure(results)
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1


def test_titles_and_labels_follow_the_results():
    lines = made([0.1])
    figure = results_figure(lines)
    assert figure.get_suptitle() == "σ = 0.1, n = 100 draws per image, 1 image"
    assert "smoothed feature" in figure.axes[0].get_ylabel()
    assert "median" not in figure.axes[0].get_title()
    assert len(figure.axes[0].get_lines()) == 3  # nothing is served, and no null level is known
    lines = made([0.1, 0.2])
    lines[1]["certificates"][0]["num_samples"] = 1910
    assert "n = 100 to 1,920 draws per image, 2 images" in results_figure(lines).get_suptitle()


def test_what_is_not_certified_is_said():
    figure = results_figure(made([None, None], bounds=(-0.1, -0.2, -0.3)))
    cosines, shares = figure.axes
    assert all(np.isnan(line.get_ydata()).all() for line in cosines.get_lines())
    assert [text.get_text() for text in cosines.texts] == ["no cosine is bounded beyond ε = 0"]
    assert all((line.get_ydata() == 0).all() for line in shares.get_lines())
    assert [text.get_text() for text in shares.texts] == ["no image is certified"]
    assert [axes.texts[:] for axes in results_figure(made([None, 0.1])).axes] == [[], []]


def test_results_without_curves_are_refused(results, tmp_path):
    bare = [{name: value for name, value in line.items() if name != "curve"} for line in results]
    with pytest.raises(ValueError, match="per-token results have no curve"):
        plot_results(bare, tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_draws_it(monkeypatch, tmp_path, scores_folder):
    command = [
        "certify",
        "--from-scores",
        scores_folder,
        "--output",
        tmp_path / "x.jsonl",
        "--plot",
        tmp_path / "x.png",
    ]
    monkeypatch.setattr(sys, "argv", ["fs-psm", *map(str, command)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl", "x.png"]
