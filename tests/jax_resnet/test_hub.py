"""jax_resnet.hub against a server on this machine that answers as Hugging Face's does."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import time
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from jax_resnet import hub, resnet, weights

constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra hub")

CONFIG = resnet.resnet18(num_classes=3)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def files():
    """{repository/file: bytes}"""
    shapes = jax.eval_shape(lambda: resnet.init(CONFIG, jax.random.key(0)))
    arrays = weights.to_torch(*jax.tree.map(lambda spec: np.zeros(spec.shape, np.float16), shapes))
    first, second = dict(list(arrays.items())[:50]), dict(list(arrays.items())[50:])
    index = {"weight_map": {n: "1.safetensors" for n in first} | {n: "2.safetensors" for n in second}}
    return {
        "timm/small/model.safetensors": safetensors.numpy.save(arrays),
        "timm/small/config.json": b'{"architecture": "resnet18"}',
        "big/sharded/model.safetensors.index.json": json.dumps(index).encode(),
        "big/sharded/1.safetensors": safetensors.numpy.save(first),
        "big/sharded/2.safetensors": safetensors.numpy.save(second),
        "my/own/runs/best.bin": safetensors.numpy.save(arrays),
        "my/empty/README.md": b"nothing",
    }


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    """The running server; huggingface_hub asks it, and has an empty cache."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            repository, _, rest = self.path.lstrip("/").partition("/resolve/")
            name = f"{repository}/{rest.partition('/')[2]}"
            known = any(file.startswith(f"{repository}/") for file in files)
            self.send_response(200 if name in files else 404)
            if name not in files:
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            data = files.get(name, b"")
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            return data

        def do_GET(self):
            self.wfile.write(self.do_HEAD())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{served.server_port}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        for constant, value in {
            "ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "hub"), "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_DISABLE_XET": True, "HF_HUB_ETAG_TIMEOUT": 2,
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, constant, value)
        no_waiting = types.SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
        monkeypatch.setattr("huggingface_hub.utils._http.time", no_waiting)  # between attempts
        yield served
        served.shutdown()


def test_weights_are_downloaded_once(server, files):
    """The second read comes from the cache, without a network; float16 becomes float32."""
    for _ in range(2):
        file = weights.read_file("hf:timm/small")
        assert (file.path.name, file.settings) == ("model.safetensors", {"architecture": "resnet18"})
        params, _ = weights.load("hf:timm/small", CONFIG)
        assert params["fc"]["bias"].dtype == np.float32
        server.shutdown()
        server.server_close()


NAMES = {
    "in several files": ("hf:big/sharded", "model.safetensors.index.json"),
    "a file": ("hf:my/own/runs/best.bin", "best.bin"),
    "a revision": ("hf:timm/small@main", "model.safetensors"),
    "a pull request": ("hf:timm/small@refs/pr/1", "model.safetensors"),
}


@pytest.mark.parametrize(("name", "file"), NAMES.values(), ids=NAMES)
def test_names_on_the_hub(name, file, server):
    assert weights.read_file(name).path.name == file


MISTAKES = {
    "no name": ("hf:resnet50", "is not a name on the hub: expected hf:owner/name"),
    "no such repository": ("hf:no/body", "cannot be downloaded: "),
    "no weights": ("hf:my/empty", r"has none of model\.safetensors, .*: name a weight file, hf:owner/name/FILE"),
    "no such file": ("hf:timm/small/a.bin", r"has none of a\.bin"),
}


@pytest.mark.parametrize(("name", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(name, message, server):
    with pytest.raises(ValueError, match=f"^{name} {message}"):
        hub.fetch(name)


def test_without_a_network(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=r"^hf:timm/small is not in the cache, and http://127.* cannot be reached"):
        hub.fetch("hf:timm/small")
