"""Tests that text is read from Google Cloud Storage and S3, against emulators on this machine."""

import json
import os
import re
import subprocess
import sys
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
# Says at which port it listens.
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
LINES = "".join(json.dumps({"text": f"document {i} é", "n": i}) + "\n" for i in range(300))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Yields the address of an empty bucket of moto's server."""
    pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with (
        subprocess.Popen([sys.executable, "-c", SERVER], text=True, **pipes) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.stdout.readline().strip()}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        s3fs.S3FileSystem().mkdir("bucket-one")
        yield "s3://bucket-one"
        server.kill()


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
