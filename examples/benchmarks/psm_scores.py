"""Draw the scores of Table 5's rows: plain smoothing, purifier, mapper, both, and FFDNet as purifier.

    python examples/benchmarks/psm_scores.py --tower dinov2-small --images imagenet_sample_1000 --where in_cert100=1 \\
        --sigma 0.25 --purifier PSM_OR_none_OR_ffdnet:WEIGHTS --mapper PSM --output scores

Rows with one purifier see the same noisy images, so they share every pass through purifier and tower; the mapper is
added afterwards. Scores are saved as by `fs-psm certify --save-scores`, in `OUTPUT/<row>-sigma<σ>/`, and
`fs-psm certify --from-scores` bounds them. An image whose scores are there is not drawn again.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from fs_psm_hf import PSMModel, SmoothedVisionTower
from fs_psm_hf.certification import draw_scores
from fs_psm_hf.certification.folder import image_name, read_image
from fs_psm_hf.certification.identity import model_hash
from fs_psm_hf.certification.saved import SavedDraws, save_draws, saved_path
from fs_psm_hf.features import unit_vector
from fs_psm_hf.inputs import list_images, load_tower
from fs_psm_hf.training.setup import weights_hash


class HalfFFDNet(torch.nn.Module):
    """FFDNet in bfloat16: twice as fast on a CPU, and its PSNR the same to 1e-4 dB."""

    def __init__(self, weights):
        super().__init__()
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from own_purifier import FFDNet

        self.network = FFDNet(load_file(weights)).to(torch.bfloat16, memory_format=torch.channels_last)

    def denoise(self, images, sigma):
        return self.network.denoise(images.bfloat16(), sigma).float()


def load_purifier(name):
    """`(own purifier or None, PSM without its mapper or None)` of `none`, a PSM, or `ffdnet:WEIGHTS`."""
    kind, _, weights = name.partition(":")
    if kind == "ffdnet":
        return HalfFFDNet(weights).eval(), None
    if kind == "none":
        return None, None
    psm = PSMModel.from_pretrained(name)
    psm.mapper = psm.config.mapper_config = None
    return None, psm


def build_towers(args):
    """`{row: (tower, mapper or None)}`; the first tower makes the passes, the others share its parts."""
    plain, processor = load_tower(args.tower, dtype=args.dtype)
    base, names = plain.vision_tower, ("image_mean", "image_std", "feature_layer", "first_token")
    settings = {"sigma": args.sigma, "num_samples": 4} | {name: getattr(plain.config, name) for name in names}
    own, psm = load_purifier(args.purifier)
    name = args.row or "FS" + ("+FFDNet" if own else "" if psm is None else "+P")
    towers = {name: SmoothedVisionTower.from_components(base, own or psm, **settings)}
    if args.mapper is not None:
        mapped = PSMModel.from_pretrained(args.mapper)
        if psm is None and mapped.purifier is not None:
            raise SystemExit(f"`--mapper` {args.mapper} has a purifier of its own: give it as `--purifier` too")
        if psm is not None and weights_hash(mapped.purifier) != weights_hash(psm.purifier):
            raise SystemExit(f"`--mapper` {args.mapper} has another purifier than `--purifier` {args.purifier}")
        towers[f"{name}+M"] = SmoothedVisionTower.from_components(base, mapped, **settings)
    return processor, towers


@torch.inference_mode()
def draw(towers, pixels, image_id, num_samples, seed, feature):
    """`{row: [draws, scores]}` of one image."""
    first = next(iter(towers.values()))
    found = {}
    for row, tower in towers.items():
        (draws,) = draw_scores(tower, pixels, feature=feature, generator=seed, image_ids=[image_id])
        found[row] = [draws, []]
    options, whole = first._selection.options(feature)
    limit = first._limit(pixels)
    for start in range(0, num_samples, limit):
        samples = range(start, min(start + limit, num_samples))
        ((_, output),) = first._passes(
            first._model(whole), first._selection, pixels, options, seed, [image_id], first.config.sigma, samples, limit
        )  # fmt: skip
        for row, tower in towers.items():
            if tower.psm.mapper is not None:
                tower._selection.refine(output, tower.psm.mapper, tower.config.sigma)
            vectors = unit_vector(tower._selection.vector(output, feature))
            found[row][1].append((1.0 + (vectors * found[row][0].anchor).sum(-1).double()) / 2.0)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--where")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--sigma", type=float, required=True)
    parser.add_argument("--purifier", default="none", help="none, a PSM, or ffdnet:WEIGHTS")
    parser.add_argument("--mapper", help="a PSM whose mapper gives a second row")
    parser.add_argument("--row", help="name of the row without the mapper (default: FS, FS+P or FS+FFDNet)")
    parser.add_argument("--num-samples", type=int, default=200)
    parser.add_argument("--feature", default="cls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    processor, towers = build_towers(args)
    hashes = {row: model_hash(tower) for row, tower in towers.items()}
    files = list_images(args.images, args.where, args.limit)
    for name in tqdm(files):
        image_id = image_name(name)
        folders = {row: args.output / f"{row}-sigma{args.sigma:g}" for row in towers}
        kept = {row: saved_path(folder, image_id) for row, folder in folders.items()}
        for row, path in kept.items():
            if path.exists() and SavedDraws(path).record["model_hash"] != hashes[row]:
                raise SystemExit(f"`--output` {path.parent} holds scores of another tower: give another folder")
        if all(path.exists() and SavedDraws(path).num_samples >= args.num_samples for path in kept.values()):
            continue
        pixels = read_image(args.images / name, processor)
        for row, (draws, scores) in draw(towers, pixels, image_id, args.num_samples, args.seed, args.feature).items():
            facts = {"file": name, "sigma": args.sigma, "served_samples": None, "num_looks": 1}
            save_draws(folders[row], draws, torch.cat(scores).numpy(), facts)


if __name__ == "__main__":
    main()
