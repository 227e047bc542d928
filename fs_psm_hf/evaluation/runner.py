"""Runs an evaluation: makes the adversarial pictures, shows them to every row, judges, and can be stopped at any moment."""

from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..attacks import Encoder, attack
from ..certification.folder import image_name, one_of_several
from ..certification.results_file import versions
from .captioners import Captioner
from .cells import result_of, summarize_items
from .data import load_images
from .heads import load_head, predict, save_head, train_head
from .jobs import attack_record, job_of, picture_path, read_picture, save_picture
from .metrics import fcs, psnr
from .records import RunFile
from .retrieval import Gallery, Retrieval
from .rows import Defended
from .run_config import HOST_TASKS, UNTARGETED
from .setup import build_judge, build_task, read_examples, read_labelled


# Adversarial images are served under other noise than clean ones, as two requests of a client are.
_OTHER_NOISE = 1


def evaluate(config, output, *, device="cpu", progress=True, command=None):
    """Run everything a configuration asks for, or what is left of it.

    Pictures are made once per encoder and attack, below `<output>.images`, and shared by all hosts and rows. Under
    `accelerate launch` each process takes its batches; the merged file is the same.

    Args:
        config ([`RunConfig`]): what to run.
        output (`Path`): JSON lines, made or continued.
        device (`str`): of this process.
        progress (`bool`): show bars.
        command (`str`, *optional*): what remakes the file.

    Returns:
        `list[Result]` or `None`: the finished cells; `None` in every process but the first.

    Raises:
        ValueError, OSError, ImportError: a user's mistake, in one sentence. What is finished is on disk.
    """
    output = Path(output)
    task = build_task(config.task)
    judge = build_judge(config.judge, output) if task.needs_judge else None
    examples = read_examples(config, task)
    state = one_of_several(device)
    header = {"versions": versions(), "seed": config.seed, "command": command}
    run = RunFile(output, config.settings(), header) if state.process_index == 0 else None
    state.wait_for_everyone()
    if run is None:
        run = RunFile(output, config.settings(), part=state.process_index)
    state.wait_for_everyone()  # nobody writes a part before all have read
    worker = _Worker(config, task, examples, run, device, progress and state.is_local_main_process)
    worker.work(state.process_index, state.num_processes)
    state.wait_for_everyone()
    if state.process_index > 0:
        return None
    cells = [cell for cell, *_ in worker.asked]
    keys = [*dict.fromkeys([*worker.vanilla_keys(), *(job.key for job in worker.jobs), *(cell.key for cell in cells)])]
    order = [example.id for example in examples]
    run.merge(keys, order)
    _finish_cells(run, task, judge, worker, order)
    run.merge(keys, order)
    return [result_of(line, output.name) for line in run.cells()]


def _finish_cells(run, task, judge, worker, order):
    """A summary for each cell whose items are all there, one at a time: a judge that fails loses none of them."""
    for cell, _, _, _, asked in worker.asked:
        if run.get("cell", cell.key) is not None:
            continue
        items = run.items(cell.key, order[: asked.limit])
        expected = len(order[: asked.limit])
        if len(items) != expected:
            raise ValueError(f"`output` {run.path} lacks {expected - len(items)} images of {cell.key}: run it again")
        summary = summarize_items(task, items, judge)
        if judge is not None:
            summary["judge"] = judge.describe()
        if (cell.row, cell.mode, cell.sigma) == ("FS", "adaptive", 0):
            plain = worker.same_on_org(cell)
            if plain is not None:
                named = {item["image"] for item in items}
                theirs = [item for item in run.items(plain.key, order) if item["image"] in named]
                if len(theirs) == len(items):
                    figures = summarize_items(task, theirs, judge)
                    summary["org"] = {name: figures[name] for name in ("fcs", "asr")}
        run.add("cell", cell.key, cell=cell.to_dict(), summary=summary)


class _Worker:
    """The part of one process."""

    def __init__(self, config, task, examples, run, device, progress):
        self.config, self.task, self.examples, self.run = config, task, examples, run
        self.device, self.progress = device, progress
        self.asked = config.cells()
        self.pictures = run.path.with_name(run.path.name + ".images")
        self.job_by_cell, jobs = {}, {}
        for cell, model, encoder, row, how in self.asked:
            job = job_of(config, cell, model, encoder, row, how)
            self.job_by_cell[cell.key] = jobs.setdefault(job.key, job)
        self.jobs = list(jobs.values())
        size = config.batch_size
        self.batches = [range(i, min(i + size, len(examples))) for i in range(0, len(examples), size)]
        self.mine = self.batches

    def same_on_org(self, cell):
        """The white-box cell with the same attack on the plain tower, or `None`."""
        names = ("model", "encoder", "task", "attack", "epsilon", "norm", "steps")
        for other, *_ in self.asked:
            if other.row == "Org" and all(getattr(other, name) == getattr(cell, name) for name in names):
                return other
        return None

    def vanilla_key(self, model):
        """What the answers of the vanilla model are kept under."""
        return f"{model.name}, vanilla"

    def vanilla_keys(self):
        return [self.vanilla_key(model) for model in self.config.models] if self.task.name == "captioning" else []

    def work(self, index, count):
        """All batches of one process, encoder by encoder; nothing is loaded for what is done."""
        self.mine = self.batches[index::count]
        for model in self.config.models:
            names = list(model.encoders)
            # The vanilla model speaks first: its captions are what all rows are compared with.
            for encoder in sorted(names, key=lambda name: name != "org"):
                cells = [entry for entry in self.asked if (entry[1].name, entry[2]) == (model.name, encoder)]
                jobs = list(
                    {self.job_by_cell[cell.key].key: self.job_by_cell[cell.key] for cell, *_ in cells}.values()
                )
                vanilla = self.task.name == "captioning" and encoder == min(names, key=lambda name: name != "org")
                if not self._is_done(cells, jobs, model if vanilla else None):
                    self._one_encoder(Defended(model, encoder, self.device), cells, jobs, vanilla)

    def _is_done(self, cells, jobs, vanilla):
        for batch in self.mine:
            keys = [] if vanilla is None else [("item", self.vanilla_key(vanilla), None)]
            keys += [("attack", job.key, job.attack.limit) for job in jobs]
            keys += [("item", cell.key, how.limit) for cell, *_, how in cells]
            for kind, key, limit in keys:
                if any(self.run.get(kind, key, self.examples[i].id) is None for i in self._within(batch, limit)):
                    return False
        return True

    def _within(self, batch, limit):
        return batch if limit is None else range(batch.start, min(batch.stop, max(batch.start, limit)))

    def _one_encoder(self, loaded, cells, jobs, vanilla):
        captioner = None
        if self.task.name in HOST_TASKS:
            captioner = Captioner(loaded.host, loaded.processor, batch_size=self.config.batch_size)
        if vanilla:
            self._vanilla_captions(loaded, captioner)
        for job in jobs:
            self._attack(loaded, job)
        answer = captioner or self._reader_of_features(loaded)
        rows = {}
        for entry in cells:
            row = entry[3]
            rows.setdefault((row.row, row.psm, row.sigma, row.num_samples, row.purifier), []).append(entry)
        for key, mine in rows.items():
            self._show(loaded, key, mine, answer)

    # Answers ----------------------------------------------------------------------------------------------------------

    def _reader_of_features(self, loaded):
        """A function of features: class numbers by a head on this encoder's plain features, or names of the nearest."""
        loaded.use("Org")
        if self.task.name == Retrieval.name:
            names, features = [], []
            for batch in tqdm(self.batches, desc="gallery", disable=not self.progress):
                examples = [self.examples[i] for i in batch]
                for target in (False, True):
                    images = load_images(examples, self.config.image_size, target)
                    features.append(loaded.features(images, self.config.seed, self._ids(batch)))
                    names += [f"{'target' if target else 'clean'}:{example.id}" for example in examples]
            return Gallery(names, torch.cat(features)).nearest
        head = self._head(loaded)
        return lambda features: predict(head, features)

    def _head(self, loaded):
        asked = self.config.task
        if asked.head is not None and Path(asked.head).is_file():
            return load_head(asked.head)[0]
        kept = self.pictures / f"head-{loaded.config.name}-{loaded.encoder}.safetensors".replace("/", "_")
        if kept.is_file():
            return load_head(kept)[0]
        if asked.head_images is None:
            raise ValueError(f"`task.head` must be a safetensors file, got {asked.head}")
        examples, labels = read_labelled(asked.head_images, self.task.class_names)
        features = []
        for start in tqdm(range(0, len(examples), 16), desc="head", disable=not self.progress):
            part = examples[start : start + 16]
            images = load_images(part, self.config.image_size)
            features.append(loaded.features(images, self.config.seed, [image_name(example.id) for example in part]))
        head = train_head(torch.cat(features), torch.tensor(labels), len(self.task.class_names))
        save_head(head, kept, self.task.class_names)  # aside and renamed: of several processes any may be the last
        return head

    def _ids(self, batch):
        return [image_name(self.examples[i].id) for i in batch]

    def _ask(self, loaded, captioner, images, batch, seed):
        """The answers of the row that is in use, under fixed noise."""
        prompts = [self.task.prompt(self.examples[i]) for i in batch]
        if captioner.open_flamingo and not all("<image>" in prompt for prompt in prompts):
            prompts = None  # no chat model: it has a prompt of its own
        captioner.seed = seed
        return captioner(images, prompts, self._ids(batch))

    def _vanilla_captions(self, loaded, captioner):
        loaded.use("Org")
        key, seed = self.vanilla_key(loaded.config), self.config.seed
        for batch in tqdm(self.mine, desc=f"{loaded.config.name}: vanilla", disable=not self.progress):
            examples = [self.examples[i] for i in batch]
            if all(self.run.get("item", key, example.id) for example in examples):
                continue
            said = []
            for target in (False, True):
                images = load_images(examples, self.config.image_size, target)
                said.append(self._ask(loaded, captioner, images, batch, seed))
            for example, reference, wanted in zip(examples, *said, strict=True):
                self.run.add("item", key, example.id, reference=reference, target=wanted)

    # Attacks ----------------------------------------------------------------------------------------------------------

    def _attack(self, loaded, job):
        """Make the pictures of a job that are missing, a batch at a time."""
        how, folder = job.attack, self.pictures / job.key
        todo = []
        for number, batch in enumerate(self.batches):
            batch_ = self._within(batch, how.limit)
            if batch in self.mine and any(not self._has_picture(job, i) for i in batch_):
                todo.append((number, batch_))
        if not todo:
            return
        tower = loaded.use("Org")
        options = {"mode": "transfer"}
        if job.row is not None:
            tower = loaded.use(job.row.row, job.row.psm, job.row.sigma, 1)
            straight = job.gradient == "straight-through"
            options = {"mode": "adaptive", "draws": how.draws, "straight_through": straight}
        size = None if loaded.size == (self.config.image_size,) * 2 else loaded.size
        encoder = Encoder(tower, feature=loaded.config.feature, size=size, **options)
        folder.mkdir(parents=True, exist_ok=True)
        for number, batch in tqdm(todo, desc=job.key, unit="batch", disable=not self.progress):
            examples = [self.examples[i] for i in batch]
            images = load_images(examples, self.config.image_size).to(self.device)
            targets = None
            if how.method not in UNTARGETED:
                targets = load_images(examples, self.config.image_size, target=True).to(self.device)
            checkpoint = folder / f"batch{number:04d}.safetensors"
            result = attack(
                encoder, images, targets, method=how.method, epsilon=how.epsilon, norm=how.norm, steps=how.steps,
                step_size=how.step_size, generator=self.config.seed, image_ids=self._ids(batch), eight_bit=True,
                checkpoint=checkpoint, progress=self.progress,
            )  # fmt: skip
            for place, (i, example) in enumerate(zip(batch, examples, strict=True)):
                path = picture_path(folder, i, example.id)
                save_picture(result.images[place], path)
                self.run.add(
                    "attack", job.key, example.id, file=f"{job.key}/{path.name}", **attack_record(result, place)
                )
            checkpoint.unlink(missing_ok=True)

    def _has_picture(self, job, i):
        name = self.examples[i].id
        done = self.run.get("attack", job.key, name) is not None
        return done and picture_path(self.pictures / job.key, i, name).is_file()

    # Rows -------------------------------------------------------------------------------------------------------------

    def _show(self, loaded, key, entries, answer):
        """Show the adversarial pictures to one row; what is missing of a batch is done again as a whole."""
        row, psm, sigma, samples, _ = key
        todo = []
        for batch in self.mine:
            for cell, *_, how in entries:
                within = self._within(batch, how.limit)
                if any(self.run.get("item", cell.key, self.examples[i].id) is None for i in within):
                    todo.append((batch, cell, within))
        if not todo:
            return
        loaded.use(row, psm, sigma, samples)
        label = f"{loaded.config.name}, {loaded.encoder}, {row}, n₀ = {samples}"
        clean, seed = {}, self.config.seed
        for batch, cell, within in tqdm(todo, desc=label, unit="batch", disable=not self.progress):
            if batch.start not in clean:
                images = load_images([self.examples[i] for i in batch], self.config.image_size)
                # One batch at a time is enough: cells of one batch follow each other.
                clean = {batch.start: (images, *self._observe(loaded, images, batch, answer, seed))}
            images, features, answers = clean[batch.start]
            count, folder = len(within), self.pictures / self.job_by_cell[cell.key].key
            shown = torch.stack([read_picture(picture_path(folder, i, self.examples[i].id)) for i in within])
            theirs, said = self._observe(loaded, shown, within, answer, seed + _OTHER_NOISE)
            cosines, ratios = fcs(features[:count], theirs), psnr(images[:count], shown)
            for place, i in enumerate(within):
                self._add_item(loaded, cell, i, answers[place], said[place], cosines[place], ratios[place])

    def _observe(self, loaded, images, batch, answer, seed):
        """Features and answers."""
        features = loaded.features(images, seed, self._ids(batch))
        if isinstance(answer, Captioner):
            return features, self._ask(loaded, answer, images, batch, seed)
        return features, answer(features)

    def _add_item(self, loaded, cell, i, clean, adversarial, cosine, ratio):
        example, known = self.examples[i], {}
        if self.task.name == "captioning":
            vanilla = self.run.get("item", self.vanilla_key(loaded.config), example.id)
            known = {name: vanilla[name] for name in ("reference", "target")}
        item = self.task.item(example, adversarial=adversarial, clean=clean, **known)
        decibels = ratio.item()
        item |= {"fcs": cosine.item(), "psnr": decibels if decibels != float("inf") else None}
        self.run.add("item", cell.key, example.id, **item)
