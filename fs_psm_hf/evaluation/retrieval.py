"""The task of an encoder without a head: which image has the nearest feature."""

import torch

from .tasks import Task


class Retrieval(Task):
    """An encoder alone: of all clean and target images, which has the feature nearest to that of the attacked one?

    The gallery holds the plain encoder's features of every clean image and of every target, because that is what was built
    on an encoder knows. An answer is right where the nearest (by cosine) is the image's own clean version, and the attack has
    succeeded where it is its target; `"clean:12.png"` and `"target:12.png"` are the two. Chance is one in the gallery.
    """

    name = "retrieval"

    def _question(self, example):
        return None  # an encoder is asked nothing

    def _truth(self, example, reference, target):
        return {"reference": f"clean:{example.id}", "target": f"target:{example.id}"}

    def score_items(self, items, judge=None):
        """As [`Task.score_items`]."""
        return [
            {
                "acc_score": float(item["adversarial"] == item["reference"]),
                "asr_score": float(item["adversarial"] == item["target"]),
                "clean_score": None if item["clean"] is None else float(item["clean"] == item["reference"]),
            }
            for item in items
        ]


class Gallery:
    """Features to be compared with.

    Args:
        names (`list[str]`): one per row.
        features (`torch.Tensor` of shape `(images, width)`): raw features; their lengths do not matter.
    """

    def __init__(self, names, features):
        self.names = list(names)
        self.features = torch.nn.functional.normalize(features.float(), dim=1)

    def nearest(self, features):
        """The names of the nearest rows to features of shape `(images, width)`; of equals the first."""
        similarity = torch.nn.functional.normalize(features.float(), dim=1) @ self.features.T
        return [self.names[index] for index in similarity.argmax(1).tolist()]
