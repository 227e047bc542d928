"""An endpoint on this machine that speaks OpenAI's protocol, over a real socket; what it answers is a function."""

import contextlib
import http.server
import json
import threading
import time


class Endpoint:
    """Answers chat requests with `reply(body) -> str`, or fails as the test wants.

    Args:
        reply (callable): from the request's body to the answer. It may raise `Failure`.
    """

    def __init__(self, reply):
        self.reply, self.requests, self.keys = reply, [], []
        endpoint, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.requests.append(body)
                    endpoint.keys.append(self.headers["Authorization"])
                if self.path != "/v1/chat/completions":
                    return self.send(404, {"error": {"message": "no such path"}})
                try:
                    text = endpoint.reply(body)
                except Failure as failure:
                    time.sleep(failure.delay)
                    return self.send(failure.status, failure.body)
                message = {"role": "assistant", "content": text}
                return self.send(
                    200,
                    {
                        "id": "1",
                        "object": "chat.completion",
                        "created": 0,
                        "model": body["model"],
                        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                        "usage": {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102},
                    },
                )

            def send(self, status, body):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client may have given up
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.send_header("retry-after-ms", "10")
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args):
                """Nothing is logged."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.stop()

    def stop(self):
        """Go down; the port refuses connections from here on."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Failure(Exception):
    """What `reply` raises for an answer with another status."""

    def __init__(self, status, body=None, delay=0):
        self.status, self.body, self.delay = status, body or {"error": {"message": f"failed with {status}"}}, delay
