"""The Hub, or the way to it, fails: one clear sentence, nothing half done, and the same call works afterwards."""

import pytest
import torch
from stand_in_hub import OTHER, READER, WRITER, StandInHub, oid_of
from tiny_models import MEAN, STD, llava, psm_model
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from fs_psm_hf import PSMModel, attach
from fs_psm_hf.cli import app
from fs_psm_hf.hub import prepare_repo, push_folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with StandInHub() as hub:
        hub.connect(monkeypatch, tmp_path)
        yield hub


@pytest.fixture
def psm(hub, tmp_path):
    """A PSM, in `saved` and as `user/psm`."""
    model = psm_model()
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("# Ours\n")
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    hub.write("user/psm", files)
    hub.write("user/secret", files, private=True)
    return model


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def one_sentence(error, name, words):
    text = str(error.value)
    assert text.startswith(f"`{name}` ")
    assert words in text
    assert "\n" not in text
    assert "http" not in text.replace("HTTP", "")
    assert not any(token in text for token in (WRITER, READER, OTHER))


# Loading ----------------------------------------------------------------------------------------------------------------

CONFIG, WEIGHTS = r"/config\.json$", r"/model\.safetensors$"
FAULTS = {
    "403 config": (rf"HEAD .*{CONFIG}", {"status": 403}, "forbidden to the token (403)"),
    "403 weights": (rf"HEAD .*{WEIGHTS}", {"status": 403}, "forbidden to the token (403)"),
    "403 storage": (r"GET /lfs/", {"status": 403}, "forbidden to the token (403)"),
    "429 config": (rf"HEAD .*{CONFIG}", {"status": 429}, "too many requests were made (429): try again later"),
    "429 weights": (rf"HEAD .*{WEIGHTS}", {"status": 429}, "too many requests"),
    "429 with a time": (
        r"GET /lfs/",
        {"status": 429, "headers": {"Retry-After": "7"}},
        "too many requests were made (429): try again in 7 seconds",
    ),
    "500 config": (rf"GET .*{CONFIG}", {"status": 500}, "the Hub has a fault (500)"),
    "503 weights": (rf"HEAD .*{WEIGHTS}", {"status": 503}, "the Hub has a fault (503)"),
    "500 storage": (r"GET /lfs/", {"status": 500}, "the Hub has a fault (500)"),
    "cut at the config": (rf"GET .*{CONFIG}", {"kind": "cut"}, "the connection to the Hub failed"),
    "cut before the weights": (rf"HEAD .*{WEIGHTS}", {"kind": "cut"}, "the connection to the Hub failed"),
    "cut at the weights": (r"GET /lfs/", {"kind": "cut"}, "the connection to the Hub failed"),
    "half a config": (rf"GET .*{CONFIG}", {"kind": "truncate"}, "the connection to the Hub failed"),
    "half the weights": (r"GET /lfs/", {"kind": "truncate"}, "the connection to the Hub failed"),
    "another config": (rf"GET .*{CONFIG}", {"kind": "garble"}, "a transfer failed, and what came of it was removed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_loading(hub, psm, fault):
    pattern, options, words = FAULTS[fault]
    hub.fault(pattern, **options)
    with pytest.raises(OSError, match="cannot be loaded from the Hub") as error:
        PSMModel.from_pretrained("user/psm")
    one_sentence(error, "user/psm", words)
    hub.faults.clear()
    assert same_weights(PSMModel.from_pretrained("user/psm"), psm)


def test_weights_that_were_damaged_on_the_way_do_not_stay_in_the_cache(hub, psm):
    hub.fault(r"GET /lfs/", "garble")
    with pytest.raises(ValueError, match="its transfer failed, and it was removed from the cache: load it again"):
        PSMModel.from_pretrained("user/psm")
    hub.faults.clear()
    assert same_weights(PSMModel.from_pretrained("user/psm"), psm)


def test_weights_that_are_damaged_in_the_repository(hub, psm):
    hub.write(
        "user/psm", hub.files("user/psm") | {"model.safetensors": hub.files("user/psm")["model.safetensors"][:-50]}
    )
    for _ in range(2):
        with pytest.raises(ValueError, match="holds a damaged safetensors file.*it is so in the repository"):
            PSMModel.from_pretrained("user/psm")
    good = hub.repos["user/psm"].commits[hub.head("user/psm")].parent
    assert same_weights(PSMModel.from_pretrained("user/psm", revision=good), psm)


@pytest.mark.parametrize(("kind", "waits"), [("cut", [1]), ("truncate", [1]), ("status", [8.0])])
def test_what_passes_is_waited_for(hub, psm, kind, waits):
    hub.fault(
        r"GET /lfs/", kind, times=1, **({"status": 429, "headers": {"Retry-After": "7"}} if kind == "status" else {})
    )
    assert same_weights(PSMModel.from_pretrained("user/psm"), psm)
    assert hub.waits == waits


@pytest.mark.parametrize(
    ("repo", "options", "words"),
    [
        ("user/none", {}, "there is no such model repository, or it is private (401)"),
        ("user/none", {"token": WRITER}, "there is no such model repository, or it is private (404)"),
        ("user/secret", {}, "there is no such model repository, or it is private (401)"),
        ("user/secret", {"token": OTHER}, "there is no such model repository, or it is private (404)"),
        ("user/secret", {"token": "hf_nobody"}, "the token is not valid (401): log in with `hf auth login`"),
        ("user/psm", {"revision": "v9"}, "it has no such revision (404)"),
        ("user/psm", {"subfolder": "nowhere"}, "there are no weights in 'nowhere'"),
        ("user/psm", {"local_files_only": True}, "it is not in the cache, and the Hub may not be asked"),
    ],
)
def test_what_is_not_there_or_not_allowed(hub, psm, repo, options, words):
    with pytest.raises(OSError, match="cannot be loaded from the Hub") as error:
        PSMModel.from_pretrained(repo, **options)
    one_sentence(error, repo, words)
    assert same_weights(PSMModel.from_pretrained("user/secret", token=READER), psm)


def test_an_earlier_failure_is_not_blamed(hub, psm):
    """Loaded from somewhere else after a failure, as in `except OSError:`."""
    hub.write("user/no-json", {"config.json": b"{"})
    try:
        PSMModel.from_pretrained("user/psm", token="hf_nobody")
    except OSError:
        with pytest.raises(OSError, match="not a valid JSON file"):
            PSMModel.from_pretrained("user/no-json")
        with pytest.raises(ValueError, match="`folder` must be a folder"):
            push_folder("nowhere", "user/psm", token=WRITER)


def test_no_connection_at_all(hub, psm, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{filename}"
    )
    with pytest.raises(OSError, match="cannot be loaded from the Hub") as error:
        PSMModel.from_pretrained("user/psm")
    one_sentence(error, "user/psm", "the connection to the Hub failed")


@pytest.mark.parametrize("kind", ["cut", "truncate", "status"])
def test_a_host_after_a_fault(hub, kind):
    host = llava()
    attach(host, psm_model(), image_mean=MEAN, image_std=STD)
    host.push_to_hub("user/llava", token=WRITER)
    hub.fault(r"GET /lfs/", kind)
    with pytest.raises(OSError):  # noqa: PT011 (transformers' own)
        LlavaForConditionalGeneration.from_pretrained("user/llava")
    hub.faults.clear()
    assert same_weights(LlavaForConditionalGeneration.from_pretrained("user/llava"), host)


# Uploading --------------------------------------------------------------------------------------------------------------


def requests_of_a_push(hub, folder):
    """How many requests a push of `folder` to a repository that exists makes."""
    hub.write("user/trial", {"README.md": b"# Theirs\n"})
    hub.requests.clear()
    push_folder(folder, "user/trial", token=WRITER)
    hub.large.clear()
    return len(hub.requests)


@pytest.mark.parametrize("kind", ["status", "cut"])
def test_a_failure_at_any_request_changes_nothing_and_a_rerun_completes(hub, psm, tmp_path, kind):
    folder = tmp_path / "saved"
    total = requests_of_a_push(hub, folder)
    assert total > 10
    for last in range(total):
        repo = f"user/psm{last}"
        before = hub.write(repo, {"README.md": b"# Theirs\n", "notes.txt": b"of somebody"})
        hub.fault("", kind, skip=last)
        with pytest.raises(OSError, match="cannot be written on the Hub") as error:
            push_folder(folder, repo, token=WRITER)
        one_sentence(
            error, repo, "the Hub has a fault (500)" if kind == "status" else "the connection to the Hub failed"
        )
        assert hub.head(repo) == before
        hub.faults.clear()
        push_folder(folder, repo, token=WRITER)
        assert hub.repos[repo].commits[hub.head(repo)].parent == before
        weights = (folder / "model.safetensors").read_bytes()
        assert hub.files(repo)["model.safetensors"] == weights
        assert hub.files(repo)["README.md"] == b"# Theirs\n"
        hub.large.clear()


def test_an_answer_that_got_lost(hub, psm, tmp_path):
    hub.fault("/commit/", "lost", times=1)
    with pytest.raises(OSError, match="the connection to the Hub failed"):
        push_folder(tmp_path / "saved", "user/new", token=WRITER)
    done = hub.head("user/new")
    assert push_folder(tmp_path / "saved", "user/new", token=WRITER) == f"{hub.url}/user/new/commit/{done}"
    assert hub.head("user/new") == done


def test_a_passing_fault_does_not_stop_an_upload(hub, psm, tmp_path):
    for pattern in ("/preupload/", "/objects/batch", "PUT /lfs/", "/objects/verify"):
        hub.fault(pattern, status=503, times=1)
    push_folder(tmp_path / "saved", "user/new", token=WRITER)
    assert hub.waits == [1, 1, 1, 1]
    assert oid_of(hub.files("user/new")["model.safetensors"], True) in hub.large


def test_somebody_else_was_faster(hub, psm, tmp_path):
    theirs = {"README.md": b"# Meanwhile\n"}
    hub.write("user/race", {"README.md": b"# Theirs\n"})
    hub.fault("/preupload/", "act", action=lambda: hub.write("user/race", theirs), times=1)
    with pytest.raises(OSError, match="somebody changed it meanwhile") as error:
        push_folder(tmp_path / "saved", "user/race", token=WRITER)
    one_sentence(error, "user/race", "look at the change, then run this again")
    assert hub.files("user/race") == theirs
    push_folder(tmp_path / "saved", "user/race", token=WRITER)
    assert hub.files("user/race")["README.md"] == b"# Meanwhile\n"


@pytest.mark.parametrize(
    ("repo", "token", "words"),
    [
        ("user/psm", None, "401"),
        ("user/psm", "hf_nobody", "the token is not valid (401)"),
        ("user/psm", READER, "this is forbidden to the token (403)"),
        ("user/psm", OTHER, "this is forbidden to the token (403)"),
        ("user/secret", OTHER, "this is forbidden to the token (403)"),
        ("nobody/psm", WRITER, "this is forbidden to the token (403)"),
    ],
)
def test_a_token_that_may_not_write(hub, psm, tmp_path, repo, token, words):
    before = dict(hub.repos)
    for attempt in (lambda: push_folder(tmp_path / "saved", repo, token=token), lambda: prepare_repo(repo, token)):
        with pytest.raises(OSError, match="cannot be written on the Hub") as error:
            attempt()
        one_sentence(error, repo, words)
    assert hub.repos == before
    assert not any("/preupload/" in request for request in hub.requests)  # before anything is sent


def test_a_busy_hub_says_when_to_come_back(hub, psm, tmp_path):
    hub.fault("/commit/", status=429, headers={"Retry-After": "30"})
    with pytest.raises(OSError, match="cannot be written on the Hub") as error:
        push_folder(tmp_path / "saved", "user/new", token=WRITER)
    one_sentence(error, "user/new", "too many requests were made (429): try again in 30 seconds")


def test_another_refusal_is_told_without_what_must_not_be_told(hub, psm, tmp_path):
    hub.fault("/commit/", status=400, headers={"message": f"quota\tof {WRITER} exceeded"})
    with pytest.raises(OSError, match="cannot be written on the Hub") as error:
        push_folder(tmp_path / "saved", "user/new", token=WRITER)
    one_sentence(error, "user/new", "the Hub refused (400): quota of <token> exceeded")


def test_a_card_that_the_hub_refuses(hub, psm, tmp_path):
    (tmp_path / "saved" / "README.md").write_text("---\nlicense: [mit]\n---\n")
    with pytest.raises(ValueError, match='"license" must be a string'):
        push_folder(tmp_path / "saved", "user/new", token=WRITER)
    assert set(hub.files("user/new")) == {".gitattributes"}
    assert not any("/preupload/" in request for request in hub.requests)


def test_a_revision_that_is_no_branch(hub, psm, tmp_path):
    with pytest.raises(OSError, match="it has no such revision"):
        push_folder(tmp_path / "saved", "user/psm", token=WRITER, revision="refs/pr/9")


def test_the_command_says_it_in_one_line(hub, psm, tmp_path):
    result = CliRunner().invoke(app, ["push", str(tmp_path / "saved"), "user/psm", "--token", READER])
    assert isinstance(result.exception, OSError)  # which `main` prints, with exit code 2
    assert "forbidden to the token (403)" in str(result.exception)
    assert READER not in result.output + str(result.exception)
