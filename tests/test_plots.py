import sys

import numpy as np
import pytest
from PIL import Image

from fs_psm_hf.certification import certify_scores
from fs_psm_hf.plots import certificate_curve, new_figure, plot_certificates, plot_rows, save_figure


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


def test_many_images_are_their_median():
    certificates = [certificate(seed=seed) for seed in range(5)]
    (line,) = drawn(certificates).get_lines()
    at = EPSILONS.index(0.1)
    expected = np.median([c.cosine_bounds[at] for c in certificates])
    assert line.get_ydata()[sorted(EPSILONS).index(0.1)] == expected
    assert "median of 5 images" in line.get_label()


def test_several_sigmas_are_several_lines():
    lines = drawn([certificate(sigma=0.12), certificate(sigma=0.25)]).get_lines()
    assert [line.get_label().rpartition("σ = ")[2] for line in lines] == ["0.12", "0.25"]


def test_a_negative_null_level_is_in_the_picture():
    assert drawn([certificate()], -0.2).get_ylim()[0] < -0.2


@pytest.mark.parametrize("certificates", [[], [certificate(), certificate(epsilons=(0.1,))]])
def test_curves_of_nothing_or_of_other_radii_are_refused(certificates):
    with pytest.raises(ValueError, match="`certificates` must be one or more with the same `epsilons`"):
        drawn(certificates)


def test_picture_of_many_certificates(tmp_path):
    plot_certificates([certificate(seed=seed) for seed in range(3)], tmp_path / "curve.png", null_cosine=0.4)
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


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


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "fs-psm-hf\[plots\]"'):
        plot_certificates([certificate()], tmp_path / "curve.png")
