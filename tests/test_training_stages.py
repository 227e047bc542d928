"""Both stages as real runs: what is trained and what stays, what is counted, averaged, validated and saved."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, load_file
from tiny_models import MEAN, SIZE, STD, WIDTH, llava, llava_inputs, psm_model, vision_model
from training_runs import (
    assert_equal,
    command,
    log_of,
    losses_of,
    prepared,
    save_images,
    save_tower,
    train,
    weights_of,
    words,
)

from fs_psm_hf import PSMModel, SmoothedVisionTower, attach, certify_scores
from fs_psm_hf.training.saving import copy_psm, save_psm
from fs_psm_hf.training.tower import FrozenTower
from fs_psm_hf.training.validation import FIRST_DRAW, validate


MIDDLE, SPREAD = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tower, eight images to train on and two to validate on, and trained-looking PSMs."""
    root = tmp_path_factory.mktemp("stages")
    save_tower(root / "tower")
    save_images(root / "images", 8)
    save_images(root / "held", 2, seed=9)
    psm_model(mapper=False).save_pretrained(root / "unet")
    psm_model().save_pretrained(root / "whole")
    six = PSMModel._from_config(psm_model("diffusion", mapper=False).config)
    config = six.config.purifier_config | {"out_channels": 6}
    psm = PSMModel(type(six.config)(purifier="diffusion", purifier_config=config))
    psm.save_pretrained(root / "six")
    return root


def falls(losses, share):
    """Whether the last losses are below a share of the first ones."""
    return np.mean(losses[-5:]) < share * np.mean(losses[:5])


@pytest.mark.parametrize("kind", ["unet", "six"])
def test_the_purifier_learns_and_the_tower_stays(kind, root, tmp_path):
    options = {"validation_data_dir": root / "held", "center_crop": True, "lambda_diff": 0.2, "lambda_rb": 1}
    options |= {"train_batch_size": 8, "max_train_steps": 25, "learning_rate": 1e-2, "lambda_mse": 1, "use_ema": False}
    if kind == "six":
        options |= {"pretrained_psm_name_or_path": root / "six", "purifier": "diffusion"}
    trainer = prepared(root, tmp_path / "out", **options)
    tower = weights_of(trainer.tower.tower)
    first, modes = weights_of(trainer.stage.trained), set()
    step = trainer.optimizer.optimizer.register_step_post_hook
    step(lambda *_: modes.add((trainer.psm.purifier.training, trainer.tower.tower.vision_tower.training)))
    trainer.run()
    assert modes == {(True, False)}
    assert_equal(weights_of(trainer.tower.tower), tower)
    assert all(p.grad is None and not p.requires_grad for p in trainer.tower.tower.parameters())
    for name in ("loss", "loss_mse", "loss_rb"):
        assert falls(losses_of(tmp_path / "out", name), 0.9), (name, losses_of(tmp_path / "out", name))
    last, frozen = weights_of(trainer.stage.trained), []
    for name, tensor in last.items():
        if kind == "six" and "conv_out" in name:
            frozen.append(name)
            assert torch.equal(tensor[3:], first[name][3:])
            assert not torch.equal(tensor[:3], first[name][:3])
        elif first[name].any():
            assert not torch.equal(tensor, first[name]), name
    assert len(frozen) == (2 if kind == "six" else 0)
    rows = {name: v for name, v in log_of(tmp_path / "out")[-1].items() if name.endswith("psnr")}
    assert rows["validation/0.1/FS+P/psnr"] > rows["validation/0.1/FS/psnr"]


def test_the_mapper_learns_and_all_else_stays(root, tmp_path):
    options = {"validation_data_dir": root / "held", "center_crop": True, "sigma": 0.4, "lr_scheduler": "constant"}
    options |= {"train_batch_size": 8, "max_train_steps": 25, "learning_rate": 2e-2, "lambda_stats": 1}
    trainer = prepared(root, tmp_path / "out", "mapper", pretrained_psm_name_or_path=root / "unet", **options)
    tower, purifier = weights_of(trainer.tower.tower), weights_of(trainer.psm.purifier)
    # The unit of the update is the mean length of a clean token.
    tokens = vision_like(root)(pixel_values=(trainer.held_out - MIDDLE) / SPREAD).last_hidden_state
    assert trainer.psm.mapper.token_norm.item() == pytest.approx(tokens.norm(dim=-1).mean().item(), rel=1e-4)
    modes = set()
    step = trainer.optimizer.optimizer.register_step_post_hook
    step(lambda *_: modes.add((trainer.psm.mapper.training, trainer.psm.purifier.training)))
    trainer.run()
    assert modes == {(True, False)}
    assert_equal(weights_of(trainer.tower.tower), tower)
    assert_equal(weights_of(trainer.psm.purifier), purifier)
    assert all(p.grad is None for p in trainer.psm.purifier.parameters())
    assert falls(losses_of(tmp_path / "out"), 0.9)
    assert set(losses_of(tmp_path / "out", "loss_id")) == {0}
    rows = log_of(tmp_path / "out")[-1]
    assert rows["validation/0.4/FS+P+M/cosine"] > rows["validation/0.4/FS+P/cosine"]
    saved = PSMModel.from_pretrained(tmp_path / "out")
    assert_equal(weights_of(saved.purifier), purifier)
    assert_equal(weights_of(saved.mapper), weights_of(trainer.psm.mapper))
    assert saved.config.base_model_name_or_path == str(root / "tower")


def vision_like(root):
    return vision_model().from_pretrained(root / "tower").eval()


@pytest.mark.parametrize("stage", ["purifier", "mapper"])
def test_clean_features_are_computed_once_per_image(stage, root, tmp_path):
    """With n₀ = 3, the tower sees 1 + 3 images for each image of a batch; from the cache only 3."""
    options = {"center_crop": True, "num_samples": 3, "feature_cache_dir": tmp_path / "cache"}
    for name, clean in (("one", 1), ("two", 0)):
        trainer, seen = prepared(root, tmp_path / name, stage, **options), []
        trainer.tower.tower.vision_tower.register_forward_hook(
            lambda _, args, kwargs, output, seen=seen: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
        )
        trainer._backward(torch.stack([trainer.images[i]["pixels"] for i in range(4)]), list(range(4)))
        assert sum(seen) == 4 * (clean + 3)


def test_cached_features_change_nothing(root, tmp_path):
    """Same losses, to the rounding of another batch: with no cache, an empty one, a full one and a damaged one."""
    options = {"center_crop": True, "max_train_steps": 4}
    train(root, tmp_path / "none", **options)
    options["feature_cache_dir"] = tmp_path / "cache"
    for name in ("empty", "full"):
        train(root, tmp_path / name, **options)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    whole = [path.read_bytes() for path in files]
    assert len(files) == 7
    files[0].write_bytes(whole[0][:50])
    files[1].write_bytes(b"")
    # Readable, with another number in it; the digest is the last 16 bytes.
    files[2].write_bytes(whole[2][:-17] + bytes([whole[2][-17] ^ 64]) + whole[2][-16:])
    assert not torch.equal(load_file(files[2])["features"], load(whole[2])["features"])
    train(root, tmp_path / "damaged", **options)
    for path, before in zip(files, whole, strict=True):
        torch.testing.assert_close(load_file(path)["features"], load(before)["features"], rtol=1e-5, atol=1e-5)
    for name in ("empty", "full", "damaged"):
        assert losses_of(tmp_path / name) == pytest.approx(losses_of(tmp_path / "none"), rel=1e-5), name
    # Another feature and another tower have their own files.
    train(root, tmp_path / "pooled", **options | {"feature": "pooled", "max_train_steps": 1})
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_averaged_weights(root, tmp_path):
    """The recursion of the average restated; it is what is validated and saved, and never what is trained."""
    trainer = prepared(root, tmp_path / "out", max_train_steps=12, learning_rate=1e-2, ema_max_decay=0.3)
    purifier, states = trainer.stage.trained, [weights_of(trainer.stage.trained)]
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: states.append(weights_of(purifier)))
    trainer.run()
    assert len(states) == 13
    average = states[0]
    for step, weights in enumerate(states[1:], 1):
        decay = 0 if step == 1 else min(step / (9 + step), 0.3)
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
    saved = PSMModel.from_pretrained(tmp_path / "out")
    for name, tensor in weights_of(saved.purifier).items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-6)
    assert_equal(weights_of(purifier), states[-1])
    assert (saved.purifier.unet.conv_in.weight - purifier.unet.conv_in.weight).abs().max() > 1e-3
    logged = log_of(tmp_path / "out")[-1]
    for model, close in ((saved.purifier, True), (purifier, False)):
        found = validate(trainer.tower, trainer.held_out, 0.1, 2, model.eval())["FS+P"]["psnr"]
        assert (found == pytest.approx(logged["validation/0.1/FS+P/psnr"], abs=1e-4)) == close


@pytest.mark.parametrize("feature", ["tokens", "cls", "pooled"])
def test_validation_is_what_the_smoothed_tower_gives(feature, root):
    """Cosine, FCSB and radius from `sample_features` on the same noise, PSNR by numpy."""
    sigma, draws = 0.15, 6
    images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    psm = psm_model(feature="pooled" if feature == "pooled" else "tokens")
    trainer = prepared(root, root / f"never-{feature}", feature=feature, feature_layer=-2, first_token=1)
    frozen, pixels = trainer.tower, (images - MIDDLE) / SPREAD
    found = validate(frozen, images, sigma, draws, psm.purifier, psm.mapper, batch_size=2)
    assert list(found) == ["FS", "FS+P", "FS+P+M"]
    purifier_only, mapper_only = psm_model(mapper=False), psm_model(feature=psm.config.mapper_feature)
    purifier_only.purifier, mapper_only.mapper = psm.purifier, psm.mapper
    noise = torch.stack([_noise(i, draws) for i in range(3)])  # (B, n, 3, H, W)
    noisy = images[:, None] + sigma * noise
    purified = psm.purifier(noisy.flatten(0, 1), sigma).view_as(noisy)
    for row, part, seen in (("FS", None, noisy), ("FS+P", purifier_only, purified), ("FS+P+M", psm, purified)):
        tower = SmoothedVisionTower.from_components(
            vision_like(root), part, sigma=sigma, image_mean=MEAN, image_std=STD, feature_layer=-2, first_token=1
        )
        anchors = tower.clean_features(pixels, feature)
        stream = tower.sample_features(pixels, draws, feature, generator=0, start=FIRST_DRAW)
        cosines = torch.cat([(unit * anchors[:, None]).sum(-1) for unit in stream], 1).double()
        certificates = certify_scores(
            (1 + cosines.numpy()) / 2, sigma=sigma, epsilons=(0.25, 0.5, 0.75), method="plugin"
        )
        assert found[row]["cosine"] == pytest.approx(cosines.mean().item(), abs=1e-5)
        bounds = np.mean([c.inner_product_bounds for c in certificates], 0)
        assert [found[row][f"fcsb@{e}"] for e in (0.25, 0.5, 0.75)] == pytest.approx(list(bounds), abs=1e-4)
        assert found[row]["radius"] == pytest.approx(np.mean([c.radius for c in certificates]), abs=1e-4)
        errors = (seen - images[:, None]).detach().double().square().mean((2, 3, 4)).numpy()
        assert found[row]["psnr"] == pytest.approx((-10 * np.log10(errors)).mean(), abs=1e-4)
    # Without a purifier the mapper refines what noise alone leaves.
    assert list(validate(frozen, images, sigma, 1, None, psm.mapper)) == ["FS", "FS+M"]


def _noise(image, draws):
    streams = [np.random.Philox(key=[0, image], counter=[0, 0, 0, FIRST_DRAW + i]) for i in range(draws)]
    draws = [np.random.Generator(s).standard_normal((3, SIZE, SIZE), dtype=np.float32) for s in streams]
    return torch.from_numpy(np.stack(draws))


def test_pictures_at_every_validation(root, tmp_path):
    options = {"validation_data_dir": root / "held", "max_train_steps": 5, "validation_steps": 2}
    trainer = train(root, tmp_path / "out", validation_sigmas=[0.1, 0.3], **options)
    pictures = sorted((tmp_path / "out" / "samples").iterdir())
    assert [path.name for path in pictures] == [f"step-{step:06d}.png" for step in (0, 2, 4, 5)]
    logged = [line for line in log_of(tmp_path / "out") if any(name.startswith("validation") for name in line)]
    assert [line["step"] for line in logged] == [0, 0, 2, 2, 4, 4, 5, 5]
    assert "validation/0.1/FS/cosine" in logged[0]
    assert "validation/0.3/FS+P/radius" in logged[1]
    rows = np.asarray(Image.open(pictures[-1])).reshape(3, SIZE, 2, SIZE, 3).transpose(0, 2, 4, 1, 3) / 255
    assert np.abs(rows[0] - trainer.held_out.numpy()).max() <= 0.501 / 255
    noisy = (trainer.held_out + 0.1 * torch.cat([_noise(i, 1) for i in range(2)])).clamp(0, 1)
    assert np.abs(rows[1] - noisy.numpy()).max() <= 0.501 / 255
    assert np.abs(rows[2] - rows[1]).max() > 0.01
    train(root, tmp_path / "mapper", "mapper", validation_data_dir=root / "held")
    with Image.open(tmp_path / "mapper" / "samples" / "step-000002.png") as picture:
        assert picture.size == (2 * SIZE, 2 * SIZE)  # nothing purifies


@pytest.mark.parametrize("kind", ["llava", "projection", "siglip", "dinov2"])
def test_every_kind_of_tower_trains_and_serves_what_was_trained(kind, root, tmp_path):
    save_tower(tmp_path / "tower", kind)
    (tmp_path / "images").symlink_to(root / "images")
    feature = "pooled" if kind == "projection" else "tokens"
    command_line = words(
        tmp_path,
        "out",
        "both",
        feature=feature,
        max_train_steps=1,
        weights_dtype="bfloat16",
        num_samples=1,
        num_blocks=1,
    )
    assert command(*command_line) == 0
    psm = PSMModel.from_pretrained(tmp_path / "out")
    assert psm.config.base_model_name_or_path == str(tmp_path / "tower")
    assert psm.dtype == torch.bfloat16
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.bfloat16}
    mapper = psm.config.mapper_config
    assert psm.config.mapper_feature == feature
    assert mapper["hidden_size"] == (24 if kind == "projection" else WIDTH)
    if kind == "projection":
        assert mapper["kernel_size"] == 0
    else:
        assert mapper["num_prefix_tokens"] == (0 if kind == "siglip" else 1)
    if kind == "llava":
        host = llava()
        tower = attach(host, psm.float(), sigma=0.1, image_mean=MEAN, image_std=STD)
        assert (tower.config.feature_layer, tower.config.first_token) == (-2, 1)
        assert host(**llava_inputs()).logits.isfinite().all()
        return
    tower = SmoothedVisionTower.from_components(
        vision_model(kind), psm.float(), sigma=0.1, image_mean=MEAN, image_std=STD
    )
    output = tower(torch.randn(1, 3, SIZE, SIZE))
    features = output.image_embeds if kind == "projection" else output.last_hidden_state
    assert features.isfinite().all()


def test_a_mapper_is_trained_further(root, tmp_path):
    """Starting from a PSM with a mapper goes on with that mapper, and its unit stays; another shape is refused."""
    with pytest.raises(ValueError, match="`--num_blocks` must not be given with .* which has a mapper"):
        prepared(root, tmp_path / "out", "mapper", pretrained_psm_name_or_path=root / "whole", num_blocks=2)
    trainer = prepared(root, tmp_path / "out", "mapper", pretrained_psm_name_or_path=root / "whole")
    assert_equal(weights_of(trainer.psm.mapper), weights_of(PSMModel.from_pretrained(root / "whole").mapper) | {
        "token_norm": trainer.psm.mapper.token_norm
    })  # fmt: skip
    trainer.run()
    assert PSMModel.from_pretrained(tmp_path / "out").config.base_model_name_or_path == str(root / "tower")


def test_saving_memory_and_time_gives_the_same_losses(root, tmp_path):
    """Recomputed activations exactly the same up to rounding, 16 bits near it; the result is float32 either way."""
    for stage in ("purifier", "mapper"):
        start = {"pretrained_psm_name_or_path": root / "unet"} if stage == "mapper" else {}
        train(root, tmp_path / stage, stage, **start)
        expected = losses_of(tmp_path / stage)
        train(root, tmp_path / f"{stage}-less", stage, gradient_checkpointing=True, **start)
        assert losses_of(tmp_path / f"{stage}-less") == pytest.approx(expected, rel=1e-5)
        for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            folder = tmp_path / f"{stage}-{precision}"
            trainer = train(root, folder, stage, mixed_precision=precision, **start)
            assert losses_of(folder) == pytest.approx(expected, rel=0.05)
            assert losses_of(folder) != expected
            assert trainer.tower.tower.dtype == dtype
            assert PSMModel.from_pretrained(folder).dtype == torch.float32


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_a_recomputed_tower_keeps_less_and_has_the_same_gradient(kind):
    """Of each block its input is kept, and nothing in it runs as in training."""
    found = {}
    for checkpointing in (False, True):
        smoothed = SmoothedVisionTower.from_components(vision_model(kind), image_mean=MEAN, image_std=STD)
        tower = FrozenTower(smoothed, "tokens", checkpointing)
        images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            features = tower.vector(tower.raw(images))
        features.square().sum().backward()
        found[checkpointing] = sum(kept), features.detach(), images.grad
    assert found[True][0] < 0.5 * found[False][0]
    torch.testing.assert_close(found[True][1:], found[False][1:])


@pytest.mark.parametrize("kind", ["clip", "projection"])
def test_the_feature_of_an_openflamingo(kind):
    """Patch tokens after the last LayerNorm, which transformers gives its class token only."""
    model = vision_model(kind).eval()
    smoothed = SmoothedVisionTower.from_components(model, image_mean=MEAN, image_std=STD)
    tower = FrozenTower(smoothed, "tokens", post_layernorm=True)
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    pixels = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    states = model(pixels).last_hidden_state[:, 1:]
    norm = getattr(model, "vision_model", model).post_layernorm
    centred = states - states.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(tower.vector(tower.raw(images)), expected)
    assert tower.num_prefix_tokens == 0
    assert tower.width == expected.shape[-1]


def test_a_psm_for_an_openflamingo(root, tmp_path):
    """Its mapper refines patch tokens alone, and features on disk are not taken for those of another host."""
    cache = {"center_crop": True, "feature_cache_dir": tmp_path / "cache", "max_train_steps": 2}
    options = {"purifier": "none", "num_blocks": 1} | cache
    train(root, tmp_path / "clip", "mapper", **options)
    options["post_layernorm"] = "true"
    train(root, tmp_path / "cached", "mapper", **options)
    assert losses_of(tmp_path / "cached") != pytest.approx(losses_of(tmp_path / "clip"), rel=1e-3)
    del options["feature_cache_dir"]
    train(root, tmp_path / "flamingo", "mapper", **options)
    assert losses_of(tmp_path / "cached") == pytest.approx(losses_of(tmp_path / "flamingo"), rel=1e-5)
    config = PSMModel.from_pretrained(tmp_path / "flamingo").config
    assert (config.mapper_feature, config.mapper_config["num_prefix_tokens"]) == ("tokens", 0)
    assert PSMModel.from_pretrained(tmp_path / "clip").config.mapper_config["num_prefix_tokens"] == 1


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_a_tower_that_no_openflamingo_has_is_refused(kind):
    smoothed = SmoothedVisionTower.from_components(vision_model(kind), image_mean=MEAN, image_std=STD)
    with pytest.raises(
        ValueError, match=f"`--post_layernorm` must be left out: {type(smoothed.vision_tower).__name__}"
    ):
        FrozenTower(smoothed, "tokens", post_layernorm=True)


def test_a_large_psm_is_saved_in_pieces_and_replaces_the_one_before(tmp_path):
    """Pieces that no longer belong to it are gone, in the folder of both stages too."""
    small, large = psm_model(seed=1), psm_model(seed=2)
    small.purifier = None
    small.config.purifier = "none"
    save_psm(large, tmp_path / "out", "20KB")
    pieces = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(pieces) > 1
    copy_psm(tmp_path / "out", tmp_path / "copy")
    for folder in ("out", "copy"):
        assert_equal(weights_of(PSMModel.from_pretrained(tmp_path / folder)), weights_of(large))
    save_psm(small, tmp_path / "out")
    copy_psm(tmp_path / "out", tmp_path / "copy")
    for folder in ("out", "copy"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["config.json", "model.safetensors"]
        assert_equal(weights_of(PSMModel.from_pretrained(tmp_path / folder)), weights_of(small))


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["purifier", "mapper"])
def test_a_gpu_gives_the_losses_of_the_cpu(stage, root, tmp_path):
    """In float32 up to rounding, in bfloat16 and compiled near it; a run that was stopped goes on."""
    start = {"pretrained_psm_name_or_path": root / "unet"} if stage == "mapper" else {}
    train(root, tmp_path / "cpu", stage, **start)
    expected = losses_of(tmp_path / "cpu")
    train(root, tmp_path / "gpu", stage, use_cpu=False, max_train_steps=1, **start)
    train(root, tmp_path / "gpu", stage, use_cpu=False, resume_from_checkpoint="latest", **start)
    assert losses_of(tmp_path / "gpu") == pytest.approx(expected, rel=1e-3)
    trainer = train(root, tmp_path / "fast", stage, use_cpu=False, mixed_precision="bf16", torch_compile=True, **start)
    assert trainer.accelerator.device.type == "cuda"
    assert losses_of(tmp_path / "fast") == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["purifier", "mapper"])
def test_compiled_networks_give_the_same_losses(stage, root, tmp_path):
    start = {"pretrained_psm_name_or_path": root / "unet"} if stage == "mapper" else {}
    train(root, tmp_path / "plain", stage, **start)
    train(root, tmp_path / "compiled", stage, torch_compile=True, **start)
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-4)
    compiled = PSMModel.from_pretrained(tmp_path / "compiled")
    assert weights_of(compiled).keys() == weights_of(PSMModel.from_pretrained(tmp_path / "plain")).keys()
