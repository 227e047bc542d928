"""A purifier of your own: FFDNet, a small published denoiser, in front of any vision tower.

    python examples/own_purifier.py --vision-tower DIR_OR_ID --ffdnet ffdnet-color/model.safetensors --image photo.jpg

Anything with `denoise(images_01, sigma) -> images_01` will do. Prints how well the noise is removed, and the certificate
of the image with and without the purifier.
"""

import argparse

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel

from fs_psm_hf import SmoothedVisionTower, certify_features


class FFDNet(nn.Module):
    """FFDNet for colour images (Zhang et al., TIP 2018): convolutions at half resolution, told the noise level by a map.

    Args:
        state (`dict[str, torch.Tensor]`): published weights; depth and width are read from them.
    """

    def __init__(self, state):
        super().__init__()
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        weights = [state[f"{2 * i}.weight"] for i in range(len(state) // 2)]
        layers = []
        for weight in weights:
            layers += [nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.net.load_state_dict(state)

    def denoise(self, images, sigma):
        """Images `(batch_size, 3, height, width)` with noise of standard deviation `sigma`, both in [0, 1]."""
        height, width = images.shape[-2:]
        padded = nn.functional.pad(images, (0, width % 2, 0, height % 2), mode="replicate")
        quarters = nn.functional.pixel_unshuffle(padded, 2)  # (B, 12, H/2, W/2)
        level = quarters.new_full((len(quarters), 1, *quarters.shape[-2:]), sigma)
        clean = nn.functional.pixel_shuffle(self.net(torch.cat([quarters, level], 1)), 2)
        return clean[..., :height, :width]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision-tower", required=True)
    parser.add_argument("--ffdnet", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--num-samples", type=int, default=500)
    args = parser.parse_args()

    processor = AutoImageProcessor.from_pretrained(args.vision_tower)
    vision_tower = AutoModel.from_pretrained(args.vision_tower)
    ffdnet = FFDNet(load_file(args.ffdnet)).eval()
    pixels = processor(images=Image.open(args.image).convert("RGB"), return_tensors="pt")["pixel_values"]

    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    clean = pixels * std + mean
    noisy = clean + args.sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        purified = ffdnet.denoise(noisy, args.sigma)
    for name, images in (("noisy", noisy), ("FFDNet", purified)):
        print(f"{name}: PSNR {-10 * (images - clean).square().mean().log10().item():.2f} dB")

    for name, purifier in (("plain smoothing", None), ("with FFDNet", ffdnet)):
        tower = SmoothedVisionTower.from_components(vision_tower, purifier, sigma=args.sigma, processor=processor)
        (certificate,) = certify_features(tower, pixels, num_samples=args.num_samples, feature="cls", generator=0)
        score = 2 * certificate.robustness_score - 1
        print(f"{name}: mean cosine {score:.3f}, certified radius {certificate.radius:.3f} at 99.9 % confidence")


if __name__ == "__main__":
    main()
