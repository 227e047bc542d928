"""Metadata of a card: what the Hub filters, links and draws its tables from."""

import math
from collections import Counter

from huggingface_hub import EvalResult, ModelCardData

from . import tables
from .content import checked_id
from .merge import OWN_RESULT


TAGS = ("fs-psm", "certified-robustness", "randomized-smoothing")
TASK = "image-feature-extraction"


def card_data(card):
    """`ModelCardData` of a [`Card`].

    A folder of results is derived from no model: it names no `base_model` and no task. A tower that is only a folder here is
    no `base_model` either, which must be an id of the Hub. A number is in `model-index` where `results/card.json` names the
    data set that it is about.
    """
    facts, own = card.facts, {}
    if card.kind != "results":
        own |= {"pipeline_tag": TASK, "base_model": card.base_model}
        # Purifier and mapper are put around a tower that stays as it is; the Hub would guess "finetune".
        own |= {"base_model_relation": "adapter"} if card.kind == "psm" and card.base_model else {}
    results, settings = list(_results(card)), Counter()
    for result in results:
        # Two files of one setting: the Hub would take them for one.
        key = (result.unique_identifier, result.metric_type)
        settings[key] += 1
        if settings[key] > 1:
            result.dataset_config += f" ({settings[key]})"
    if results:
        own |= {"model_name": card.name, "eval_results": results}
    data_sets = facts.get("datasets")
    for name in data_sets or ():
        checked_id(name, "datasets")
    tags = [*TAGS, *facts.get("tags", ())]
    return ModelCardData(license=facts.get("license"), library_name="fs_psm_hf", datasets=data_sets, tags=tags, **own)


def _results(card):
    """This model's own numbers. Grouping by `model-index` sees nothing of a setting but `dataset_config`, so all is there."""
    yield from _of_table(card)
    for header, end in card.certified:
        for row in end["rows"]:
            name = "FS" if header["psm"] == "none" else card.row
            setting = f"row {name}, sigma {header['sigma']:g}, {row['method']}, {row['mean_num_samples']:g} draws"
            facts = {"images": row["images"], "level": header["level"], "feature": header["feature"]}
            facts |= {"alpha": header["alpha"]} if row["is_certificate"] else {}
            cosine = 2 * row["mean_robustness_score"] - 1
            yield from _bounds(card, "certify", setting, row["mean_radius"], cosine, facts)
    yield from _of_utility(card)
    yield from _of_attacks(card)


def _of_table(card):
    if card.table is None:
        return
    for sigma, rows in card.table["rows"].items():
        for method in ("cdf", "plugin"):
            found = rows.get(card.row, {}).get(method)
            if found is None:
                continue
            setting = f"row {card.row}, sigma {sigma}, {method}, {found['num_samples']} draws"
            facts = {"images": found["images"], "level": card.level}
            facts |= {"alpha": card.table["alpha"]} if method == "cdf" else {}
            yield from _bounds(card, "table5", setting, found["mean_radius"], found["mean_cosine"], facts)


def _of_utility(card):
    for file, found in card.utilities:
        yield from _of_one_utility(card, file, found)


def _of_one_utility(card, file, found):
    for name, row in found["rows"].items():
        if name.partition(",")[0] not in (card.row, "FS+PSM"):
            continue
        facts = {"images": found["images"], "neighbours": found["neighbours"]}
        for key in ("plain_gallery", "own_gallery"):
            gallery = key.replace("_", " ")
            setting = f"row {name.replace('σ =', 'sigma')}, {found['num_samples']} draws, {gallery}"
            title = f"accuracy of the nearest neighbours, {gallery}"
            task = "image-classification"
            yield from _result(card, file, setting, "accuracy", row[key], title, facts, task)


def _of_attacks(card):
    names = {"fcs": "FCS", "asr": "attack success rate", "acc": "accuracy under attack"}
    for found in card.attacks:
        for row in found["rows"]:
            if row["row"] != card.row:
                continue
            strength = f"{found['norm']} {tables.format_epsilon(row['epsilon'], found['norm'])}"
            setting = f"row {card.row}, sigma {row.get('sigma')}, {row['attack']}, {row['mode']}, {strength}"
            for name, title in names.items():
                if row[name] is not None:
                    yield from _result(card, "attacks", setting, name, row[name], title, {"images": row["images"]})


def _bounds(card, file, setting, radius, cosine, facts):
    kind, words = "plugin_radius", "plug-in, no confidence"
    if "alpha" in facts:
        kind, words = "certified_radius", "certified"
    if not isinstance(radius, str):  # "inf"
        # A bound is rounded down.
        yield from _result(card, file, setting, kind, math.floor(1e4 * radius) / 1e4, f"mean radius, {words}", facts)
    yield from _result(card, file, setting, "cosine", cosine, "mean cosine with the clean feature", facts)


def _result(card, file, setting, metric, value, title, facts, task=TASK):
    data = card.evaluation(file)
    if data is None:
        return
    yield EvalResult(
        task_type=task, dataset_type=data["type"], dataset_name=data["name"], dataset_split=data.get("split"),
        dataset_config=OWN_RESULT + setting, metric_type=metric, metric_name=title, metric_value=round(value, 4),
        metric_args=dict(facts),
    )  # fmt: skip
