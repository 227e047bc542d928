"""Training images: `datasets` folders and Hub sets, in an order and with crops that depend on the seed and the position only.

Position p of a run is its p-th image, counted over all processes and epochs. Which image that is, how it is cropped and
which noise it gets are functions of (seed, p): a resumed run, and one on more processes, sees the same.
"""

import hashlib
import io
import json
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..inputs import list_images


logger = logging.getLogger(__name__)


class ImageSource:
    """Images of one folder or data set; `source[i]` is a `PIL.Image.Image` in RGB.

    Raises:
        OSError: from `source[i]`, where image i cannot be read.
    """

    def __init__(self, rows, column=None, folder=None):
        self.rows, self.column, self.folder = rows, column, folder

    def __len__(self):
        return len(self.rows)

    def keep(self, indices):
        """Forget all other images."""
        self.rows = [self.rows[i] for i in indices] if self.column is None else self.rows.select(indices)

    def name(self, index):
        """What to call an image in a message."""
        return f"image {index}" if self.column is not None else str(self.folder / self.rows[index])

    def __getitem__(self, index):
        row = self.rows[index]
        try:
            if self.column is None:
                file = self.folder / row
            else:
                entry = row[self.column] or {"bytes": b""}  # a row without an image
                file = entry["path"] if entry["bytes"] is None else io.BytesIO(entry["bytes"])
            with Image.open(file) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise OSError(f"{self.name(index)} is not a readable image: {error}") from error


def folder_source(folder, option="--train_data_dir"):
    """All images below a folder, which `option` named.

    Raises:
        ValueError: it is no folder, or holds none.
    """
    folder = Path(folder)
    return ImageSource(list_images(folder, None, None, option=option), folder=folder)


def hub_source(name, config_name, split, column, cache_dir=None):
    """A data set of the Hub, or a local one that `datasets` knows.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: the set, the split or the column is not there.
    """
    try:
        from datasets import Image as ImageFeature
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("`--dataset_name` needs datasets: pip install 'fs-psm-hf[train]'") from error
    try:
        data = load_dataset(name, config_name, split=split, cache_dir=cache_dir)
    except Exception as error:  # its own classes, urllib's, pyarrow's
        raise ValueError(f"`--dataset_name` {name} cannot be loaded: {error}") from error
    if column not in data.column_names:
        raise ValueError(f"`--image_column` must be one of {', '.join(data.column_names)}, got {column}")
    if not isinstance(data.features[column], ImageFeature):
        raise ValueError(f"`--image_column` {column} must hold images, got {data.features[column]}")
    # Decoded here, image by image, so that a broken one can be skipped.
    return ImageSource(data.cast_column(column, ImageFeature(decode=False)), column)


class Mixture:
    """Several sources with weights, as an endless list of (source, index).

    One source, or sources without weights, are gone through once per epoch, in a new random order each. With weights
    an image is drawn, with replacement, from a source with that probability.

    Args:
        sources (`list[ImageSource]`): at least one.
        weights (`list[float]`, *optional*): one per source, > 0.
        seed (`int`): of the order.
        held_out (`frozenset[tuple[int, int]]`): (source, index) of images that are not trained on.

    Raises:
        ValueError: the weights do not fit, or nothing is left to train on.
    """

    def __init__(self, sources, weights=None, seed=0, held_out=frozenset()):
        if weights is not None:
            good = len(weights) == len(sources) and all(np.isfinite(w) and w > 0 for w in weights)
            if not good:
                raise ValueError(
                    f"`--train_data_weights` must be one number > 0 for each of {len(sources)} sets, got {list(weights)}"
                )
        self.sources, self.weights, self.seed = sources, weights, seed
        self.members = [
            np.array([i for i in range(len(source)) if (s, i) not in held_out], dtype=np.int64)
            for s, source in enumerate(sources)
        ]
        self.size = sum(map(len, self.members))
        if not all(map(len, self.members)):
            raise ValueError("`--train_data_dir` must leave images to train on in every set, beside those held out")
        self._order = None, None

    def names_hash(self):
        """SHA-256 of which images are trained on: their names below their folders, or their numbers in a data set."""
        digest = hashlib.sha256()
        for source, members in zip(self.sources, self.members, strict=True):
            names = [str(i) if source.column is not None else source.rows[i] for i in members.tolist()]
            digest.update(json.dumps(names).encode())
        return digest.hexdigest()

    def at(self, position):
        """The (source, index) of a position of the run."""
        epoch, place = divmod(position, self.size)
        if self.weights is not None:
            rng = np.random.default_rng([self.seed, 1, position])
            source = int(rng.choice(len(self.sources), p=np.array(self.weights) / sum(self.weights)))
            return source, int(rng.choice(self.members[source]))
        if self._order[0] != epoch:
            everything = [(s, i) for s, members in enumerate(self.members) for i in members.tolist()]
            self._order = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(np.array(everything))
        source, index = self._order[1][place]
        return int(source), int(index)

    def stand_in(self, position, attempt):
        """Another image, at random from the set of the first, for a position whose image cannot be used."""
        source, _ = self.at(position)
        rng = np.random.default_rng([self.seed, 3, position, attempt])
        return source, int(rng.choice(self.members[source]))


def fit_image(image, size, rng=None, random_resize=False):
    """Resize the shorter side to `size` and crop a square: at random with `rng`, the middle without.

    With `random_resize` the shorter side becomes anything between `size` and what it is: small crops then show details
    at the size that they have in the image, too.

    Returns:
        `torch.Tensor` of shape `(3, size, size)`, float32 in [0, 1].
    """
    width, height = image.size
    shorter = size
    if random_resize and rng is not None:
        shorter = int(rng.integers(size, max(size, min(width, height)) + 1))
    scale = shorter / min(width, height)
    if scale != 1:
        image = image.resize((max(size, round(width * scale)), max(size, round(height * scale))), Image.BICUBIC)
    across, down = image.width - size, image.height - size
    if rng is None:
        left, top = across // 2, down // 2
    else:
        left, top = int(rng.integers(across + 1)), int(rng.integers(down + 1))
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))) / 255


class TrainingImages(torch.utils.data.Dataset):
    """`images[position]` is what is trained on at that position of the run; an unusable image gives way to another.

    `pixels` is `None` where a hundred in a row could not be used: an error of a process that reads images would come with
    the traceback of that process.

    Args:
        mixture ([`Mixture`]): the order.
        size (`int`): height and width in pixels.
        center_crop, random_flip (`bool`): as in diffusers' scripts.
        random_resize (`bool`): see `fit_image`.
        smallest (`int`): images with a shorter side are not used; the tower's patch.
    """

    _MOST_ATTEMPTS = 100

    def __init__(self, mixture, size, center_crop=False, random_flip=False, random_resize=False, smallest=1):
        self.mixture, self.size, self.smallest = mixture, size, smallest
        self.center_crop, self.random_flip, self.random_resize = center_crop, random_flip, random_resize

    def __len__(self):
        return self.mixture.size

    def __getitem__(self, position):
        skipped = []
        for attempt in range(self._MOST_ATTEMPTS):
            source, index = self.mixture.stand_in(position, attempt) if attempt else self.mixture.at(position)
            try:
                image = self.mixture.sources[source][index]
                if min(image.size) < self.smallest:
                    raise OSError(
                        f"{self.mixture.sources[source].name(index)} has {image.width}x{image.height} pixels, less than "
                        f"the {self.smallest} of a patch"
                    )
            except OSError as error:
                skipped.append(str(error))
                continue
            rng = np.random.default_rng([self.mixture.seed, 2, position])
            pixels = fit_image(image, self.size, None if self.center_crop else rng, self.random_resize)
            if self.random_flip and rng.random() < 0.5:
                pixels = pixels.flip(-1)
            return {"pixels": pixels, "position": position, "skipped": skipped}
        return {"pixels": None, "position": position, "skipped": skipped}


def collate(items):
    """A batch: pixels `(batch_size, 3, height, width)`, their positions, and why images were skipped."""
    failed = [item["skipped"] for item in items if item["pixels"] is None]
    return {
        "pixels": None if failed else torch.stack([item["pixels"] for item in items]),
        "failed": failed[0] if failed else None,
        "positions": [item["position"] for item in items],
        "skipped": [reason for item in items for reason in item["skipped"]],
    }


class PositionBatches:
    """The positions of each micro-batch of one process, from a step on.

    Global batch g holds positions `[g·G, (g+1)·G)`, G = batch_size · processes · accumulation, and is cut into equal
    slices: micro-batch by micro-batch, and within one process by process. So the images of a step are the same for any
    number of processes and accumulated micro-batches that make up the same G.
    """

    def __init__(self, batch_size, process_index, num_processes, accumulation, first_step, last_step):
        self.batch_size, self.process_index, self.num_processes = batch_size, process_index, num_processes
        self.accumulation, self.first_step, self.last_step = accumulation, first_step, last_step

    def __len__(self):
        return (self.last_step - self.first_step) * self.accumulation

    def __iter__(self):
        together = self.batch_size * self.num_processes
        for micro in range(self.first_step * self.accumulation, self.last_step * self.accumulation):
            start = micro * together + self.process_index * self.batch_size
            yield list(range(start, start + self.batch_size))


def load_images(args, resolution, smallest):
    """The training images of some [`PSMTrainingArguments`], and those held out to validate on.

    Args:
        resolution (`int`): height and width in pixels.
        smallest (`int`): see [`TrainingImages`].

    Returns:
        `tuple[TrainingImages, torch.Tensor]`: the second of shape `(images, 3, resolution, resolution)`, in [0, 1].

    Raises:
        ValueError, ImportError: the images cannot be had, or none of those held out is readable.
    """
    if args.train_data_dir is not None:
        sources = [folder_source(folder) for folder in args.train_data_dir]
    else:
        name, config_name, split = args.dataset_name, args.dataset_config_name, args.dataset_split
        sources = [hub_source(name, config_name, split, args.image_column, cache_dir=args.cache_dir)]
    rng = np.random.default_rng([args.seed, 5])
    if args.max_train_samples is not None:
        for source in sources:
            source.keep(sorted(rng.permutation(len(source))[: args.max_train_samples].tolist()))
    everything = [(s, i) for s, source in enumerate(sources) for i in range(len(source))]
    picked = set()
    if args.validation_data_dir is not None:
        validation = folder_source(args.validation_data_dir, option="--validation_data_dir")
        places = rng.permutation(len(validation))[: args.num_validation_images].tolist()
        chosen = [(validation, i) for i in sorted(places)]
    else:
        # Never more than a tenth of the images.
        count = min(args.num_validation_images, max(1, len(everything) // 10))
        picked = {everything[i] for i in rng.permutation(len(everything))[:count].tolist()}
        chosen = [(sources[s], i) for s, i in sorted(picked)]
    mixture = Mixture(sources, args.train_data_weights, args.seed, frozenset(picked))
    images = TrainingImages(mixture, resolution, args.center_crop, args.random_flip, args.random_resize, smallest)
    held_out = []
    for source, index in chosen:
        try:
            held_out.append(fit_image(source[index], resolution))
        except OSError as error:
            logger.warning("not validated on: %s", error)
    if not held_out:
        option = next(n for n in ("validation_data_dir", "train_data_dir", "dataset_name") if getattr(args, n))
        raise ValueError(f"`--{option}` has no readable image among the {len(chosen)} held out")
    return images, torch.stack(held_out)
