"""A small U-Net denoiser for 32-pixel images: a `PSMModel` with a purifier and no mapper."""

import math
import time

import torch
from data import load_cifar10
from diffusers.training_utils import EMAModel
from transformers import get_cosine_schedule_with_warmup

from fs_psm_hf import PSMConfig, PSMModel
from fs_psm_hf.purifier import LIGHT_UNET_SMALL


SIGMA = 0.12  # The level that the demo smooths at, in [0, 1] pixel units.
SIGMA_RANGE = (0.05, 0.30)


def draw_sigma(count, generator):
    """Noise levels (count,): log-normal around SIGMA, a factor 1.65 wide, kept inside SIGMA_RANGE."""
    return (SIGMA * torch.exp(0.5 * torch.randn(count, generator=generator))).clamp(*SIGMA_RANGE)


@torch.no_grad()
def psnr(purifier, images, sigma, seed):
    """Mean over uint8 images of the PSNR in dB, nothing clipped: (of the noisy images, of the denoised ones)."""
    generator, totals = torch.Generator().manual_seed(seed), torch.zeros(2)
    for batch in images.split(100):
        clean = batch.float() / 255
        noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
        for i, image in enumerate((noisy, purifier.denoise(noisy, sigma))):
            totals[i] += (-10 * (image - clean).square().mean((1, 2, 3)).log10()).sum()
    return (totals / len(images)).tolist()


def train(data_dir, output_dir, steps=4500, batch_size=16, learning_rate=1e-3, num_test_images=1000, seed=0):
    """Train on flipped training images, save in bfloat16, measure the reloaded weights; returns the results."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, _ = load_cifar10(data_dir, "train")
    psm = PSMModel(PSMConfig(purifier="unet", purifier_config=LIGHT_UNET_SMALL)).train()
    optimizer = torch.optim.AdamW(psm.parameters(), lr=learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    ema = EMAModel(psm.parameters(), decay=0.998, use_ema_warmup=True, power=3 / 4)
    started, total = time.time(), 0.0
    for step in range(1, steps + 1):
        index = torch.randint(len(images), (batch_size,), generator=generator)
        flip = torch.rand(batch_size, generator=generator) < 0.5
        clean = torch.where(flip.view(-1, 1, 1, 1), images[index].flip(-1), images[index]).float() / 255
        sigma = draw_sigma(batch_size, generator)
        noise = torch.randn(clean.shape, generator=generator)
        denoised = psm(clean + sigma.view(-1, 1, 1, 1) * noise, sigma)
        loss = torch.nn.functional.mse_loss(denoised, clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(psm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(psm.parameters())
        total += loss.item()
        if step % 250 == 0:
            decibels = -10 * math.log10(total / 250)
            print(f"denoiser step {step}/{steps} {decibels:.2f} dB {time.time() - started:.0f} s", flush=True)
            total = 0.0
    seconds = round(time.time() - started)
    ema.copy_to(psm.parameters())
    psm.eval().to(torch.bfloat16).save_pretrained(output_dir)
    purifier = PSMModel.from_pretrained(output_dir, dtype=torch.bfloat16).purifier
    test = load_cifar10(data_dir, "test")[0][:num_test_images]
    measured = {}
    for sigma in (SIGMA, 0.25):
        noisy, denoised = psnr(purifier, test, sigma, seed)
        measured[str(sigma)] = {"noisy_psnr_db": round(noisy, 2), "denoised_psnr_db": round(denoised, 2)}
    return {
        "task": "denoising CIFAR-10 test images",
        "num_images": len(test),
        "sigma": measured,
        "num_parameters": sum(p.numel() for p in purifier.parameters()),
        "dtype": "bfloat16",
        "unet": LIGHT_UNET_SMALL,
        "sigma_range": SIGMA_RANGE,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "train_seconds": seconds,
    }
