"""Push and load over real HTTP, with the real client of the Hub."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from stand_in_hub import READER, WRITER, StandInHub
from tiny_models import MEAN, STD, images, llava, llava_inputs, psm_model, smoothed_tower
from transformers import AutoModel, AutoProcessor, CLIPImageProcessorPil, LlavaForConditionalGeneration, pipeline
from typer.testing import CliRunner

from fs_psm_hf import PSMConfig, PSMModel, SmoothedVisionTower, SmoothedVisionTowerConfig, attach
from fs_psm_hf.cli import app
from fs_psm_hf.hub import prepare_repo, push_folder


MODELS = Path(__file__).parents[1] / "model_cards"
CARD = "---\nlicense: mit\n---\n\n# Mine\n\nWritten by a human.\n"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with StandInHub() as hub:
        hub.connect(monkeypatch, tmp_path)
        yield hub


def smoothed_llava():
    host = llava()
    attach(host, psm_model(), sigma=0.2, num_samples=2, image_mean=MEAN, image_std=STD)
    return host


KINDS = {
    "psm": (psm_model, PSMModel),
    "tower": (lambda: smoothed_tower(psm=psm_model(), num_samples=2), SmoothedVisionTower),
    "host": (smoothed_llava, LlavaForConditionalGeneration),
}


@pytest.fixture(params=KINDS)
def kind(request):
    """A model, its class, and another model of the same shapes."""
    make, cls = KINDS[request.param]
    other = make()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    return make(), cls, other


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def count(hub, pattern):
    return sum(pattern in request for request in hub.requests)


# push_to_hub and from_pretrained ----------------------------------------------------------------------------------------


def test_a_private_model_comes_back_exactly(hub, kind):
    model, cls, _ = kind
    model.push_to_hub("user/model", private=True, token=WRITER)
    assert count(hub, "/commit/") == 1
    assert hub.repos["user/model"].private
    assert same_weights(cls.from_pretrained("user/model", token=WRITER), model)


def test_a_second_push_keeps_what_a_human_wrote(hub, kind):
    model, cls, other = kind
    model.push_to_hub("user/model", token=WRITER)
    hub.write("user/model", hub.files("user/model") | {"README.md": CARD.encode()})
    other.push_to_hub("user/model", token=WRITER)
    assert "Written by a human." in hub.files("user/model")["README.md"].decode()
    assert "license: mit" in hub.files("user/model")["README.md"].decode()
    assert same_weights(cls.from_pretrained("user/model"), other)


def test_a_revision_is_a_commit_a_branch_or_a_tag(hub, kind):
    model, cls, other = kind
    model.push_to_hub("user/model", token=WRITER)
    old = hub.head("user/model")
    hub.repos["user/model"].refs["v1"] = old
    other.push_to_hub("user/model", token=WRITER)
    model.push_to_hub("user/model", token=WRITER, revision="branch")
    for revision, expected in ((old, model), ("v1", model), ("branch", model), ("main", other), (None, other)):
        assert same_weights(cls.from_pretrained("user/model", revision=revision), expected), revision


def test_a_subfolder(hub, kind, tmp_path):
    model, cls, _ = kind
    model.save_pretrained(tmp_path / "saved")
    files = {f"deep/inside/{path.name}": path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    hub.write("user/model", files)
    assert same_weights(cls.from_pretrained("user/model", subfolder="deep/inside"), model)


def test_a_cache_folder_serves_without_the_hub(hub, kind, tmp_path):
    model, cls, _ = kind
    model.push_to_hub("user/model", token=WRITER)
    cls.from_pretrained("user/model", cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine" / "models--user--model").is_dir()
    assert not (tmp_path / "cache" / "models--user--model" / "blobs").exists()
    hub.requests.clear()
    loaded = cls.from_pretrained("user/model", cache_dir=tmp_path / "mine", local_files_only=True)
    assert same_weights(loaded, model)
    assert not hub.requests
    with pytest.raises(OSError, match=r"local_files_only|couldn't find them in the cached files"):
        cls.from_pretrained("user/model", cache_dir=tmp_path / "empty", local_files_only=True)
    assert not hub.requests


def test_dtype_and_device_map(hub, kind):
    model, cls, _ = kind
    model.push_to_hub("user/model", token=WRITER)
    model.to(torch.bfloat16)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        loaded = cls.from_pretrained("user/model", dtype=torch.bfloat16, device_map=device_map)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert same_weights(loaded.cpu(), model)


def test_shards(hub):
    psm_model().push_to_hub("user/psm", token=WRITER, max_shard_size="40KB")
    assert "model.safetensors.index.json" in hub.files("user/psm")
    assert same_weights(PSMModel.from_pretrained("user/psm"), psm_model())


def test_a_host_runs_as_before(hub):
    host = smoothed_llava()
    host.push_to_hub("user/model", token=WRITER)
    loaded = LlavaForConditionalGeneration.from_pretrained("user/model")
    assert type(loaded.model.vision_tower) is SmoothedVisionTower
    assert loaded.model.vision_tower.config.num_samples == 2
    assert loaded.generate(**llava_inputs(), max_new_tokens=2, do_sample=False).shape[1] <= 22


def test_a_psm_alone_is_small_and_remembers_its_base(hub):
    psm = psm_model()
    psm.config.base_model_name_or_path, psm.config.base_model_revision = "user/clip", "0123abc"
    psm.push_to_hub("user/psm", token=WRITER)
    weights = sum(value.nbytes for value in psm.state_dict().values())
    assert sum(map(len, hub.files("user/psm").values())) < weights + 40_000
    for cls in (PSMModel, AutoModel):
        config = cls.from_pretrained("user/psm").config
        assert (config.base_model_name_or_path, config.base_model_revision) == ("user/clip", "0123abc")
    # A tower that is made with it does not copy the wrapped model's name.
    tower = smoothed_tower(psm=PSMModel.from_pretrained("user/psm"))
    tower.push_to_hub("user/tower", token=WRITER)
    assert AutoModel.from_pretrained("user/tower").config.psm_config.base_model_name_or_path == "user/clip"


# Pipelines and remote code ----------------------------------------------------------------------------------------------


def test_feature_extraction_pipeline(hub):
    tower = smoothed_tower(psm=psm_model(), sigma=0, num_samples=1)
    tower.push_to_hub("user/tower", token=WRITER)
    size = {"height": 16, "width": 16}
    processor = CLIPImageProcessorPil(image_mean=MEAN, image_std=STD, size=size, crop_size=size)
    processor.push_to_hub("user/tower", token=WRITER)
    image = Image.fromarray(data.chelsea()[:, 120:420])
    features = pipeline("image-feature-extraction", model="user/tower")(image)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.tensor(features), tower(pixels).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_image_to_text_pipeline(hub):
    name = MODELS / "tiny-llava-cifar10"
    host, processor = LlavaForConditionalGeneration.from_pretrained(name), AutoProcessor.from_pretrained(name)
    attach(host, PSMModel.from_pretrained(MODELS / "fs-psm-tiny-clip-cifar10"), num_samples=2, processor=processor)
    host.push_to_hub("user/llava", token=WRITER)
    processor.push_to_hub("user/llava", token=WRITER)
    talk = pipeline("image-text-to-text", model="user/llava")
    assert type(talk.model.model.vision_tower) is SmoothedVisionTower
    prompt = "USER: <image>\ndescribe this image in one sentence. ASSISTANT:"
    image = Image.fromarray(data.chelsea()[:, 120:420])
    (answer,) = talk(images=image, text=prompt, generate_kwargs={"do_sample": False, "max_new_tokens": 12})
    assert answer["generated_text"].split("ASSISTANT:")[1].split()


REMOTE = """
import sys, torch
sys.modules["fs_psm_hf"] = None  # not installed
from transformers import AutoModel
try:
    AutoModel.from_pretrained("user/tower", trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("code ran without consent")
tower = AutoModel.from_pretrained("user/tower", trust_remote_code=True, revision="v1")
psm = AutoModel.from_pretrained("user/psm", trust_remote_code=True)
pixels = torch.load(sys.argv[1], weights_only=True)
with torch.no_grad():
    torch.save([tower(pixels, generator=3).last_hidden_state, psm(pixels, 0.1)], sys.argv[2])
"""


def test_remote_code_from_the_hub_runs_without_the_package(hub, tmp_path):
    psm = psm_model()
    tower = smoothed_tower(psm=psm, num_samples=2)
    PSMConfig.register_for_auto_class()
    PSMModel.register_for_auto_class("AutoModel")
    SmoothedVisionTowerConfig.register_for_auto_class()
    SmoothedVisionTower.register_for_auto_class("AutoModel")
    try:
        psm.save_pretrained(tmp_path / "psm")
        tower.save_pretrained(tmp_path / "tower")
    finally:
        for cls in (PSMConfig, PSMModel, SmoothedVisionTowerConfig, SmoothedVisionTower):
            cls._auto_class = None
    push_folder(tmp_path / "psm", "user/psm", token=WRITER)
    push_folder(tmp_path / "tower", "user/tower", token=WRITER)
    hub.repos["user/tower"].refs["v1"] = hub.head("user/tower")
    torch.save(images(), tmp_path / "pixels.pt")
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "pixels.pt"), str(tmp_path / "out.pt")]
    result = subprocess.run(
        command, env=hub.environment(tmp_path / "home"), cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    features, purified = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(features, tower(images(), generator=3).last_hidden_state, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(purified, psm(images(), 0.1), rtol=1e-5, atol=1e-6)


# push_folder ------------------------------------------------------------------------------------------------------------


def test_a_folder_arrives_in_one_commit(hub, tmp_path):
    folder = shutil.copytree(MODELS / "fs-psm-tiny-clip-cifar10", tmp_path / "psm")
    for left_out in (".hidden", "model.safetensors.tmp", "checkpoint-10/state.safetensors"):
        (folder / left_out).parent.mkdir(exist_ok=True)
        (folder / left_out).write_text("not for the Hub")
    url = push_folder(folder, "psm", token=WRITER, commit_message="First")
    assert url == f"{hub.url}/user/psm/commit/{hub.head('user/psm')}"
    assert len(hub.repos["user/psm"].commits) == 2  # the first one is that of the new repository
    assert hub.repos["user/psm"].commits[hub.head("user/psm")].message == "First"
    source = MODELS / "fs-psm-tiny-clip-cifar10"
    expected = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    found = hub.files("user/psm")
    assert found == expected | {".gitattributes": found[".gitattributes"]}
    assert same_weights(PSMModel.from_pretrained("user/psm"), PSMModel.from_pretrained(folder))
    assert push_folder(folder, "user/psm", token=WRITER) == url  # nothing to do


def test_results_without_a_model_are_a_folder_too(hub):
    push_folder(MODELS / "dinov2-small-fs", "user/scores", token=WRITER)
    assert len(hub.files("user/scores")) == 1 + sum(path.is_file() for path in (MODELS / "dinov2-small-fs").rglob("*"))


def test_the_card_keeps_a_humans_text_and_gets_the_new_numbers(hub, tmp_path):
    def card(title, number):
        return f"# {title}\n\n<!-- fs-psm:scores -->\n{number}\n<!-- /fs-psm:scores -->\n\nAfter.\n"

    psm_model().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(card("Ours", 1))
    push_folder(tmp_path, "user/psm", token=WRITER)
    theirs = card("Edited on the Hub", 1).replace("After.", "After, by hand.")
    hub.write("user/psm", hub.files("user/psm") | {"README.md": theirs.encode(), "notes.txt": b"of somebody"})
    (tmp_path / "README.md").write_text(card("Ours", 2))
    push_folder(tmp_path, "user/psm", token=WRITER)
    text = hub.files("user/psm")["README.md"].decode()
    assert "# Edited on the Hub" in text
    assert "After, by hand." in text
    assert "\n2\n" in text
    assert "\n1\n" not in text
    assert hub.files("user/psm")["notes.txt"] == b"of somebody"


def test_a_card_without_generated_parts_stays_and_says_so(hub, tmp_path, caplog):
    psm_model().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("Ours.\n")
    hub.write("user/psm", {"README.md": CARD.encode()})
    push_folder(tmp_path, "user/psm", token=WRITER)
    assert hub.files("user/psm")["README.md"] == CARD.encode()
    assert "`README.md` of `user/psm` stays as it is" in caplog.text


def test_weights_of_an_earlier_upload_do_not_stay(hub, tmp_path):
    psm_model().save_pretrained(tmp_path / "many", max_shard_size="40KB")
    psm_model(seed=5).save_pretrained(tmp_path / "one")
    push_folder(tmp_path / "many", "user/psm", token=WRITER)
    hub.write("user/psm", hub.files("user/psm") | {"other.safetensors": b"of somebody"})
    push_folder(tmp_path / "one", "user/psm", token=WRITER)
    assert set(hub.files("user/psm")) == {".gitattributes", "config.json", "model.safetensors", "other.safetensors"}
    assert same_weights(PSMModel.from_pretrained("user/psm"), psm_model(seed=5))


def test_a_branch_and_a_draft_leave_main_alone(hub, tmp_path):
    psm_model().save_pretrained(tmp_path)
    before = hub.write("user/psm", {"README.md": CARD.encode()})
    push_folder(tmp_path, "user/psm", token=WRITER, revision="trial")
    assert "model.safetensors" in hub.files("user/psm", "trial")
    url = push_folder(tmp_path, "user/psm", token=READER, create_pr=True)
    assert url == f"{hub.url}/user/psm/discussions/1"
    assert same_weights(PSMModel.from_pretrained("user/psm", revision="refs/pr/1"), psm_model())
    assert hub.head("user/psm") == before


def test_private_means_private(hub, tmp_path):
    psm_model().save_pretrained(tmp_path)
    push_folder(tmp_path, "user/psm", token=WRITER, private=True)
    assert hub.repos["user/psm"].private
    before = hub.write("user/public", {})
    for attempt in (
        lambda: push_folder(tmp_path, "user/public", token=WRITER, private=True),
        lambda: prepare_repo("user/public", WRITER, True),
    ):
        with pytest.raises(
            ValueError, match="`private` must not be True for `user/public`, which exists and is public"
        ):
            attempt()
    assert hub.head("user/public") == before


def test_prepare_repo_finds_what_would_fail_later(hub):
    assert prepare_repo("new", WRITER, private=True) == "user/new"
    assert prepare_repo("user/new", WRITER) == "user/new"
    with pytest.raises(
        OSError, match=r"`user/new` cannot be written on the Hub: this is forbidden to the token \(403\)"
    ):
        prepare_repo("user/new", READER)


def test_the_command(hub, tmp_path):
    psm_model().save_pretrained(tmp_path / "psm")
    arguments = ["push", str(tmp_path / "psm"), "user/psm", "--token", WRITER, "--private"]
    result = CliRunner().invoke(app, arguments)
    assert result.output.splitlines()[-1] == f"{hub.url}/user/psm/commit/{hub.head('user/psm')}"
    assert hub.repos["user/psm"].private


# What is refused before a request is made -------------------------------------------------------------------------------


def break_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mapper_config": None}))


BROKEN = {
    "no model": (lambda folder: (folder / "config.json").unlink(), "must hold config.json and its weights"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "must hold model.safetensors beside"),
    "other weights": (break_config, "does not fit PSMModel: .* unexpected keys"),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "`model.safetensors` is a damaged safetensors file",
    ),
    "a shard is gone": (lambda folder: min(folder.glob("model-00002-*")).unlink(), "names a file that is not"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "`config.json` of .* must describe a model"),
    "unknown": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "nobody-knows"}'),
        "`config.json` of .* must describe a model",
    ),
    "half a card": (lambda folder: (folder / "README.md").write_text("---\nmit\n---\n"), "names and values between two"),
    "bad card": (lambda folder: (folder / "README.md").write_text("---\n- a\n: b\n---\n"), "`README.md` of .* valid YAML"),
    "a link out": (lambda folder: (folder / "x.json").symlink_to("/etc/hostname"), "`x.json` must lie in the folder itself"),
    "a pickle": (lambda folder: torch.save({"a": torch.ones(2)}, folder / "x.json"), "`x.json` must not be uploaded"),
    "a pickle by name": (lambda folder: (folder / "x.bin").write_text(""), "`x.bin` must not be uploaded"),
    "a token": (lambda folder: (folder / "x.json").write_text(WRITER), "`x.json` must not hold a token"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_is_not_fit_is_not_sent(hub, tmp_path, case):
    change, words = BROKEN[case]
    psm_model().save_pretrained(tmp_path, max_shard_size="40KB" if "shard" in case else "1GB")
    save_file({"a": torch.ones(2)}, tmp_path / "extra.safetensors")
    change(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        push_folder(tmp_path, "user/psm", token=WRITER)
    assert WRITER not in str(error.value)
    assert not hub.requests
