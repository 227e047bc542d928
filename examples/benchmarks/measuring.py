"""What the speed benchmarks share: networks, a clock, ratios of things measured in turn, peak memory, the JSON file.

A ratio is the median over repeats of the ratio of two measurements that stand side by side in one process, so that a busy
machine slows both. On a CPU with one thread the clock counts the processor time of this process, else it is the wall's.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModel, CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from fs_psm_hf import PSMConfig, PSMModel, SmoothedVisionTower
from fs_psm_hf.certification.identity import short_name
from fs_psm_hf.certification.results_file import versions
from fs_psm_hf.pixels import channel_tensor, from_unit, to_unit
from fs_psm_hf.purifier import DiffusionPurifier


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Random weights of these shapes where no folder is given: time does not depend on their values.
TINY_UNET = {
    "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "norm_num_groups": 4,
    "attention_head_dim": 8,
}  # fmt: skip


def parser(description, *, image_size, repeats):
    """The options of every speed benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tower", default="dinov2-small", help="folder, Hub id, dinov2-small, clip-large-336 or tiny")
    made.add_argument("--psm", default="light", help="folder, Hub id, light, diffusion or tiny")
    made.add_argument("--image-size", type=int, default=image_size)
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=1, help="of the CPU")
    made.add_argument("--true-shapes", action="store_true", help="the shapes of the issue, for a GPU")
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--json", type=Path, help="write the results here")
    return made


def prepare(args):
    """Set up threads and random weights, and the image size of `--true-shapes`."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.true_shapes and args.image_size < 224:
        args.image_size = 224


def vision_tower(name, image_size, dtype, device):
    """The wrapped tower: a folder or Hub id, or random weights of a known shape."""
    if name == "dinov2-small":
        config = Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
        )
        model = Dinov2Model(config)
    elif name == "clip-large-336":
        config = CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            image_size=image_size, patch_size=14, projection_dim=768,
        )  # fmt: skip
        model = CLIPVisionModel(config)
    elif name == "tiny":
        model = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                image_size=image_size, patch_size=8,
            )
        )  # fmt: skip
    else:
        return AutoModel.from_pretrained(name, dtype=dtype).to(device).eval()
    return model.to(device, dtype).eval()


def psm_model(name, dtype, device, mapper_width=None):
    """Purifier and, where `mapper_width` is given or the folder has one, mapper."""
    mapper = None if mapper_width is None else {"hidden_size": mapper_width}
    known = {
        "light": {"purifier": "unet"},
        "diffusion": {"purifier": "diffusion"},
        "tiny": {"purifier": "unet", "purifier_config": TINY_UNET},
    }
    if name not in known:
        return PSMModel.from_pretrained(name, dtype=dtype).to(device).eval()
    return PSMModel(PSMConfig(**known[name], mapper_config=mapper)).to(device, dtype).eval()


def smoothed_tower(args, *, dtype=None, psm=None, mapper_width=None, **options):
    """The tower that the options of the command line describe."""
    dtype = DTYPES[args.dtype] if dtype is None else dtype
    model = vision_tower(args.tower, args.image_size, dtype, args.device)
    own = psm_model(args.psm if psm is None else psm, dtype, args.device, mapper_width)
    settings = {"sigma": 0.25, "image_mean": MEAN, "image_std": STD} | options
    return SmoothedVisionTower.from_components(model, own, **settings)


def pixel_values(args, count, seed=0):
    """Normalised images; their content does not change the time."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, args.image_size, args.image_size, generator=generator)
    return from_unit(images, channel_tensor(MEAN, images), channel_tensor(STD, images)).to(args.device)


def usual_denoise(purifier, noisy, sigma):
    """The light purifier as it is usually written: the layout of the weights, a row of every constant per image."""
    height, width = noisy.shape[-2:]
    if (
        isinstance(purifier, DiffusionPurifier)
        or height % purifier.downsample_factor
        or width % purifier.downsample_factor
    ):
        raise ValueError(
            f"`--psm` must have a light U-Net whose factor {purifier.downsample_factor} divides `--image-size` {height}: the usual "
            f"way is restated for that alone, got a {type(purifier).__name__}"
        )
    levels = torch.full((len(noisy),), sigma, device=noisy.device)
    c_skip, c_out, c_in, c_noise = purifier.scalings(levels)
    c_skip, c_out, c_in = (c[:, None, None, None] for c in (c_skip, c_out, c_in))
    inputs = c_in * (2 * noisy - 1)
    if purifier.patch > 1:
        inputs = torch.nn.functional.pixel_unshuffle(inputs, purifier.patch)
    prediction = purifier.unet(inputs.to(purifier.unet.dtype).contiguous(), c_noise).sample
    if purifier.patch > 1:
        prediction = torch.nn.functional.pixel_shuffle(prediction, purifier.patch)
    return c_skip * noisy + (1 - c_skip) / 2 + c_out / 2 * prediction.float()


def usual_features(tower, noisy, sigma):
    """Unit features of noisy [0, 1] images, network after network, with no engine between."""
    clean = usual_denoise(tower.psm.purifier, noisy, sigma)
    mean, std = channel_tensor(MEAN, clean), channel_tensor(STD, clean)
    tokens = tower.vision_tower(pixel_values=from_unit(clean, mean, std).to(tower.dtype)).last_hidden_state
    if tower.psm.mapper is not None:
        tokens = tokens + tower.psm.mapper(tokens, torch.full((len(tokens),), sigma, device=tokens.device))
    flat = tokens.float().flatten(1)
    return flat / flat.norm(dim=1, keepdim=True)


def unit_images(images):
    """[0, 1] images of normalised ones."""
    return to_unit(images.float(), channel_tensor(MEAN, images.float()), channel_tensor(STD, images.float()))


def clock(args):
    """Seconds: of this process on one CPU thread, of the wall otherwise."""
    if torch.device(args.device).type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if args.threads == 1 else time.perf_counter()


def in_turn(args, functions, warm_up=1, at_least=0.0):
    """Seconds of each function: `repeats` rounds, in each of them every function once.

    With `at_least`, rounds go on until so many seconds were measured: short calls need more of them for a median that holds.

    Args:
        functions (`dict[str, Callable]`): by name.

    Returns:
        `dict[str, list[float]]`: seconds by name, a value per round.
    """
    for _ in range(warm_up):
        for function in functions.values():
            function()
    seconds = {name: [] for name in functions}
    while min(map(len, seconds.values())) < args.repeats or sum(map(sum, seconds.values())) < at_least:
        for name, function in functions.items():
            start = clock(args)
            function()
            seconds[name].append(clock(args) - start)
    return seconds


def median(values):
    """As a plain number."""
    return float(statistics.median(values))


def median_ratio(first, second):
    """Median over the rounds of the ratio of two things measured side by side."""
    return median([a / b for a, b in zip(first, second, strict=True)])


def peak_memory(args, function):
    """Most bytes of tensors that a call held at once, beyond what was held before it.

    On a CPU the allocations that torch's profiler saw are added up, so that pages kept by an allocator from earlier calls
    neither count nor hide anything; the scratch space inside a kernel is not seen.
    """
    if torch.device(args.device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def matmul_rate(args, dtype=None, size=2048):
    """Operations per second of a square matrix product: what this machine can do, measured."""
    dtype = DTYPES[args.dtype] if dtype is None else dtype
    size = 8192 if torch.device(args.device).type == "cuda" else size
    left, right = (torch.randn(size, size, device=args.device).to(dtype) for _ in range(2))
    seconds = in_turn(args, {"product": lambda: left @ right}, warm_up=2)["product"]
    return 2 * size**3 / median(seconds)


def device_name(device):
    """The accelerator's name, or the processor's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def report(args, **found):
    """Print the result with what was measured and where, and write it where `--json` says."""
    known, random_psms = ("dinov2-small", "clip-large-336", "tiny"), ("light", "diffusion", "tiny")
    result = {
        **found,
        "tower": short_name(args.tower),
        "psm": short_name(args.psm),
        "random_weights": {"tower": args.tower in known, "psm": set(args.psm.split(" and ")) <= set(random_psms)},
        "image_size": args.image_size,
        "dtype": args.dtype,
        "device": device_name(args.device),
        "threads": args.threads,
        "clock": "process time" if args.device == "cpu" and args.threads == 1 else "wall",
        "repeats": args.repeats,
        "true_shapes": args.true_shapes,
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "versions": versions(),
        "command": f"python examples/benchmarks/{Path(sys.argv[0]).name} {_options()}".strip(),
    }
    write(args.json, result)


def write(path, result):
    """Print the result, and write it where a path is given: whole, or not at all."""
    print(json.dumps({k: v for k, v in result.items() if k != "versions"}, indent=1))
    if path is not None:
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(unfinished, path)


def _options():
    """The options of the command line without folders of this machine."""
    return shlex.join(short_name(word) if Path(word).is_absolute() else word for word in sys.argv[1:])
