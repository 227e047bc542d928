"""Does an attack that knows the defence ever get below a certificate? Certify, attack, and look at fresh draws.

For each image: a certificate, l2-PGD through noise, purifier, tower and mapper at each radius (without clipping, as a
certificate allows any x'), and the smoothed feature at the point it found, from draws that nothing else used. A violation
is a 99.9 % upper bound on `<ĝ(x'), u>` below the certified lower bound. Bound and certificate each fail with their own
small probability, so with sound code some violations in thousands of rows are possible, and next to none in a few.

    python examples/benchmarks/attack_certificates.py --tower DIR_OR_ID --images DIR --sigma 0.25 --json out.json
    python examples/benchmarks/attack_certificates.py --half-space --json half_space.json

`gap_closed` is the share of the way from the clean value down to the certified bound that the attack went. On a half-space
encoder, where the bound is attained, it measures the attack (1 is perfect) and the samples that the certificate lacks;
`population_gap_closed` measures the attack alone.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fs_psm_hf import SmoothedVisionTower, certify_features
from fs_psm_hf.attacks import l2_pgd
from fs_psm_hf.certification import draw_scores
from fs_psm_hf.certification.certificate import clean_scores
from fs_psm_hf.certification.confidence import mean_upper
from fs_psm_hf.certification.folder import image_name, read_image
from fs_psm_hf.certification.identity import model_hash, model_name, psm_name, short_name
from fs_psm_hf.certification.results_file import versions
from fs_psm_hf.inputs import list_images, load_tower


class HalfSpaceConfig(PreTrainedConfig):
    model_type = "half_space_example"

    def __init__(self, image_size=8, steepness=20.0, image_mean=0.5, image_std=0.25, **kwargs):
        super().__init__(**kwargs)
        self.image_size, self.steepness, self.image_mean, self.image_std = image_size, steepness, image_mean, image_std
        self.hidden_size, self.num_hidden_layers = 2, 1


class HalfSpaceModel(PreTrainedModel):
    """An encoder that looks at the side of a plane: the unit feature is `(tanh(kt), 1/cosh(kt))`.

    t is the distance to the plane in [0, 1]-pixel units. For `u = (1, 0)` the score is a smooth step between 0 and 1, as
    steep as `k`; in the limit it is the half-space that attains the paper's bound.
    """

    config_class = HalfSpaceConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        # One normal vector with both signs, so that a wrong sign or order of pixels would show.
        size = (3, config.image_size, config.image_size)
        normal = torch.randn(size, generator=torch.Generator().manual_seed(0), device="cpu")
        self.normal = torch.nn.Parameter(normal / normal.norm())
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        pixels = pixel_values * self.config.image_std + self.config.image_mean
        distance = ((pixels - 0.5) * self.normal).sum((1, 2, 3))
        raw = torch.stack([(self.config.steepness * distance).sinh(), torch.ones_like(distance)], -1)
        return BaseModelOutputWithPooling(last_hidden_state=raw[:, None], pooler_output=raw)


def half_space_tower(sigma, steepness=20.0, image_size=8):
    """A smoothed tower around a `HalfSpaceModel`."""
    AutoConfig.register(HalfSpaceConfig.model_type, HalfSpaceConfig, exist_ok=True)
    AutoModel.register(HalfSpaceConfig, HalfSpaceModel, exist_ok=True)
    config = HalfSpaceConfig(image_size=image_size, steepness=steepness)
    model = HalfSpaceModel(config).eval()
    statistics = {"image_mean": [config.image_mean] * 3, "image_std": [config.image_std] * 3}
    return SmoothedVisionTower.from_components(model, None, sigma=sigma, **statistics)


def half_space_images(tower, distances):
    """Normalised images at the given distances from the plane."""
    normal, std = tower.vision_tower.normal.detach(), tower.config.image_std[0]
    return torch.stack([distance * normal for distance in distances]) / std  # grey 0.5 is 0 once normalised


def half_space_population(tower, image, adversarial, epsilon):
    """Exact `<ĝ, u>` of a half-space at an image, at an adversarial one, and what infinitely many samples would certify.

    The layer-cake bound is attained, by a step straight towards the plane: `E tanh(k(t - ε + σz))`.

    Args:
        image, adversarial (`torch.Tensor` of shape `(1, 3, height, width)`): normalised.
        epsilon (`float`): l2 radius in [0, 1]-pixel units.
    """
    z = np.linspace(-10.0, 10.0, 200_001)
    weights = np.exp(-(z**2) / 2)
    weights /= weights.sum()
    steepness, sigma = tower.vision_tower.config.steepness, tower.config.sigma
    normal, std = tower.vision_tower.normal.detach().double(), tower.config.image_std[0]

    def smoothed(distance):
        return float((weights * np.tanh(steepness * (distance + sigma * z))).sum())

    start, end = ((pixels[0].double() * std * normal).sum().item() for pixels in (image, adversarial))
    clean, attacked, worst = smoothed(start), smoothed(end), smoothed(start - epsilon)
    return {
        "population_clean": clean,
        "population_attacked": attacked,
        "population_certified": worst,
        "population_paper_bound": 2 * float(ndtr(ndtri((1 + clean) / 2) - epsilon / sigma)) - 1,
        "population_gap_closed": (clean - attacked) / (clean - worst),
    }


def attack_image(
    tower, image, *, epsilons, feature, anchor, num_samples, judging_draws, alpha, seed, image_id, **options
):
    """Rows of one image and the adversarial images, one for each radius.

    Args:
        image (`torch.Tensor` of shape `(1, 3, height, width)`): normalised.
        anchor (`torch.Tensor` of shape `(1, F)`): unit vector.
        epsilons (`list[float]`): l2 radii in [0, 1]-pixel units.
        options: of `l2_pgd`.
    """
    # Three seeds: what certifies, what attacks and what judges must not share a draw.
    names = {"feature": feature, "anchor": anchor, "image_ids": [image_id]}
    certificate = certify_features(
        tower, image, epsilons=epsilons, num_samples=num_samples, alpha=alpha, method="cdf", generator=seed, **names
    )[0]
    rows, found = [], []
    for number, epsilon in enumerate(epsilons):
        result = l2_pgd(tower, image, epsilon=epsilon, clip=False, generator=seed + 1, **names, **options)
        if result.l2_norms[0] > epsilon:
            raise ValueError(f"`l2_pgd` left the ball of radius {epsilon}: {result.l2_norms[0]}")
        found.append(result.pixel_values)
        draws = next(draw_scores(tower, result.pixel_values, generator=seed + 2, **names))
        scores, _ = clean_scores(draws.take(judging_draws))
        clean, bound = 2 * certificate.robustness_score - 1, certificate.inner_product_bounds[number]
        attacked, upper = 2 * scores.mean() - 1, 2 * float(mean_upper(scores, alpha, "betting")) - 1
        rows.append(
            {
                "epsilon": epsilon,
                "l2_norm": result.l2_norms[0],
                "clean": clean,
                "attacked": float(attacked),
                "attacked_upper": upper,
                "certified": bound,
                "margin": upper - bound,
                "violation": bool(upper < bound),
                "gap_closed": float((clean - attacked) / (clean - bound)),
                "zero_gradients": result.zero_gradients[0],
                "certified_radius": certificate.radius,
            }
        )
    return rows, found


def summarize(rows):
    """One row for each radius over all images, and the violations in all."""
    by_epsilon = []
    for epsilon in sorted({row["epsilon"] for row in rows}):
        group = [row for row in rows if row["epsilon"] == epsilon]
        means = {name: float(np.mean([row[name] for row in group])) for name in ("clean", "attacked", "certified")}
        means["mean_gap_closed"] = float(np.mean([row["gap_closed"] for row in group]))
        by_epsilon.append({"epsilon": epsilon, "smallest_margin": min(row["margin"] for row in group), **means})
    violations = sum(row["violation"] for row in rows)
    return {"comparisons": len(rows), "violations": violations, "by_epsilon": by_epsilon}


def write_json(path, results):
    """Renamed when it is whole, so that a kill leaves no half file."""
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


def command_line():
    """The command, with folders by their last name, so that no result tells of a machine."""
    words = [short_name(word) for word in sys.argv[1:]]
    return shlex.join(["python", "examples/benchmarks/attack_certificates.py", *words])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", help="folder or Hub id: smoothed tower, host, CLIP or vision model")
    parser.add_argument("--half-space", action="store_true", help="the analytic encoder instead of a tower")
    parser.add_argument("--steepness", type=float, default=20.0, help="of the half-space, per unit of [0, 1] pixels")
    parser.add_argument("--distance", type=float, nargs="+", default=[0.2, 0.3, 0.4], help="of half-space images")
    parser.add_argument("--psm", help="folder or Hub id of a purifier and mapper")
    parser.add_argument("--processor", help="where the image processor is, if not with the tower")
    parser.add_argument("--dtype", default="float32", help="half precision gives poor gradients")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--where", help="COLUMN=VALUE of metadata.csv beside the images")
    parser.add_argument("--limit", type=int, default=2, help="images to attack")
    parser.add_argument("--sigma", type=float, default=0.25, help="noise, in [0, 1] pixels")
    parser.add_argument("--feature", default="tokens", choices=["tokens", "cls", "pooled"])
    parser.add_argument("--num-samples", type=int, default=2000, help="draws of a certificate")
    parser.add_argument("--evaluation-draws", type=int, default=2000, help="draws that judge an attack")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.125, 0.25], help="l2 radii, in [0, 1] pixels")
    parser.add_argument("--alpha", type=float, default=1e-3, help="of each certificate, and of each upper bound")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--draws", type=int, default=8, help="noisy copies in each step")
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    if args.half_space == (args.tower is not None):
        parser.error("give either --tower with --images, or --half-space")
    if args.tower is not None and args.images is None:
        parser.error("--tower needs --images")

    if args.half_space:
        tower = half_space_tower(args.sigma, args.steepness)
        images = {f"distance {d:g}": image for d, image in zip(
            args.distance, half_space_images(tower, args.distance).split(1), strict=True
        )}  # fmt: skip
        anchor = torch.tensor([[1.0, 0.0]])
    else:
        tower, processor = load_tower(args.tower, args.psm, args.processor, args.sigma, dtype=args.dtype)
        tower = tower.eval().to(args.device)
        files = list_images(args.images, args.where, args.limit)
        images = {name: read_image(args.images / name, processor).to(args.device) for name in files}

    rows = []
    for name, image in images.items():
        found, adversarial = attack_image(
            tower,
            image,
            epsilons=sorted(args.epsilon),
            feature=args.feature,
            anchor=anchor if args.half_space else tower.clean_features(image, args.feature),
            num_samples=args.num_samples,
            judging_draws=args.evaluation_draws,
            alpha=args.alpha,
            seed=3 * args.seed,
            image_id=image_name(name),
            steps=args.steps,
            num_draws=args.draws,
            restarts=args.restarts,
            # The fresh draws below judge the attack; its own estimate only chooses between restarts.
            evaluation_draws=64 if args.restarts > 1 else 8,
        )
        if args.half_space:
            for row, attacked in zip(found, adversarial, strict=True):
                row |= half_space_population(tower, image, attacked, row["epsilon"])
        for row in found:
            rows.append({"image": name, **row})
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}
            print(json.dumps(shown), flush=True)

    summary = summarize(rows)
    print(json.dumps(summary, indent=1))
    if args.json is not None:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "where") and v is not None}
        settings |= {"where": args.where, "epsilon": sorted(args.epsilon)}
        for name in ("tower", "psm", "processor", "images"):
            if name in settings:
                settings[name] = short_name(settings[name])
        model = {"model": model_name(tower), "psm": psm_name(tower), "model_hash": model_hash(tower)}
        results = {"settings": settings, **model, "versions": versions(), "command": command_line()}
        write_json(args.json, results | {"summary": summary, "rows": rows})


if __name__ == "__main__":
    main()
