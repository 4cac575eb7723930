"""Tests that text is read from Google Cloud Storage and S3, against emulators on this machine."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from moe.config import ConfigError, DataConfig
from moe.data.sources import check_dataset, open_documents, source_name
from tests.storage.conftest import bucket  # noqa: F401  # a fixture

pytestmark = [
    pytest.mark.slow,
    # The clients leave the sessions of their threads open when Python ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
LINES = "".join(json.dumps({"text": f"document {i} é", "n": i}) + "\n" for i in range(300))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Yields the address of an empty bucket of moto's server."""
    pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        _wait_for(address, server)
        s3fs.S3FileSystem().mkdir("bucket-one")
        yield "s3://bucket-one"
        server.kill()


def _wait_for(address: str, server: subprocess.Popen) -> None:
    """Waits until the server answers. It may take long to import its modules."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/moto-api/", timeout=60).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail("moto's server has ended")


@pytest.fixture(params=["gs", "s3"])
def store(request: pytest.FixtureRequest) -> str:
    """Returns the address of a directory that no other test uses."""
    address = request.getfixturevalue({"gs": "bucket", "s3": "s3"}[request.param])
    name = re.sub(r"\W", "-", request.node.name)
    return f"{address}/{os.getpid()}/{name}"


def write(address: str, content: str | bytes) -> None:
    import fsspec

    file_system, path = fsspec.core.url_to_fs(address)
    file_system.pipe_file(path, content.encode() if isinstance(content, str) else content)


def config_for(path: str, directory: object) -> DataConfig:
    return DataConfig(dataset=f"text:{path}", directory=str(directory))


def test_text_is_read_from_a_store(store: str, tmp_path: object):
    write(f"{store}/a.jsonl", LINES)
    write(f"{store}/deep/b.txt", "plain")
    write(f"{store}/image.png", "x")
    config = config_for(store, tmp_path)
    check_dataset(config)
    train, validation = (open_documents(config, split) for split in ("train", "validation"))
    documents = [*train.between(0, 999), *validation.between(0, 999)]
    assert len(documents) == 301 and 0 < len(validation) < 60
    assert {document.origin for document in documents} == {
        "deep/b.txt",
        *(f"a.jsonl:{i}" for i in range(1, 301)),
    }
    for path in (f"{store}/a.jsonl", f"{store}/*.jsonl"):
        some = config_for(path, tmp_path)
        assert sum(len(open_documents(some, s)) for s in ("train", "validation")) == 300


def test_a_changed_object_has_another_name(store: str, tmp_path: object):
    write(f"{store}/a.jsonl", LINES)
    config = config_for(store, tmp_path)
    name = source_name(config)
    assert source_name(config) == name
    write(f"{store}/a.jsonl", LINES.replace("document", "DOCUMENT"))
    assert source_name(config) != name


def test_a_bad_line_of_an_object_is_told_with_its_address(store: str, tmp_path: object):
    write(f"{store}/a.jsonl", LINES + "{\n")
    with pytest.raises(ConfigError, match=rf"^{store}/a.jsonl:301 is not JSON \("):
        open_documents(config_for(store, tmp_path), "train")


def test_a_missing_path_of_a_store_is_refused(store: str, tmp_path: object):
    for path in (f"{store}/none", f"{store}/none/*.txt", re.sub("bucket-one", "none-such", store)):
        with pytest.raises(ConfigError, match=rf"{re.escape(path)}.*(does not exist|cannot be re)"):
            check_dataset(config_for(path, tmp_path))
