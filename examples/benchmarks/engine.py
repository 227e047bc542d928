"""Each choice of the engine against what it replaced, in turn in one process, and how far the passes are from the floor.

    python examples/benchmarks/engine.py --json engine.json
    python examples/benchmarks/engine.py --psm model_cards/fs-psm-dinov2-small --json engine_psm.json
    python examples/benchmarks/engine.py --device cuda --true-shapes --compile --json engine_gpu.json

The floor of a network is its operations over the rate of a square matrix product on this machine in the same dtype.
`share_of_matmul_rate` is floor over time: what a processor that only multiplies would reach is 1.
"""

import copy
import time

import torch
from measuring import (
    DTYPES,
    in_turn,
    matmul_rate,
    median,
    median_ratio,
    parser,
    pixel_values,
    prepare,
    report,
    smoothed_tower,
    usual_denoise,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fs_psm_hf.mapper import SmoothnessMapper


def operations(function):
    """Floating point operations of the products and convolutions of a call."""
    # The counter knows attention on a CPU only as the products it is made of.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def against(args, name, before, after):
    """One row: seconds before and after, and how many times faster."""
    seconds = in_turn(args, {"before": before, "after": after})
    row = {
        "change": name,
        "seconds_before": median(seconds["before"]),
        "seconds_after": median(seconds["after"]),
        "times_faster": median_ratio(seconds["before"], seconds["after"]),
    }
    print(row, flush=True)
    return row


def changes(args, tower):
    """Rows of what was changed, each with the rest as it is now."""
    sigma, purifier, count = tower.config.sigma, tower.psm.purifier, args.pass_size
    noisy = torch.rand(count, 3, args.image_size, args.image_size, device=args.device)
    rows = [against(
        args, "U-Net in channels-last layout",
        lambda: usual_denoise(purifier, noisy, sigma), lambda: purifier.denoise(noisy, sigma),
    )]  # fmt: skip
    width = tower.config.hidden_size
    mapper = tower.psm.mapper
    if mapper is None:
        mapper = SmoothnessMapper(width).to(args.device, tower.dtype).eval()
    pixels = noisy.to(tower.dtype)
    tokens = tower.vision_tower(pixel_values=pixels).last_hidden_state
    levels = torch.full((count,), sigma, device=args.device)
    rows.append(against(
        args, "mapper's functions of sigma once for all images",
        lambda: mapper(tokens, levels), lambda: mapper(tokens, sigma),
    ))  # fmt: skip
    depth = tower.config.num_hidden_layers
    short = smoothed_tower(args, feature_layer=-2)
    short.vision_tower = tower.vision_tower
    shallow = short._model(whole=False)
    rows.append(against(
        args, f"tower cut at layer -2 of {depth}",
        lambda: tower.vision_tower(pixel_values=pixels, output_hidden_states=True),
        lambda: shallow(pixel_values=pixels, output_hidden_states=True),
    ))  # fmt: skip
    other = smoothed_tower(args, dtype=torch.float32)
    other.load_state_dict(tower.state_dict())
    image = pixel_values(args, 1)
    if tower.dtype != torch.float32:
        rows.append(against(
            args, f"{args.dtype} in place of float32, whole forward",
            lambda: other(image, generator=0), lambda: tower(image, generator=0),
        ))  # fmt: skip

    def passes_of(limit):
        def run():
            with tower.smoothing(num_samples=2 * args.wide_pass, max_batch_size=limit):
                tower(image, generator=0)

        return run

    rows.append(against(
        args, f"passes of {count} in place of {args.wide_pass} noisy images",
        passes_of(args.wide_pass), passes_of(count),
    ))  # fmt: skip
    if args.int8:
        rows += quantised(args, tower, noisy, pixels)
    here = passes_of(count)
    if args.compile:
        tower.compile()
        compiled = tower._compiled_pass
        start = time.perf_counter()  # of the wall: the compiler is another process
        here()
        first = time.perf_counter() - start

        def switched(to):
            def run():
                tower._compiled_pass = to
                here()

            return run

        row = against(args, "torch.compile of the pass", switched(None), switched(compiled))
        rows.append(row | {"seconds_first_call": first, "failure": compiled.failure})
        tower._compiled_pass = None
    return rows


def quantised(args, tower, noisy, pixels):
    """Rows for purifier and tower with their linear layers in int8 by torchao, which leaves convolutions as they are."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def int8(module):
        with torch.inference_mode(False):
            module = copy.deepcopy(module)
            quantize_(module, Int8DynamicActivationInt8WeightConfig())
        return module

    purifier, model, sigma = tower.psm.purifier, tower.vision_tower, tower.config.sigma
    calls = {
        "U-Net": (purifier, lambda module: module(noisy, sigma)),
        "tower": (model, lambda module: module(pixel_values=pixels).last_hidden_state),
    }
    rows = []
    for name, (module, call) in calls.items():
        fewer = int8(module)
        for how in ("", ", both compiled"):
            with torch.inference_mode(False):  # compiled code is kept for such calls and for others apart
                one, other = (torch.compile(m) for m in (module, fewer)) if how else (module, fewer)
            rows.append(against(
                args, f"linear layers of the {name} in int8{how}",
                lambda one=one, call=call: call(one), lambda other=other, call=call: call(other),
            ))  # fmt: skip
    return rows


def floors(args, tower):
    """For each network of a pass: operations, seconds, and the share of the machine's rate that it reaches."""
    rate, count = matmul_rate(args), args.pass_size
    noisy = torch.rand(count, 3, args.image_size, args.image_size, device=args.device)
    pixels = noisy.to(tower.dtype)
    tokens = tower.vision_tower(pixel_values=pixels).last_hidden_state
    parts = {
        "purifier": lambda: tower.psm.purifier.denoise(noisy, tower.config.sigma),
        "tower": lambda: tower.vision_tower(pixel_values=pixels),
    }
    if tower.psm.mapper is not None:
        parts["mapper"] = lambda: tower.psm.mapper(tokens, tower.config.sigma)
    rows = []
    for name, seconds in in_turn(args, parts).items():
        needed = operations(parts[name])
        rows.append({
            "network": name, "operations": needed, "seconds": median(seconds),
            "floor_seconds": needed / rate, "share_of_matmul_rate": needed / rate / median(seconds),
        })  # fmt: skip
    return rate, rows


def main():
    made = parser(__doc__, image_size=224, repeats=5)
    made.add_argument("--pass-size", type=int, help="noisy images in a pass (default: the tower's own)")
    made.add_argument("--wide-pass", type=int, help="the larger pass to compare with (default: four times that)")
    made.add_argument("--compile", action="store_true")
    made.add_argument("--int8", action="store_true", help="needs torchao")
    args = made.parse_args()
    prepare(args)
    with torch.inference_mode():
        tower = smoothed_tower(args)
        args.pass_size = args.pass_size or tower._limit(pixel_values(args, 1))
        args.wide_pass = args.wide_pass or 4 * args.pass_size
        rate, networks = floors(args, tower)
        rates = {name: matmul_rate(args, dtype) for name, dtype in DTYPES.items()}
        rows = changes(args, tower)
    report(args, matmul_rate=rate, matmul_rates=rates, networks=networks, changes=rows, pass_size=args.pass_size)


if __name__ == "__main__":
    main()
