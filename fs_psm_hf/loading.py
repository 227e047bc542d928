"""Loading that refuses what does not fit, and says in one sentence why a repository of the Hub could not be read."""

import hashlib
import json
import os
import pickle
import re
import sys
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig


HUB_OPTIONS = ("revision", "subfolder", "token", "cache_dir", "local_files_only")
_NO_TOKEN = "log in with `hf auth login`, or pass a `token` that is allowed to do this"


def check_token(token):
    """Raise `ValueError`, which does not show it, unless a token can stand in the header of a request."""
    if isinstance(token, str) and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ValueError(
            "`token` must be one word of printable ASCII characters, got one with others, perhaps a line break"
        )


def hub_reason(error, outer=None):
    """Why the Hub, or the way to it, failed: half a sentence without address or token; `None` for another error.

    Args:
        error (`BaseException`): as the libraries raised it; what caused it counts.
        outer (`BaseException`, *optional*): what the caller was dealing with before, which did not.
    """
    chain = []
    while error is not None and error is not outer and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for error in chain:
        if isinstance(error, HfHubHTTPError):
            return _answer(error)
        if isinstance(error, OfflineModeIsEnabled):
            return "it is not in the cache, and the Hub may not be asked (`local_files_only=True` or HF_HUB_OFFLINE=1)"
        if isinstance(error, HTTPError):
            return f"the connection to the Hub failed ({type(error).__name__}): try again"
        if isinstance(error, OSError) and "Consistency check failed" in str(error):
            return "a download ended too early: try again"
    if any(isinstance(error, LocalEntryNotFoundError) for error in chain):
        return "it is not in the cache, and the Hub may not be asked (`local_files_only=True` or HF_HUB_OFFLINE=1)"
    return None


def _answer(error):
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"its owner lets in only whom he chose ({status}): ask for access on its page, or {_NO_TOKEN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such model repository, or it is private ({status}): check the name, or {_NO_TOKEN}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no such revision ({status}): name a branch, a tag or a commit of it"
    if isinstance(error, EntryNotFoundError):
        return f"it lacks a file ({status})"
    if status == 401:
        return f"the token is not valid ({status}): {_NO_TOKEN}"
    if status == 403:
        return f"this is forbidden to the token ({status}): {_NO_TOKEN}"
    if status in (409, 412):
        return f"somebody changed it meanwhile ({status}): look at the change, then run this again"
    if status == 429:
        wait = error.response.headers.get("Retry-After", "")
        return (
            f"too many requests were made ({status}): try again {f'in {wait} seconds' if wait.isdigit() else 'later'}"
        )
    if status >= 500:
        return f"the Hub has a fault ({status}): try again later"
    said = re.sub(r"hf_\w+", "<token>", " ".join((error.server_message or "no reason given").split()))
    return f"the Hub refused ({status}): {said}"


def load_strictly(loader, cls, name, *args, leftover=(), **kwargs):
    """Load a checkpoint with `loader`, a `from_pretrained` of transformers, and refuse one that does not fit.

    Args:
        loader (`Callable`): the `from_pretrained`.
        cls (`type`), name (`str`): the class for the message, and what to load.
        leftover (`tuple[str, ...]`): beginnings of keys that may be left over.

    Returns:
        `tuple[PreTrainedModel, dict]`: the model and transformers' loading info.

    Raises:
        ValueError: weights are missing, left over or of another shape, a weight file is damaged, would run code, or lies
            outside of the folder.
    """
    _check_index(name, kwargs.get("subfolder") or "")
    try:
        # Mismatched sizes are refused below, with the names.
        model, info = loader(name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except SafetensorError as error:
        fate = "it is so in the repository" if _on_hub(name) else "download it again"
        if _forget_damaged(name, kwargs):
            fate = "its transfer failed, and it was removed from the cache: load it again"
        raise ValueError(f"`{name}` holds a damaged safetensors file: {error}; {fate}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`{name}` holds weights that would run code when they are read: only safetensors, or plain tensors, are read"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info.get(kind) or ())
        keys = [key for key in keys if kind != "unexpected_keys" or not key.startswith(tuple(leftover))]
        if keys:
            raise ValueError(
                f"`{name}` does not fit {cls.__name__}: {len(keys)} {kind.replace('_', ' ')}, such as {keys[0]!r}; the "
                "checkpoint and its config.json must belong together"
            )
    return model, info


def _on_hub(name):
    """Whether `name` is that of a repository, not of a folder, be it there or not."""
    try:
        validate_repo_id(str(name))
    except ValueError:
        return False
    return not os.path.exists(name)


def _check_index(name, subfolder):
    # A downloaded index is checked by huggingface_hub, that of a folder by nobody. Links stay as they are: the cache of
    # the Hub is made of them.
    folder = Path(os.path.abspath(os.path.join(name or "", subfolder)))
    for index in folder.glob("*.index.json") if name else ():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"`{index.name}` of `{name}` must be JSON with a `weight_map`, got something else"
            ) from error
        for file in files:
            if not Path(os.path.abspath(folder / str(file))).is_relative_to(folder):
                raise ValueError(f"`{index.name}` of `{name}` must name files of its own folder, got {file!r}")


def _forget_damaged(name, options):
    """Remove files from the cache whose content is not what the Hub announced; returns whether there were any."""
    if not _on_hub(name):
        return False
    options = {key: options.get(key) for key in ("cache_dir", "revision")}
    config = try_to_load_from_cache(str(name), "config.json", **options)
    if not isinstance(config, str):
        return False
    damaged = []
    for path in Path(config).parent.rglob("*"):
        blob = path.resolve()  # named by the hash of the content, where the cache can use links
        if path.is_symlink() and blob.is_file() and _is_suspect(path) and _hash_like(blob) != blob.name:
            damaged += [path, blob]
    for path in damaged:
        path.unlink(missing_ok=True)
    return bool(damaged)


def _is_suspect(path):
    """Whether a file is worth hashing: small, or safetensors that cannot be opened."""
    if path.suffix != ".safetensors":
        return path.stat().st_size < 2**20
    try:
        with safe_open(path, "pt"):
            return False
    except SafetensorError:
        return True


def _hash_like(blob):
    """Hash of the kind that the name of a cached file is: git's sha1, or sha256 for large files."""
    if len(blob.name) not in (40, 64):
        return blob.name
    digest = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    with open(blob, "rb") as stream:
        while part := stream.read(2**20):
            digest.update(part)
    return digest.hexdigest()


class StrictLoading:
    """`from_pretrained` that refuses a checkpoint which does not fit, instead of filling in random weights."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: weights are missing, left over or of another shape, a weight file is damaged or would run code, or
                it is another kind of model; `weights_only=False` was asked for.
            OSError: the repository of the Hub cannot be read; the message says why and what to do.
        """
        name, outer = pretrained_model_name_or_path, sys.exception()
        check_token(kwargs.get("token"))
        if kwargs.get("weights_only", True) is not True:
            raise ValueError(f"`weights_only` must be True, got {kwargs['weights_only']!r}: nothing is unpickled")
        try:
            model, info = load_strictly(super().from_pretrained, cls, name, *model_args, **kwargs)
        except (OSError, HTTPError) as error:
            _explain(name, kwargs, error, outer)
            raise
        except ValueError:
            if kwargs.get("config") is None:
                cls._check_kind(name, {key: value for key, value in kwargs.items() if key in HUB_OPTIONS})
            raise
        return (model, info) if output_loading_info else model

    @classmethod
    def _check_kind(cls, name, options):
        """Raise `ValueError` if the configuration there is that of another kind of model."""
        found, _ = PreTrainedConfig.get_config_dict(name, **options)
        given, wanted = found.get("model_type"), cls.config_class.model_type
        if given not in (None, wanted):
            raise ValueError(f"`{name}` does not fit {cls.__name__}: got {given!r}{_advice(cls, found)}") from None


def _advice(cls, config):
    """What to do with another kind of model."""
    around = "`SmoothedVisionTower.from_components(vision_tower, psm, ...)` or `attach(host, psm, ...)`"
    given, inner = config.get("model_type"), config.get("vision_config") or {}
    if given == "fs_psm":
        return f", a purifier and mapper alone: load it with `PSMModel.from_pretrained` and use {around}"
    if given == "smoothed_vision_tower":
        return (
            ", a whole smoothed tower: load it with `SmoothedVisionTower.from_pretrained`; its `psm` is the PSM in it"
        )
    if inner.get("model_type") == "smoothed_vision_tower":
        return ", a host whose tower is smoothed already: load it with the host's own class after `import fs_psm_hf`"
    if cls.config_class.model_type == "fs_psm":
        return f": to smooth it, load it with its own class and use {around}"
    return f", a model that is not smoothed: load it with its own class and use {around}"


def _explain(name, options, error, outer):
    """Raise `OSError` with one sentence if it was the Hub, or the way to it, that failed."""
    if not _on_hub(name):
        return
    reason = hub_reason(error, outer)
    if reason is None and "does not appear to have" in str(error) and not options.get("local_files_only"):
        # transformers takes any failure of the request for weights as "not there": ask once more, for the reason.
        try:
            url = hf_hub_url(
                str(name),
                "model.safetensors",
                subfolder=options.get("subfolder") or None,
                revision=options.get("revision"),
            )
            get_hf_file_metadata(url, token=options.get("token"))
        except EntryNotFoundError:
            reason = "there are no weights" + (f" in {options['subfolder']!r}" if options.get("subfolder") else "")
        except (HTTPError, OSError) as real:
            reason = hub_reason(real, error)
    if reason is None and _forget_damaged(name, options):
        reason = "a transfer failed, and what came of it was removed from the cache: load it again"
    if reason is not None:
        raise OSError(f"`{name}` cannot be loaded from the Hub: {reason}") from error
