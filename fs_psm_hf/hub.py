"""Upload of a model folder in one commit: checked before, all there or nothing, and a card that keeps what humans wrote."""

import contextlib
import logging
import os
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import transformers
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError, StrictDataclassError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from .configuration_fs_psm import PSMConfig, SmoothedVisionTowerConfig
from .loading import StrictLoading, check_token, hub_reason, load_strictly
from .modeling_fs_psm import SmoothedVisionTower
from .modeling_psm import PSMModel


logger = logging.getLogger(__name__)

_OURS = {PSMConfig.model_type: PSMModel, SmoothedVisionTowerConfig.model_type: SmoothedVisionTower}
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_LEFT_OUT = re.compile(
    r"\.(?!eval_results$).*|checkpoint-\d+|__pycache__|.*\.(tmp|part|partial|incomplete|lock|pyc)|.*~"
)
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".msgpack", ".h5"}
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_LARGEST_TEXT = 10 * 2**20


def push_folder(
    folder, repo_id, *, token=None, private=None, revision=None, create_pr=False, commit_message=None
) -> str:
    """Upload a folder to a model repository, in one commit: after a failure the repository is as it was.

    The folder is checked first ([`check_folder`]). The repository, and a branch named `revision`, are made where they do
    not exist. The commit is refused if somebody changed the branch since the upload began. What failed is completed by
    the same call again; large files that arrived are not sent twice.

    The card of the repository keeps what humans wrote: only blocks and metadata that `fs-psm card` generated are replaced
    by those of the folder's README.md. Weights of an earlier upload that the new ones do not overwrite, such as shards, are
    deleted; other files of the repository that the folder lacks stay.

    Args:
        folder (`str` or `Path`), repo_id (`str`): what to upload and where to, as `"owner/name"` or `"name"`.
        token (`str`, *optional*): the one of `hf auth login` or `HF_TOKEN` where not given.
        private (`bool`, *optional*): for a new repository. `True` also refuses one that exists and is public.
        revision (`str`, *optional*): branch, `main` where not given.
        create_pr (`bool`): open a draft pull request with the commit instead; needs no right to write.
        commit_message (`str`, *optional*): first line of the commit's message.

    Returns:
        `str`: address of the commit, or of the pull request.

    Raises:
        ValueError: the folder is not fit to be uploaded, or an argument is out of range.
        OSError: the Hub, or the way to it, failed; the message says why and what to do.
    """
    check_token(token)
    folder = Path(folder)
    files = check_folder(folder, token)
    api = HfApi(library_name="fs_psm_hf")
    with _clear_errors(repo_id):
        repo_id = _open_repo(api, repo_id, token, private, write=not create_pr)
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        info = api.model_info(repo_id, revision=revision, token=token)
        there = {sibling.rfilename for sibling in info.siblings or ()}
        additions = {path: str(folder / path) for path in files}
        if "README.md" in files and "README.md" in there:
            additions["README.md"] = _merged_card(api, folder, repo_id, info.sha, token)
        operations = [CommitOperationAdd(path, content) for path, content in additions.items()]
        if any(_WEIGHTS.fullmatch(path) for path in files):
            outdated = sorted(path for path in there - set(files) if _WEIGHTS.fullmatch(path))
            operations += [CommitOperationDelete(path, is_folder=False) for path in outdated]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Upload {folder.resolve().name} with fs_psm_hf",
            token=token,
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )
    return str(commit.pr_url or commit.commit_url)


def prepare_repo(repo_id, token=None, private=None) -> str:
    """Make a model repository, or see that it is there and may be written, before hours of work depend on it.

    Returns:
        `str`: its full name, `"owner/name"`.

    Raises:
        ValueError: `private=True` for a repository that exists and is public, or a token that is no token.
        OSError: it cannot be made or written; the message says why and what to do.
    """
    check_token(token)
    with _clear_errors(repo_id):
        return _open_repo(HfApi(library_name="fs_psm_hf"), repo_id, token, private, write=True)


def _open_repo(api, repo_id, token, private, write):
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if write:
        # `create_repo` is content with a repository that can be read.
        try:
            api.auth_check(repo_id, token=token, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code != 404:  # a Hub without this question; the commit will tell
                raise
    if private and api.model_info(repo_id, token=token).private is False:
        raise ValueError(
            f"`private` must not be True for `{repo_id}`, which exists and is public: make it private first"
        )
    return repo_id


def _merged_card(api, folder, repo_id, commit, token):
    from .cards import merge_card

    with tempfile.TemporaryDirectory() as cache:
        path = api.hf_hub_download(repo_id, "README.md", revision=commit, token=token, cache_dir=cache)
        old = Path(path).read_text(encoding="utf-8")
    new = (folder / "README.md").read_text(encoding="utf-8")
    merged = merge_card(old, new)
    if merged == old and new != old:
        logger.warning(
            "`README.md` of `%s` stays as it is: only generated parts are replaced, and those of the folder's are the same",
            repo_id,
        )
    return merged.encode()


@contextlib.contextmanager
def _clear_errors(repo_id):
    """One sentence in place of what the Hub's client raises."""
    outer = sys.exception()
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:
        reason = hub_reason(error, outer)
        if reason is None:
            raise
        raise OSError(
            f"`{repo_id}` cannot be written on the Hub: {reason} (it changes in one commit or not at all)"
        ) from error


# What may be uploaded ---------------------------------------------------------------------------------------------------


def check_folder(folder, token=None):
    """The files of a folder that belong into its repository, as relative paths with `/`.

    Hidden files, `checkpoint-…` folders and unfinished files (`.tmp`, `.part`, `.incomplete`, …) are left out.

    Args:
        folder (`str` or `Path`): a model folder, with a config.json and its weights, or a folder of results, with a card.
        token (`str`, *optional*): must not occur in any file.

    Raises:
        ValueError: the model does not load strictly, files are missing or damaged, could run code when read, lie outside
            of the folder, or hold a token; or the card's metadata is no YAML.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be a folder, got {folder}")
    files = list(_files(folder.resolve(), folder.resolve()))
    for path in files:
        _check_file(folder, path, token or get_token())
    weights = [path for path in files if _WEIGHTS.fullmatch(path)]
    if "config.json" in files:
        _check_model(folder, weights)
    elif weights or "README.md" not in files:
        raise ValueError(
            f"`folder` must hold config.json and its weights, or results with a README.md, got {folder} without "
            f"{'config.json' if weights else 'either'}"
        )
    if "README.md" in files:
        _check_card(folder)
    return files


def _files(folder, root):
    for path in sorted(folder.iterdir()):
        if _LEFT_OUT.fullmatch(path.name):
            continue
        name = path.relative_to(root).as_posix()
        if path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(root)):
            raise ValueError(f"`{name}` must lie in the folder itself, got a link to {path.resolve()}")
        if path.is_dir():
            yield from _files(path, root)
        else:
            yield name


def _check_file(folder, name, token):
    path = folder / name
    with open(path, "rb") as stream:
        start = stream.read(16)
        if path.suffix.lower() in _PICKLES or re.match(rb"\x80[\x02-\x05]", start) or _is_torch_archive(path):
            raise ValueError(
                f"`{name}` must not be uploaded: only safetensors, text and pictures are, never files that may run code"
            )
        size = os.fstat(stream.fileno()).st_size
        if path.suffix != ".safetensors" and size <= _LARGEST_TEXT:
            content = start + stream.read()
            if _TOKEN.search(content) or (token and token.encode() in content):
                raise ValueError(
                    f"`{name}` must not hold a token of the Hub: take it out, and make the token invalid if others saw it"
                )
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as stored:  # opening checks the header against the file's size
                stored.keys()
        except SafetensorError as error:
            raise ValueError(f"`{name}` is a damaged safetensors file: {error}") from error


def _is_torch_archive(path):
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith((".pkl", ".npy")) for name in archive.namelist())


def _check_card(folder):
    try:
        block = REGEX_YAML_BLOCK.search((folder / "README.md").read_text(encoding="utf-8"))
        data = yaml.safe_load(block[2]) if block else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`README.md` of {folder} must begin with valid YAML between two `---`: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"`README.md` of {folder} must begin with names and values between two `---`, got {data!r}")


def _check_model(folder, weights):
    """Load the model without its numbers: names and shapes must be those of its class."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ValueError(
            f"`config.json` of {folder} must describe a model of transformers or of this package: {error}"
        ) from error
    name = (config.architectures or ["nothing"])[0]
    model_class = _OURS.get(config.model_type) or getattr(transformers, name, None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise ValueError(f"`architectures` of config.json must name a model class of transformers, got {name!r}")
    if not weights:
        raise ValueError(f"`folder` must hold model.safetensors beside config.json, got {folder} without")
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # what it would report is refused in a sentence
    try:
        if issubclass(model_class, StrictLoading):
            model_class.from_pretrained(folder, device_map="meta")
        else:
            load_strictly(model_class.from_pretrained, model_class, folder, device_map="meta")
    except FileNotFoundError as error:
        raise ValueError(
            f"`model.safetensors.index.json` of {folder} names a file that is not there: {error}"
        ) from error
    finally:
        hf_logging.set_verbosity(verbosity)
