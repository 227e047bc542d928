"""Judges that need no network: keywords by hand, and a small sentence-transformers model against its own parts."""

import sys

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from transformers import BertConfig, BertModel, BertTokenizerFast

from fs_psm_hf.evaluation.judges import EmbeddingJudge, Judge, KeywordJudge


WORDS = ["a", "photo", "of", "dog", "cat", "two", "cars", "in", "the", "snow", "no"]


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory):
    """A BERT of two small layers with mean pooling, in the folder layout of sentence-transformers."""
    folder = tmp_path_factory.mktemp("embedding")
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    bert = BertModel(config).eval()
    # Random weights place all texts close to each other; larger word vectors spread them.
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight.mul_(50)
    bert.save_pretrained(folder / "bert")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder / "bert")
    word_model = modules.Transformer(str(folder / "bert"))
    pooling = modules.Pooling(word_model.get_embedding_dimension(), pooling_mode="mean")
    SentenceTransformer(modules=[word_model, pooling], device="cpu").save(str(folder / "tiny-sentences"))
    return folder / "tiny-sentences"


def test_embedding_judge_gives_the_cosine_of_mean_pooled_states(sentence_model):
    judge = EmbeddingJudge(sentence_model, device="cpu")
    assert isinstance(judge, Judge)
    pairs = [("a photo of a dog", "two cars in the snow"), ("a dog", "a dog"), ("no cat", "a cat"), ("", "a cat")]
    scores = judge.score(pairs)

    bert, tokenizer = BertModel.from_pretrained(sentence_model), BertTokenizerFast.from_pretrained(sentence_model)

    def embed(text):
        with torch.no_grad():
            return bert.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    for (text, reference), score in zip(pairs[:3], scores[:3], strict=True):
        wanted = torch.cosine_similarity(embed(text), embed(reference), dim=0).item()
        assert score == pytest.approx(max(wanted, 0), abs=1e-5)
    assert scores[1] == pytest.approx(1, abs=1e-6)
    assert scores[0] < 0.9
    assert scores[3] == 0
    assert judge.score([]) == []
    assert judge.score(pairs[::-1]) == pytest.approx(scores[::-1], abs=1e-6)
    description = judge.describe()
    assert description["judge"] == "embedding"
    assert description["model"] == "tiny-sentences"  # not where it lies


def test_negative_cosines_are_zero(sentence_model):
    judge = EmbeddingJudge(sentence_model, device="cpu")
    texts = [f"{first} {second}" for first in WORDS for second in WORDS]
    vectors = judge.model.encode(texts, normalize_embeddings=True)
    cosines = vectors @ vectors.T
    first, second = divmod(int(cosines.argmin()), len(texts))
    assert cosines.min() < -0.05
    assert judge.score([(texts[first], texts[second])]) == [0.0]


def test_no_such_embedding_model(tmp_path):
    with pytest.raises(ValueError, match="`model` must be a folder or a Hub id of a sentence-transformers model, got"):
        EmbeddingJudge(tmp_path / "nothing")


def test_without_sentence_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        ImportError, match=r"EmbeddingJudge needs sentence-transformers: pip install 'fs-psm-hf\[eval\]'"
    ):
        EmbeddingJudge("any")


def test_keyword_judge_by_hand():
    judge = KeywordJudge({"dog": ["puppy"], "killer whale": ["orca"], "whale": [], "cat": []})
    assert isinstance(judge, Judge)
    pairs = [
        ("A photo of a PUPPY.", "two dogs on a beach"),  # synonym, plural, case
        ("a dog and a cat", "a dog"),  # half of what is mentioned is common
        ("a dog, a cat, a whale, an orca", "a dog"),  # to name everything does not help
        ("an orca", "a whale"),  # not the same
        ("dogma", "a dog"),  # no whole word
        ("", "a dog"),
        ("a dog", "a teapot"),  # nothing to look for
    ]
    assert judge.score(pairs) == [1.0, 0.5, 0.25, 0.0, 0.0, 0.0, None]
    assert judge.describe()["keywords"]["dog"] == ["dog", "puppy"]
    for keywords in (["dog", "cat"], {"dog": None, "cat": []}):
        assert KeywordJudge(keywords).score([("a cat", "cats")]) == [1.0]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ([], "`keywords` must be at least one word each"),
        ({"dog": [" "]}, "`keywords` must be at least one word each"),
        ({"dog": ["Pet"], "cat": ["pet"]}, "`keywords` must stand for one name each, got pet for several"),
    ],
)
def test_keywords_that_cannot_be_used(keywords, message):
    with pytest.raises(ValueError, match=message):
        KeywordJudge(keywords)


@pytest.mark.parametrize("keywords", ["dog", {"dog": "puppy"}])
def test_keywords_come_in_lists(keywords):
    with pytest.raises(TypeError, match="`keywords` must be lists of str, or a dict of lists of str, got"):
        KeywordJudge(keywords)


def test_pairs_must_be_texts():
    with pytest.raises(TypeError, match=r"`pairs` must be pairs of str, got \('a dog', None\)"):
        KeywordJudge(["dog"]).score([("a dog", None)])
