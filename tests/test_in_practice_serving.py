"""`transformers serve` with a smoothed LLaVA and real HTTP requests; without FastAPI and uvicorn this file is skipped.

They are not among the requirements, and get an environment of their own:

    python -m venv serving && serving/bin/pip install -c constraints.txt -e '.[test]' 'transformers[serving]'
    serving/bin/python -m pytest tests/test_in_practice_serving.py
"""

import base64
import importlib.util
import io
import json
import socket
import time
import urllib.error
import urllib.request

import pytest


if any(importlib.util.find_spec(package) is None for package in ("fastapi", "uvicorn", "openai")):
    pytest.skip("transformers[serving] is not installed", allow_module_level=True)

from test_in_practice import embedded, passes
from transformers.cli.serve import Serve

from fs_psm_hf import SmoothedVisionTower
from fs_psm_hf.demo import demo_images
from fs_psm_hf.feature_cache import FeatureCache


def post(port, body):
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def wait_for(port, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).status
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.fixture
def served(tmp_path):
    host, processor = embedded()
    host.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = Serve(force_model=str(tmp_path), device="cpu", port=port, non_blocking=True)
    try:
        assert wait_for(port) == 200
        yield server, port, str(tmp_path)
    finally:
        server.kill_server()


def test_a_chat_with_an_image_over_http(served):
    server, port, name = served
    (loaded,) = server._model_manager.loaded_models.values()
    tower = loaded.model.model.vision_tower
    assert isinstance(tower, SmoothedVisionTower)
    assert (tower.sigma, tower.num_samples) == (0.1, 4)
    rows, stream = passes(tower), io.BytesIO()
    demo_images()[4].image.save(stream, "PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "describe this image in one sentence."},
    ]
    body = {"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 12}
    answer = post(port, body)
    assert answer["choices"][0]["message"]["content"].strip() == "a photo of a ship."
    assert sum(rows) == 4
    # The same image again is smoothed again, unless the tower may remember it.
    tower.feature_cache = FeatureCache()
    post(port, body)
    post(port, body)
    assert sum(rows) == 8
    assert (tower.feature_cache.hits, tower.feature_cache.misses) == (1, 1)
