"""Arguments, configuration files, trackers, and mistakes that must be one line."""

import importlib.util
import json
import shutil

import pytest
import torch
import yaml
from tiny_models import psm_model
from training_runs import (
    UNET,
    command,
    log_of,
    losses_of,
    save_images,
    save_tower,
    start,
    train,
    words,
)

from fs_psm_hf import PSMModel
from fs_psm_hf.training import parse_arguments
from fs_psm_hf.training.arguments import make_parser
from fs_psm_hf.training.trackers import check_report_to


LEAST = ["--output_dir", "out", "--train_data_dir", "images", "--pretrained_model_name_or_path", "tower"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    save_tower(root / "tower")
    save_images(root / "images", 8)
    (root / "empty").mkdir()
    psm_model().save_pretrained(root / "psm")
    psm_model(width=48).save_pretrained(root / "wide")
    psm_model(purifier="none", feature="pooled").save_pretrained(root / "pooled")
    return root


def parse(*argv):
    return parse_arguments([*LEAST, *map(str, argv)])


def test_values_of_the_paper():
    purifier, mapper = parse()
    assert (purifier.stage, mapper.stage) == ("purifier", "mapper")
    assert (purifier.output_dir, mapper.output_dir) == ("out/purifier", "out/mapper")
    assert (purifier.pretrained_psm_name_or_path, mapper.pretrained_psm_name_or_path) == (None, "out/purifier")
    for args in (purifier, mapper):
        assert (args.sigma_range, args.num_samples, args.feature) == ((0.25, 0.25), 8, "tokens")
        assert (args.lambda_mse, args.lambda_stats, args.lambda_id) == (0.25, 100, 0.25)
    assert (purifier.lambda_diff, purifier.lambda_rb, purifier.purifier, purifier.use_ema) == (1, 0.25, "unet", True)
    assert (purifier.learning_rate, purifier.max_train_steps, purifier.num_train_epochs) == (5e-5, 12_000, None)
    assert (mapper.lambda_rb, mapper.use_ema, mapper.lr_scheduler) == (1, False, "cosine")
    assert (mapper.learning_rate, mapper.max_train_steps, mapper.num_train_epochs) == (2e-4, None, 8)
    # Epochs that are asked for take the place of the steps.
    (args,) = parse("--stage", "purifier", "--num_train_epochs", 3)
    assert (args.max_train_steps, args.num_train_epochs) == (None, 3)


@pytest.mark.parametrize(
    ("preset", "name", "feature", "layer", "first"),
    [
        ("llava-1.5", "openai/clip-vit-large-patch14-336", "tokens", -2, 1),
        ("openflamingo", "openai/clip-vit-large-patch14", "tokens", None, None),
        ("clip-vit-large-patch14", "openai/clip-vit-large-patch14", "pooled", None, None),
        ("clip-vit-base-patch16", "openai/clip-vit-base-patch16", "pooled", None, None),
    ],
)
def test_presets(preset, name, feature, layer, first):
    least = ["--preset", preset, *LEAST[:4]]
    for args in parse_arguments(least):
        assert (args.pretrained_model_name_or_path, args.feature) == (name, feature)
        assert (args.feature_layer, args.first_token) == (layer, first)
        assert args.post_layernorm is (preset == "openflamingo")
    changed = ["--feature", "cls", "--feature_layer", "-3", "--post_layernorm", "false"]
    (args,) = parse_arguments([*least, *LEAST[4:], "--stage", "purifier", *changed])
    assert (args.pretrained_model_name_or_path, args.feature, args.feature_layer) == ("tower", "cls", -3)


@pytest.mark.parametrize("dump", [json.dumps, yaml.safe_dump])
def test_a_file_of_arguments(dump, tmp_path):
    """Sections count for their stage, and what is typed counts more than either."""
    values = {
        "output_dir": "there",
        "train_data_dir": ["one", "two"],
        "train_data_weights": [2, 1],
        "pretrained_model_name_or_path": "tower",
        "feature_layer": -2,
        "sigma": 0.3,
        "seed": 5,
        "revision": None,
        "center_crop": True,
        "purifier_config": {"in_channels": 3},
        "purifier": {"learning_rate": 1e-3, "max_train_steps": 7, "sigma": 0.4, "use_ema": False},
        "mapper": {"learning_rate": 1e-2, "num_train_epochs": 2, "num_blocks": 1},
    }
    path = tmp_path / "config"
    path.write_text(dump(values))
    purifier, mapper = parse_arguments(["--config", str(path), "--seed", "6"])
    for args in (purifier, mapper):
        assert (args.train_data_dir, args.train_data_weights) == (["one", "two"], [2.0, 1.0])
        assert (args.feature_layer, args.seed, args.center_crop, args.revision) == (-2, 6, True, None)
        assert args.purifier_config == {"in_channels": 3}
    assert (purifier.learning_rate, purifier.max_train_steps, purifier.sigma, purifier.use_ema) == (
        1e-3,
        7,
        0.4,
        False,
    )
    assert (mapper.learning_rate, mapper.num_train_epochs, mapper.sigma, mapper.num_blocks) == (1e-2, 2, 0.3, 1)
    assert (purifier.num_blocks, mapper.use_ema, mapper.output_dir) == (None, False, "there/mapper")
    (mapper,) = parse_arguments(
        [f"--config={path}", "--stage", "mapper", "--purifier", "none", "--learning_rate", "0.5"]
    )
    assert (mapper.learning_rate, mapper.num_blocks, mapper.output_dir) == (0.5, 1, "there")
    # `purifier:` with one word is the kind of purifier.
    path.write_text(dump(values | {"purifier": "none", "stage": "mapper"}))
    (mapper,) = parse_arguments(["--config", str(path)])
    assert mapper.purifier == "none"


def test_an_own_number_without_a_point_is_read(tmp_path):
    """YAML reads 1e-5 as a word."""
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-5\nstage: purifier\n")
    (args,) = parse("--config", tmp_path / "c.yaml")
    assert args.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sigmaa", "1"], "`--sigmaa` is no argument of the training"),
        (["--sig", "1"], "`--sig` is no argument of the training"),
        (["--sigma", "much"], "--sigma: invalid float value: 'much'"),
        (["--num_samples", "2.5"], "invalid int value: '2.5'"),
        (["--use_ema", "perhaps"], "perhaps"),
        (["--sigma", "0"], "`--sigma` must be > 0 in [0, 1] pixel units, got 0.0"),
        (["--sigma", "nan"], "`--sigma` must be > 0"),
        (["--sigma_min", "0.1"], "`--sigma_min` and `--sigma_max` must be given together"),
        (["--sigma_min", "0.2", "--sigma_max", "0.1"], "the smaller first, got 0.2 and 0.1"),
        (["--validation_sigmas", "0.1", "0"], "`--validation_sigmas` must be > 0"),
        (["--num_samples", "0"], "`--num_samples` must be >= 1, got 0"),
        (["--learning_rate", "-1"], "`--learning_rate` must be >= 0, got -1.0"),
        (["--learning_rate", "inf"], "`--learning_rate` must be >= 0, got inf"),
        (["--adam_beta1", "1"], "`--adam_beta1` must be < 1, got 1.0"),
        (["--stage", "third"], "`--stage` must be one of purifier, mapper, both, got third"),
        (["--preset", "gpt"], "`--preset` must be one of llava-1.5, openflamingo"),
        (["--feature", "mean"], "`--feature` must be one of tokens, pooled, cls, got mean"),
        (["--post_layernorm", "true", "--feature_layer", "-2"], "`--post_layernorm` must be given with `--feature` tokens and no"),
        (["--purifier", "vae"], "`--purifier` must be one of none, diffusion, unet, got vae"),
        (["--lr_scheduler", "wave"], "`--lr_scheduler` must be one of linear, cosine"),
        (["--lr_scheduler", "reduce_lr_on_plateau"], "`--lr_scheduler` must be one of linear, cosine"),
        (["--mixed_precision", "fp4"], "`--mixed_precision` must be one of no, fp16, bf16, got fp4"),
        (["--weights_dtype", "int8"], "`--weights_dtype` must be one of float32, bfloat16, float16, got int8"),
        (["--dataset_name", "cifar10"], "one of `--train_data_dir` and `--dataset_name` must be given"),
        (["--feature_cache_dir", "c"], "`--feature_cache_dir` needs `--center_crop` and no `--random_flip`"),
        (["--random_resize", "--center_crop"], "`--random_resize` must not be given with `--center_crop`"),
        (["--purifier_config", "{"], "`--purifier_config` must be JSON or a file of it, got {"),
        (["--purifier_config", "[1]"], "`--purifier_config` must be JSON or a file of it, got [1]"),
        (["--mapper_config", "nowhere.json"], "`--mapper_config` must be JSON or a file of it, got nowhere.json"),
        (["--stage", "purifier", "--purifier", "none"], "stage purifier must have a `--purifier`"),
        (["--stage", "purifier", "--purifier", "diffusion"], "must start from a trained network"),
        (["--stage", "purifier", "--lambda_diff", "0", "--lambda_rb", "0", "--lambda_mse", "0"], "a loss with a weight > 0"),
        (["--stage", "mapper", "--purifier", "none", "--lambda_rb", "0", "--lambda_stats", "0"], "a loss with a weight > 0"),
        (["--stage", "mapper", "--purifier", "unet"], "must have the trained purifier"),
        (["--stage", "mapper"], "must have the trained purifier"),
        (["--config"], "`--config` must be followed by a file"),
        (["--config", "nowhere.yaml"], "`--config` must be a YAML or JSON file, got nowhere.yaml"),
        (["--config", "TEXT:a: [1"], "`--config` must be a YAML or JSON file"),
        (["--config", "TEXT:- 1"], "must hold names and values, got list"),
        (["--config", "TEXT:sigmaa: 1"], "has an unknown argument 'sigmaa'"),
        (["--config", "TEXT:mapper: {sigmaa: 1}"], "has an unknown argument 'sigmaa'"),
        (["--config", "TEXT:sigma: much"], "--sigma: invalid float value: 'much'"),
        (["--config", "TEXT:num_samples: 2.5"], "invalid int value: '2.5'"),
        (["--config", "TEXT:purifier: {num_samples: [1, 2]}"], "must have one value for num_samples, got [1, 2]"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be(argv, message, tmp_path, capsys):
    for i, word in enumerate(argv):
        if word.startswith("TEXT:"):
            argv[i] = str(tmp_path / "config.yaml")
            (tmp_path / "config.yaml").write_text(word[5:])
    assert command(*LEAST, *argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("fs-psm train: ")
    assert message in captured.err
    assert not captured.out


def test_what_must_be_given(capsys):
    for left_out, message in (
        (0, "`--output_dir` must be given"),
        (2, "one of `--train_data_dir` and `--dataset_name` must be given"),
        (4, "`--pretrained_model_name_or_path` or `--preset` must be given"),
    ):
        assert command(*LEAST[:left_out], *LEAST[left_out + 2 :]) == 2
        assert message in capsys.readouterr().err


def test_help(capsys):
    assert command("--help") == 0
    text = capsys.readouterr().out
    for action in make_parser()._actions:
        assert action.option_strings[-1] in text
    assert "n0" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_data_dir": "ROOT/nowhere"}, "`--train_data_dir` must be a folder, got "),
        ({"train_data_dir": "ROOT/empty"}, "`--train_data_dir` ROOT/empty holds no image"),
        ({"validation_data_dir": "ROOT/empty"}, "`--validation_data_dir` ROOT/empty holds no image"),
        ({"pretrained_model_name_or_path": "ROOT/no"}, "`--pretrained_model_name_or_path` must be a model folder or a Hub id, got"),
        ({"pretrained_model_name_or_path": "ROOT/images"}, "Unrecognized model in ROOT/images"),
        ({"processor_name_or_path": "ROOT/images"}, "`--processor_name_or_path` is needed: ROOT/images holds no image processor"),
        ({"feature_layer": 9}, "`feature_layer` must be in [-5, 4] for a tower of 4 layers, got 9"),
        ({"first_token": 17}, "`--first_token` must be less than the tower's 17 tokens, got 17"),
        ({"resolution": 24}, "24*24"),
        ({"purifier_config": '{"colour": 1}'}, "colour"),
        ({"purifier_config": UNET.replace('"in_channels": 3', '"in_channels": 4')}, "in_channels"),
        ({"report_to": "carrier pigeon"}, "`--report_to` must be tensorboard, wandb, all or none, got carrier pigeon"),
        ({"stage": "mapper", "pretrained_psm_name_or_path": "ROOT/wide"}, "has a mapper of tokens of width 48, the tower's"),
        ({"stage": "mapper", "pretrained_psm_name_or_path": "ROOT/pooled"}, "has a mapper of pooled of width 32"),
        ({"stage": "mapper", "mapper_config": '{"hidden_size": 8}'}, "must have hidden_size 32, the tower's, got 8"),
        ({"stage": "mapper", "mapper_config": '{"depth": 8}'}, "depth"),
        ({"pretrained_psm_name_or_path": "ROOT/pooled"}, "has no purifier to train"),
        ({"pretrained_psm_name_or_path": "ROOT/pooled", "purifier_config": "{}"}, "`--purifier_config` must not be given"),
        ({"purifier": "unet", "pretrained_psm_name_or_path": "ROOT/pooled"}, "`--purifier` must be none, the kind of"),
        ({"pretrained_psm_name_or_path": "ROOT/nowhere"}, "nowhere"),
        ({"train_data_weights": [1, 2]}, "`--train_data_weights` must be one number > 0 for each of 1 sets"),
        ({"output_dir": "ROOT/tower/config.json"}, "config.json"),
    ],
)  # fmt: skip
def test_mistakes_that_show_when_things_are_loaded(options, message, root, tmp_path, capsys):
    def placed(value):
        return value.replace("ROOT", str(root)) if isinstance(value, str) else value

    options = {"output": tmp_path / "out", "stage": "purifier"} | {name: placed(v) for name, v in options.items()}
    assert command(*words(root, **options)) == 2
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("fs-psm train: ")
    assert placed(message) in error
    assert not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.parametrize("settings", [{}, {"validation_steps": 1}, {"use_ema": "false", "mixed_precision": "bf16"}])
def test_a_loss_that_is_not_finite_ends_the_run(settings, root, tmp_path, capsys):
    """Exit code 1 and one line; the checkpoints before it stay, and no weights are saved."""
    train(root, tmp_path / "out", max_train_steps=2, checkpointing_steps=1)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    before = {p: p.read_bytes() for p in (tmp_path / "out").glob("checkpoint-*/*")}
    shutil.copytree(root / "images", tmp_path / "images")
    (tmp_path / "tower").symlink_to(root / "tower")
    run = words(tmp_path, "new", learning_rate=1e30, max_train_steps=9, **settings)
    assert command(*run) == 1
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("fs-psm train: the ")
    assert "the last checkpoint is none; start again in another --output_dir with a smaller --learning_rate" in error
    assert len(losses_of(tmp_path / "new")) < 5
    assert not (tmp_path / "new" / "config.json").exists()
    assert {p: p.read_bytes() for p in (tmp_path / "out").glob("checkpoint-*/*")} == before
    # With checkpoints: the last of them is named, and is of finite weights.
    run = words(tmp_path, "kept", learning_rate=1e30, max_train_steps=9, checkpointing_steps=1, **settings)
    assert command(*run) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    checkpoints = sorted(path.name for path in (tmp_path / "kept").glob("checkpoint-*"))
    assert f"the last checkpoint is {checkpoints[-1] if checkpoints else 'none'}" in error
    assert not (tmp_path / "kept" / "config.json").exists()


def test_no_clipping(root, tmp_path):
    """`--max_grad_norm 0` leaves gradients as they are, which is what a very large length does too."""
    for name, length in (("none", 0), ("large", 1e9), ("small", 1e-3)):
        train(root, tmp_path / name, max_grad_norm=length, max_train_steps=3, adam_epsilon=1e-2)
    assert log_of(tmp_path / "none") == log_of(tmp_path / "large")
    assert losses_of(tmp_path / "none")[1:] != losses_of(tmp_path / "small")[1:]


def test_tensorboard_beside_the_log(root, tmp_path):
    """The same numbers in both, read back from the event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(root, tmp_path / "out", report_to="tensorboard", logging_dir="board", tracker_project_name="mine")
    (events,) = (tmp_path / "out" / "board" / "mine").glob("events.out.tfevents*")
    read = EventAccumulator(str(events))
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == [1, 2]
    assert [event.value for event in read.Scalars("loss")] == pytest.approx(losses_of(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])["config"]
    assert (config["sigma"], config["num_samples"], config["stage"]) == (0.1, 2, "purifier")
    assert "hub_token" not in config
    for report_to in (None, "none"):
        train(root, tmp_path / str(report_to), max_train_steps=1, report_to=report_to)
        assert not (tmp_path / str(report_to) / "logs").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_an_error(root, tmp_path, capsys):
    with pytest.raises(ImportError, match="`--report_to` wandb needs a package: pip install wandb"):
        check_report_to("wandb")
    assert check_report_to("all") == ["tensorboard"]
    assert command(*words(root, tmp_path / "out", report_to="wandb")) == 2
    assert capsys.readouterr().err == "fs-psm train: `--report_to` wandb needs a package: pip install wandb\n"


def test_the_rate_of_learning_follows_its_schedule(root, tmp_path):
    train(root, tmp_path / "out", lr_scheduler="linear", lr_warmup_steps=2, max_train_steps=4, learning_rate=0.01)
    assert losses_of(tmp_path / "out", "lr") == pytest.approx([0, 0.005, 0.01, 0.005])


def test_epochs_are_counted_in_images(root, tmp_path):
    """Three epochs of seven images in batches of four: 21 images, six steps."""
    options = {"max_train_steps": None, "num_train_epochs": 3, "num_samples": 1, "lambda_rb": 0}
    trainer = train(root, tmp_path / "out", **options)
    assert (len(trainer.images), trainer.steps) == (7, 6)


def test_both_stages_are_uploaded_once():
    purifier, mapper = parse("--push_to_hub", "--hub_private_repo")
    assert (purifier.push_to_hub, mapper.push_to_hub) == (False, True)
    assert (mapper.hub_model_id, mapper.hub_private_repo) == ("out", True)
    assert parse("--push_to_hub", "--hub_model_id", "me/it")[1].hub_model_id == "me/it"
    assert "secret" not in str(parse("--hub_token", "secret")[0].to_dict())


def test_the_program_trains_from_a_file_and_says_what_is_wrong(root, tmp_path):
    """In processes of their own: both stages with a YAML file, then the same again, which is refused."""
    values = {
        "pretrained_model_name_or_path": str(root / "tower"),
        "train_data_dir": str(root / "images"),
        "max_train_steps": 1,
        "num_samples": 1,
        "weights_dtype": "float16",
        "purifier": {"purifier_config": json.loads(UNET)},
        "mapper": {"num_blocks": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    argv = ["--config", tmp_path / "config.yaml", "--output_dir", tmp_path / "out"]
    process = start(argv)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert "Warning" not in printed, printed
    psm = PSMModel.from_pretrained(tmp_path / "out")
    assert (psm.dtype, len(psm.mapper.blocks)) == (torch.float16, 1)
    process = start(argv)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 2, printed
    assert printed.strip().splitlines()[-1] == (
        f"fs-psm train: `--output_dir` {tmp_path / 'out' / 'purifier'} holds checkpoint-1 of another run: give "
        "--resume_from_checkpoint latest, or another folder"
    )
