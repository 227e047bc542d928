"""The language model as a judge, against an endpoint over a real socket: what is asked, kept, counted, and how it fails."""

import json
import sqlite3
import sys
import threading

import openai
import pytest
from openai_server import Endpoint, Failure

from fs_psm_hf.evaluation.judges import Judge
from fs_psm_hf.evaluation.llm_judge import RUBRIC, AnswerCache, LLMJudge, parse_score
from fs_psm_hf.evaluation.tasks import Captioning


def overlap(body):
    """A judge that counts common words."""
    shown = json.loads(body["messages"][1]["content"])
    first, second = (set(shown[name].split()) for name in ("first", "second"))
    return f"{len(first & second) / len(first | second):.2f}"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def judge_at():
    """Makes judges that give up fast, and closes them."""
    made = []

    def make(endpoint, model="tiny", **options):
        made.append(LLMJudge(model, base_url=endpoint.url, **({"max_retries": 0, "timeout": 20} | options)))
        return made[-1]

    yield make
    for judge in made:
        judge.close()


def test_scores_pairs_and_says_what_it_took(judge_at):
    with Endpoint(overlap) as endpoint:
        judge = judge_at(endpoint, price=(2.5, 10.0))
        assert isinstance(judge, Judge)
        pairs = [("a dog", "a dog"), ("a dog", "a cat"), ("", "a cat"), ("a dog", "a dog")]
        assert judge.score(pairs) == [1.0, 0.33, 0.0, 1.0]
    assert len(endpoint.requests) == 2  # each pair once, and none for a text without a word
    body = next(body for body in endpoint.requests if "cat" in body["messages"][1]["content"])
    assert body["messages"][0] == {"role": "system", "content": RUBRIC}
    assert json.loads(body["messages"][1]["content"]) == {"first": "a dog", "second": "a cat"}
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0.0, 16)
    description = judge.describe()
    assert json.loads(json.dumps(description)) == description
    assert description["endpoint"] == endpoint.url
    assert (description["judged"], description["requests"], description["from_cache"]) == (3, 2, 0)
    assert (description["prompt_tokens"], description["completion_tokens"]) == (200, 4)
    assert description["cost_usd"] == pytest.approx((200 * 2.5 + 4 * 10) / 1e6)


def test_a_cell_of_a_table_by_an_llm(judge_at):
    task = Captioning()
    item = {"task": "captioning", "clean": "a dog", "adversarial": "a cat", "reference": "a dog", "target": "a cat"}
    with Endpoint(overlap) as endpoint:
        figures = task.score([item], judge_at(endpoint))
    assert (figures["acc"], figures["asr"], figures["clean_acc"]) == (0.0, 1.0, 1.0)
    assert figures["mean_acc_score"] == 0.33


def test_answers_are_kept_for_the_next_run(judge_at, tmp_path):
    cache = tmp_path / "judge" / "answers.sqlite"
    pairs = [("a dog", "a cat"), ("a ship", "a ship")]
    with Endpoint(overlap) as endpoint:
        first = judge_at(endpoint, cache=cache, price=(1, 1)).score(pairs)
        again = judge_at(endpoint, cache=cache, price=(1, 1))
        assert again.score([*pairs, ("a dog", "a dog")]) == [*first, 1.0]
        assert len(endpoint.requests) == 3
        # Kept answers have cost something, too.
        assert again.describe()["from_cache"] == 2
        assert again.describe()["cost_usd"] == pytest.approx(3 * 102 / 1e6)
        # Another model or option is another judge.
        judge_at(endpoint, "other", cache=cache).score(pairs)
        judge_at(endpoint, cache=cache, temperature=None, request_options={"seed": 1}).score(pairs)
    assert len(endpoint.requests) == 7
    assert "temperature" not in endpoint.requests[-1]
    assert endpoint.requests[-1]["seed"] == 1
    with sqlite3.connect(cache) as database:
        kept = database.execute(
            "SELECT model, answers, score FROM answers WHERE text = 'a dog' AND reference = 'a cat'"
        )
        assert sorted(kept.fetchall()) == [("other", '["0.33"]', 0.33), *[("tiny", '["0.33"]', 0.33)] * 2]


def test_a_down_endpoint_loses_nothing(judge_at, tmp_path):
    cache, pairs = tmp_path / "answers.sqlite", [(f"a dog {number}", "a dog") for number in range(6)]
    answered = []

    def fail_after_three(body):
        if len(answered) == 3:
            raise Failure(503)
        answered.append(body)
        return overlap(body)

    with Endpoint(fail_after_three) as endpoint:
        judge = judge_at(endpoint, cache=cache, concurrency=1)
        with pytest.raises(
            ConnectionError, match="the judge's endpoint http://127.* keeps failing .*answers so far are kept"
        ):
            judge.score(pairs)
    with pytest.raises(ConnectionError, match="cannot be reached .*start again when it is up"):
        judge_at(endpoint, cache=cache).score(pairs)  # nobody listens there any more
    with Endpoint(overlap) as endpoint:
        assert judge_at(endpoint, cache=cache).score(pairs) == [0.67] * 6
        assert len(endpoint.requests) == 3


def test_passing_failures_are_tried_again(judge_at):
    failures = [Failure(500), Failure(429), Failure(503)]

    def reply(body):
        if failures:
            raise failures.pop()
        return overlap(body)

    with Endpoint(reply) as endpoint:
        assert judge_at(endpoint, max_retries=3).score([("a dog", "a dog")]) == [1.0]
    assert len(endpoint.requests) == 4


def test_an_endpoint_that_does_not_answer_in_time(judge_at):
    with Endpoint(lambda body: (_ for _ in ()).throw(Failure(200, delay=3))) as endpoint:
        judge = judge_at(endpoint, timeout=0.2)
        with pytest.raises(ConnectionError, match="cannot be reached"):
            judge.score([("a dog", "a dog")])


def test_nonsense_is_asked_once_more(judge_at, tmp_path):
    def reply(body):
        return "0.8" if len(body["messages"]) == 4 else "Both show a dog, I would say 0.8 or so."

    with Endpoint(reply) as endpoint:
        judge = judge_at(endpoint, cache=tmp_path / "answers.sqlite")
        assert judge.score([("a dog", "the dog")]) == [0.8]
    first, second = endpoint.requests
    assert second["messages"][:2] == first["messages"]
    assert second["messages"][2]["content"].startswith("Both show a dog")
    assert second["messages"][3]["content"].startswith("Answer with one number")
    assert judge.describe()["prompt_tokens"] == 200


def test_a_few_unjudged_pairs_are_counted_and_asked_again(judge_at, tmp_path):
    cache, pairs = tmp_path / "answers.sqlite", [(f"a dog {number}", "a dog") for number in range(10)]

    def reply(body):
        return "as you like" if "dog 7" in body["messages"][1]["content"] else "0.9"

    with Endpoint(reply) as endpoint:
        judge = judge_at(endpoint, cache=cache)
        scores = judge.score(pairs)
    assert scores == [0.9] * 7 + [None] + [0.9] * 2
    assert judge.describe()["unjudged"] == 1
    with sqlite3.connect(cache) as database:  # what it said is there to be read
        row = database.execute("SELECT answers FROM answers WHERE score IS NULL").fetchall()
    assert row == [('["as you like", "as you like"]',)]
    with Endpoint(lambda body: "0.2") as endpoint:
        assert judge_at(endpoint, cache=cache).score(pairs)[7] == 0.2
        assert len(endpoint.requests) == 1


def test_a_model_that_answers_nonsense_is_no_judge(judge_at, tmp_path):
    cache = tmp_path / "answers.sqlite"

    def reply(body):
        return "0.9" if "dog 1" in body["messages"][1]["content"] else "Sure! " + 90 * "x"

    pairs = [(f"a dog {number}", "a dog") for number in range(4)]
    with Endpoint(reply) as endpoint:
        message = (
            "`model` must answer with one number from 0 to 1, tiny at .* did not for 3 of 4 pairs, as in 'Sure! x+'$"
        )
        with pytest.raises(ValueError, match=message):
            judge_at(endpoint, cache=cache).score(pairs)
        assert judge_at(endpoint, cache=cache, max_unjudged=0.8).score(pairs) == [None, 0.9, None, None]
        assert len(endpoint.requests) == 7 + 6  # the good answer was kept


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (Failure(401), ValueError, "refuses `model` tiny, its key or an option: .*failed with 401"),
        (Failure(404), ValueError, "refuses `model` tiny"),
        (Failure(400, {"error": {"message": "no temperature"}}), ValueError, "or an option: .*no temperature"),
        (Failure(429), ConnectionError, "keeps failing"),
        (Failure(200, b"<html>hello</html>"), ConnectionError, "does not speak the OpenAI protocol"),
        (Failure(200, {"hello": 1}), ConnectionError, "does not speak the OpenAI protocol"),
        (Failure(200, b"[1, 2]"), ConnectionError, "does not speak the OpenAI protocol"),
    ],
)
def test_endpoints_that_refuse_or_are_something_else(judge_at, failure, error, message):
    def reply(body):
        raise failure

    with Endpoint(reply) as endpoint, pytest.raises(error, match=message) as caught:
        judge_at(endpoint).score([("a dog", "a dog")])
    assert "\n" not in str(caught.value)


def test_the_key_is_sent_and_never_shown(judge_at, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "secret-of-mine")
    with Endpoint(overlap) as endpoint:
        judge = judge_at(endpoint, api_key_env="MY_KEY", cache=tmp_path / "answers.sqlite")
        judge.score([("a dog", "a dog")])
    assert endpoint.keys == ["Bearer secret-of-mine"]
    assert "secret" not in json.dumps(judge.describe())
    assert b"secret" not in (tmp_path / "answers.sqlite").read_bytes()
    with_password = LLMJudge("/srv/models/tiny", base_url="http://me:secret@localhost:1/v1")
    assert with_password.describe()["endpoint"] == "http://localhost:1/v1"
    assert with_password.describe()["model"] == "tiny"
    with pytest.raises(
        ValueError, match="`api_key_env` must name an environment variable with a key, NO_KEY is not set"
    ):
        LLMJudge("gpt-4o", api_key_env="NO_KEY")


def test_many_pairs_are_asked_at_a_time(judge_at):
    gate = threading.Barrier(3, timeout=10)

    def reply(body):
        gate.wait()  # passes only when three requests are there at once
        return "0.5"

    with Endpoint(reply) as endpoint:
        judge = judge_at(endpoint, concurrency=3)
        assert judge.score([(f"a dog {number}", "a dog") for number in range(6)]) == [0.5] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_unjudged": 1.5}, r"`max_unjudged` must be in \[0, 1\], got 1.5"),
        ({"concurrency": 0}, "`concurrency` must be at least 1, got 0"),
        ({"request_options": {"top_q": 1}}, "`request_options` must be arguments of .*, got top_q; what only"),
        ({"request_options": {"stream": True}}, "`request_options` must be arguments of .*, got stream; what only"),
        ({"price": (1,)}, r"`price` must be two numbers >= 0, got \(1,\)"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LLMJudge("tiny", base_url="http://localhost:1/v1", **options)


def test_a_cache_that_is_something_else(tmp_path):
    (tmp_path / "cache").write_text("these are no answers " * 100)
    with pytest.raises(ValueError, match="`cache` must be a file of judges' answers or a new one, got"):
        AnswerCache(tmp_path / "cache")


def test_without_openai(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"LLMJudge needs openai: pip install 'fs-psm-hf\[eval\]'"):
        LLMJudge("tiny", base_url="http://localhost:1/v1")
    assert openai  # the tests themselves have it


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("0.7", 0.7),
        (" 1 ", 1.0),
        ("1.0.", 1.0),
        ("Score: 0.35", 0.35),
        ("**0.4**", 0.4),
        (".5", 0.5),
        ("Similarity score: 0", 0.0),
        ("1.5", None),
        ("7", None),
        ("0.7 because both show a dog", None),
        ("0.7 or 0.8", None),
        ("70%", None),
        ("1%", None),
        ("1/10", None),
        ("-0.3", None),
        ("zero", None),
        ("", None),
        (None, None),
    ],
)
def test_only_a_number_is_an_answer(answer, score):
    assert parse_score(answer) == score
