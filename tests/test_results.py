"""Numbers in the README and the cards are those of the committed results."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, CLIPModel, LlavaForConditionalGeneration

from fs_psm_hf import Certificate, PSMModel, certify_scores
from fs_psm_hf.cards.tables import format_rows, format_table
from fs_psm_hf.certification.folder import summarize
from fs_psm_hf.certification.saved import load_draws
from fs_psm_hf.evaluation.cells import read_results, worst


ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"


FS = CARDS / "dinov2-small-fs"
BENCHMARKS = ROOT / "examples" / "benchmarks"


@pytest.mark.parametrize("name", ["sigma0.25-n1000", "sigma0.25-n10000", "sigma0.5-n1000"])
def test_the_certified_table_is_the_measured_one(name, monkeypatch):
    """Documents, rows, summary, certificates and committed scores say the same."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from certified_table import rows

    path = FS / "results" / f"{name}.jsonl"
    header, *images, end = [json.loads(line) for line in path.read_text().splitlines()]
    sigma, _, draws = name.removeprefix("sigma").partition("-n")
    assert (header["sigma"], len(images)) == (float(sigma), 3 if draws == "10000" else 20)
    assert end["rows"] == summarize(images)["rows"]
    for draws_of, line in zip(load_draws(FS / "scores" / name), images, strict=True):
        assert draws_of.facts["file"] == line["file"]
        assert draws_of.num_samples == int(draws)
        for entry in line["certificates"]:
            found = Certificate.from_dict(entry)
            again = certify_scores(draws_of.take(int(draws)), sigma=float(sigma), method=found.method)
            assert found.inner_product_bounds == pytest.approx(again.inner_product_bounds, abs=1e-9)
            assert found.radius == pytest.approx(again.radius, abs=1e-9)
    for document in (ROOT / "README.md", FS / "README.md"):
        assert all(row in document.read_text() for row in rows(path)), document


def test_the_tightness_table_is_the_measured_one(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from certified_table import tightness_rows

    result = json.loads((BENCHMARKS / "results" / "tightness.json").read_text())
    assert all(
        row in (ROOT / "README.md").read_text() for row in tightness_rows(BENCHMARKS / "results" / "tightness.json")
    )
    (long,) = [row for row in result["rows"] if row["recorded"] == 10_000]
    # What the default is chosen for: at least three times the paper's estimate, with confidence where that has none.
    assert long["n"]["10000"]["cdf"]["mean_radius"] >= 3 * long["n"]["10000"]["plugin"]["mean_radius"]
    for row in result["rows"]:
        for found in row["n"].values():
            best = max(v["mean_radius"] for k, v in found.items() if k not in ("cdf", "resampled", "plugin"))
            assert found["cdf"]["mean_radius"] >= best
    # No certificate about the recorded scores as a population exceeds what is true of them.
    truth = [float(radius) for radius in long["population_radii"]]
    for method, found in long["n"]["100000"].items():
        if method not in ("resampled", "plugin"):
            assert all(radius <= true for radius, true in zip(found["radii"], truth, strict=True)), method


def test_no_certificate_was_beaten():
    """The figures of the README, and that the attack is no straw man: it closes most of the gap where a bound is attained."""
    results = {
        path.stem: json.loads(path.read_text()) for path in (BENCHMARKS / "results").glob("attack_certificates_*")
    }
    assert all(result["summary"]["violations"] == 0 for result in results.values())
    comparisons = sum(result["summary"]["comparisons"] for result in results.values())
    assert f"0 of {comparisons} comparisons" in (ROOT / "README.md").read_text()
    half_space = results["attack_certificates_half_space"]["summary"]["by_epsilon"]
    assert all(entry["mean_gap_closed"] > 0.5 for entry in half_space)


def test_what_stopping_early_saves_and_bounding_costs_is_the_measured():
    readme = (ROOT / "README.md").read_text()
    cost = json.loads((BENCHMARKS / "results" / "bounding_cost.json").read_text())
    assert (cost["images"], cost["num_samples"], cost["radii"]) == (1_000, 10_000, 50)
    assert cost["seconds"] < 2.0
    assert f"{cost['seconds']:.2f} s on one core" in readme
    assert f"{cost['seconds_of_loop_per_image_and_radius']:.2f} s for one image and one radius" in readme
    result = json.loads((BENCHMARKS / "results" / "tightness.json").read_text())
    (long,) = [row for row in result["rows"] if row["recorded"] == 10_000]
    for row in long["adaptive"]:
        if row.get("target_radius") == 0.2 or row.get("tolerance") == 0.05:
            used = sum(row["num_samples"]) / len(row["num_samples"])
            assert f"{used:,.0f}" in readme
            assert f"{100 * row['saved']:.0f} % saved" in readme


PSMS = ["fs-psm-tiny-clip-cifar10", "fs-psm-dinov2-small"]


@pytest.mark.parametrize("name", PSMS)
def test_the_tables_of_a_psm_are_the_measured_ones(name):
    card = (CARDS / name / "README.md").read_text()
    table = json.loads((CARDS / name / "results" / "table5.json").read_text())
    assert format_table(table) in card
    for rows in table["rows"].values():
        for kind in ("plugin", "cdf"):
            radius = {row: values[kind]["mean_radius"] for row, values in rows.items() if kind in values}
            assert min(radius["FS+P+M"], radius["FS+P"]) > radius["FS"]
            assert radius["FS+P+M"] > radius["FS+P"]
            if name == "fs-psm-dinov2-small":  # where noise leaves nothing of the feature, both radii are 0
                assert radius["FS+M"] > radius["FS"] or radius["FS+M"] == radius["FS"] == 0
                assert rows["FS+M"][kind]["mean_cosine"] > rows["FS"][kind]["mean_cosine"]
    utility = json.loads((CARDS / name / "results" / "clean_utility.json").read_text())
    assert format_rows(utility) in card


def test_what_a_psm_buys_is_the_measured():
    """The README's figures, and what the PSM of the real tower was trained to reach: more than a published denoiser gives."""
    results = CARDS / "fs-psm-dinov2-small" / "results"
    table = json.loads((results / "table5.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert format_table(table) in readme
    assert format_rows(json.loads((results / "clean_utility.json").read_text())) in readme
    cifar = json.loads((results / "clean_utility_cifar10.json").read_text())["rows"]
    plain, smoothed, purified = (
        f"{cifar[row]['plain_gallery']:.1%}" for row in ("plain", "FS, σ = 0.25", "FS+PSM, σ = 0.25")
    )
    assert f"{plain} plain, {smoothed} with FS and {purified} with FS+PSM at σ = 0.25" in readme
    ours, theirs = ({s: rows[row]["plugin"] for s, rows in table["rows"].items()} for row in ("FS+P+M", "FS+FFDNet"))
    ratio = ours["0.25"]["mean_radius"] / theirs["0.25"]["mean_radius"]
    assert ratio >= 1.3
    assert f"{ratio:.1f} times that with FFDNet" in readme
    gain = ours["0.5"]["mean_cosine"] - theirs["0.5"]["mean_cosine"]
    assert gain >= 0.05
    assert f"{gain:.2f} higher" in readme.replace("\n", " ")


@pytest.mark.parametrize("name", PSMS)
def test_a_psm_is_small_and_says_what_it_was_trained_for(name):
    weights = list((CARDS / name).glob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) <= 25e6
    assert all(path.stat().st_size <= 15e6 for path in weights)
    psm = PSMModel.from_pretrained(CARDS / name)
    assert psm.dtype == torch.bfloat16
    assert psm.config.base_model_name_or_path


def test_the_embedded_models_are_small():
    def size(name):
        return sum(path.stat().st_size for path in (CARDS / name).rglob("*") if path.is_file())

    assert size("tiny-clip-cifar10") + size("tiny-llava-cifar10") < 15e6
    assert size("tiny-denoiser-cifar10") < 3e6


def test_the_embedded_models_are_as_good_as_the_documents_say(monkeypatch):
    accuracy = json.loads((CARDS / "tiny-clip-cifar10" / "results" / "zero_shot.json").read_text())
    captions = json.loads((CARDS / "tiny-llava-cifar10" / "results" / "captioning.json").read_text())
    assert accuracy["num_images"] == 10_000
    assert accuracy["accuracy"] >= 0.70
    denoising = json.loads((CARDS / "tiny-denoiser-cifar10" / "results" / "denoising.json").read_text())
    decibels = denoising["sigma"]["0.12"]
    numbers = [f"{accuracy['accuracy']:.2%}", f"{captions['caption_accuracy']:.2%}"]
    numbers += [f"{decibels[name]:.2f} dB" for name in ("noisy_psnr_db", "denoised_psnr_db")]
    assert all(number in (ROOT / "README.md").read_text() for number in numbers)
    monkeypatch.syspath_prepend(ROOT / "examples" / "tiny")
    from train import render_card

    for stage, results in (("clip", accuracy), ("llava", captions), ("denoiser", denoising)):
        assert (CARDS / f"tiny-{stage}-cifar10" / "README.md").read_text() == render_card(stage, results)


def test_the_embedded_models_load_and_belong_together():
    clip = CLIPModel.from_pretrained(CARDS / "tiny-clip-cifar10")
    llava = LlavaForConditionalGeneration.from_pretrained(CARDS / "tiny-llava-cifar10")
    own, given = llava.model.vision_tower.state_dict(), clip.vision_model.state_dict()
    assert all(torch.equal(own[key], given[key]) for key in given)
    assert PSMModel.from_pretrained(CARDS / "tiny-denoiser-cifar10").purifier is not None
    processor = AutoProcessor.from_pretrained(CARDS / "tiny-llava-cifar10")
    assert (
        processor.image_processor.image_mean
        == AutoProcessor.from_pretrained(CARDS / "tiny-clip-cifar10").image_processor.image_mean
    )


def test_the_attacked_tables_are_the_measured_ones(monkeypatch):
    """And what the README says of them: where the defence fails, and that the attack was no weak one."""
    tables = ROOT / "examples" / "tables"
    monkeypatch.syspath_prepend(tables)
    from summary import rows

    readme = (ROOT / "README.md").read_text()
    results = tables / "results"
    for names in (["dinov2_small"], ["imagenette_head", "imagenette_sanity"], ["tiny_llava"]):
        lines = rows(*(results / f"{name}.jsonl" for name in names))
        assert len(lines) > 5
        assert all(line in readme for line in lines)
    real = read_results(results / "dinov2_small.jsonl")
    psm = {(one.cell.attack, one.cell.mode): one.asr for one in worst(real) if one.cell.row == "FS+P+M"
           and one.cell.epsilon < 0.1}  # fmt: skip
    assert psm["attackvlm", "adaptive"] == 1.0
    assert max(asr for (_, mode), asr in psm.items() if mode == "transfer") == 0.0
    strength = {
        (one.cell.steps, one.cell.draws): one.asr for one in read_results(results / "tiny_llava_strength.jsonl")
    }
    assert strength.pop((25, 1)) == 0.7
    assert all(0.8 <= asr <= 0.9 for asr in strength.values())


def test_the_speed_in_the_readme_is_the_measured(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed_table

    readme = (ROOT / "README.md").read_text()
    for name in ("ratios", "modes", "tradeoff"):
        table = getattr(speed_table, f"{name}_table")()
        assert f"\n{table}\n" in readme, table
    light, diffusion = (speed_table.load(f"kept_memory{which}")["ratio"] for which in ("", "_diffusion"))
    assert f"at 224 pixels {light:.2f} times as fast" in readme
    assert f"on two threads, {diffusion:.2f} times;" in readme


def test_the_figures_at_scale_follow_from_the_measured_throughput(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed_table

    found = speed_table.load("certify_throughput_psm")
    rate, usual = (found["throughput"][f"draws_per_second_{which}"] for which in ("ours", "usual"))
    text = (BENCHMARKS / "scale.md").read_text()
    assert f"{rate:.1f} draws per second (the usual float32\nloop: {usual:.1f})" in text
    hours = 10_000 / (rate * 3600)
    assert f"| a certificate, 10,000 draws | 10⁴ | {hours:.2f} |" in text
    assert f"| 5·10⁸ | {round(50_000 * hours, -2):,.0f} |" in text
    assert f"{4e6 / rate / 3600:.0f} a day" in text
