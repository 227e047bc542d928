"""Judges of captions: how much of a reference's meaning a text has, as a number in [0, 1].

The paper's numbers are of an LLM as judge, [`LLMJudge`]; the two here need no network, so they can be run by anyone, but
their scores mean something else. A result names its judge by [`Judge.describe`], and results of different judges are not
to be put beside each other. Captions are kept in the results, so another judge can be asked later.
"""

import os
from typing import Protocol, runtime_checkable

from .prompts import find_names


@runtime_checkable
class Judge(Protocol):
    """What scores pairs of texts."""

    def score(self, pairs: list[tuple[str, str]]) -> list[float | None]:
        """Score each (text, reference).

        Args:
            pairs (`list[tuple[str, str]]`): the text that is judged first.

        Returns:
            `list[float | None]`: in [0, 1], one per pair; `None` for a pair that it cannot judge, which is counted as
            `unjudged` and left out of every rate. A text without a word scores 0.
        """

    def describe(self) -> dict:
        """What it is, JSON-safe, to be kept with the scores."""


def check_pairs(pairs):
    """Raise `TypeError` unless `pairs` are pairs of texts."""
    for pair in pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise TypeError(f"`pairs` must be pairs of str, got {pair!r}")


class KeywordJudge:
    """Compares which keywords two texts mention: those of both over those of either (Jaccard index).

    Naming everything is not rewarded, unlike in a count of the reference's keywords alone. A reference without any keyword
    cannot be judged.

    Args:
        keywords (`dict[str, Sequence[str]]` or `Sequence[str]`): names, and for each its synonyms; plurals in s and es are
            found by themselves. Longer names are found first: "killer whale" is no "whale".

    Raises:
        TypeError: a `str` in place of a list of them.
        ValueError: no keyword, an empty one, or one that stands for two names.
    """

    def __init__(self, keywords):
        table = keywords if isinstance(keywords, dict) else dict.fromkeys(keywords)
        if isinstance(keywords, str) or any(isinstance(synonyms, str) for synonyms in table.values()):
            raise TypeError(f"`keywords` must be lists of str, or a dict of lists of str, got {keywords!r}")
        self.keywords = {name: [name, *(synonyms or ())] for name, synonyms in table.items()}
        self._words = [(word, name) for name, words in self.keywords.items() for word in dict.fromkeys(words)]
        folded = [" ".join(word.casefold().split()) for word, _ in self._words]
        if not folded or not all(folded):
            raise ValueError(f"`keywords` must be at least one word each, got {self.keywords}")
        twice = sorted({word for word in folded if folded.count(word) > 1})
        if twice:
            raise ValueError(f"`keywords` must stand for one name each, got {', '.join(twice)} for several")

    def find(self, text):
        """The names that a text mentions, a `set[str]`."""
        return {self._words[index][1] for index in find_names(text, [word for word, _ in self._words])}

    def score(self, pairs):
        """As [`Judge.score`]."""
        check_pairs(pairs)
        scores = []
        for text, reference in pairs:
            said, wanted = self.find(text), self.find(reference)
            scores.append(len(said & wanted) / len(said | wanted) if wanted else None)
        return scores

    def describe(self):
        """As [`Judge.describe`]."""
        return {"judge": "keyword", "measure": "jaccard", "keywords": self.keywords}


class EmbeddingJudge:
    """Cosine of sentence embeddings, negative ones as 0.

    It is a measure of topic: "a cat" and "no cat" are close. The paper's thresholds 0.5 and 0.3 were made for an LLM's
    scores; how far unrelated captions of your data lie apart with your model should be looked at first.

    Args:
        model (`str` or `os.PathLike`): folder or Hub id of a sentence-transformers model.
        device (`str`, *optional*): as torch names it.
        batch_size (`int`): texts per pass.
        revision (`str`, *optional*): of the Hub repository.

    Raises:
        ImportError: sentence-transformers is not installed.
        ValueError: there is no such model.
    """

    def __init__(self, model="sentence-transformers/all-MiniLM-L6-v2", *, device=None, batch_size=64, revision=None):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError("EmbeddingJudge needs sentence-transformers: pip install 'fs-psm-hf[eval]'") from error
        self.name, self.revision, self.batch_size = os.fspath(model), revision, batch_size
        try:
            self.model = SentenceTransformer(self.name, device=device, revision=revision)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"`model` must be a folder or a Hub id of a sentence-transformers model, got {self.name}: {reason}"
            ) from error
        self.model.eval()

    def score(self, pairs):
        """As [`Judge.score`]."""
        check_pairs(pairs)
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        if not texts:
            return []
        vectors = self.model.encode(
            texts,
            batch_size=self.batch_size,
            normalize_embeddings=True,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        vectors = dict(zip(texts, vectors.double().cpu(), strict=True))
        return [
            min(max((vectors[text] @ vectors[reference]).item(), 0.0), 1.0) if text.strip() else 0.0
            for text, reference in pairs
        ]

    def describe(self):
        """As [`Judge.describe`]."""
        import sentence_transformers

        return {
            "judge": "embedding",
            "measure": "cosine, negative as 0",
            # A folder's name, not where it lies on this machine.
            "model": os.path.basename(os.path.normpath(self.name)) if os.path.isdir(self.name) else self.name,
            "revision": self.revision,
            "sentence_transformers": sentence_transformers.__version__,
        }
