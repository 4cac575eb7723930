"""Starts an emulator of Google Cloud Storage, on this machine, for the tests that ask for it."""

import contextlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest

# Google says the generation of what it sends, and writes only over the generation that a client
# names. TensorStore and our leases need both, and the emulator alone does neither.
EMULATOR = """
import sys
import threading
import urllib.request
from http import HTTPStatus
from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound

def find_generation(request, storage):
    name = request.params.get("object_id") or request.query.get("name", [""])[0]
    if request.query.get("uploadType") == ["multipart"]:
        name = name or request.data["meta"]["name"]
    try:
        return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
    except NotFound:
        return "0"

# The emulator's dictionaries do not bear two threads: one that writes while another one turns them
# into JSON ends in an error, and the client then repeats an upload that the emulator has forgotten.
# A client that stops while it sends must not keep the others waiting, so its data are read before.
one_at_a_time = threading.Lock()

def with_generations(handler):
    def handle(request, response, storage, *arguments, **options):
        request.data
        with one_at_a_time:
            answer(request, response, storage, *arguments, **options)

    def answer(request, response, storage, *arguments, **options):
        if "bucket_name" in (request.params or {}):
            generation = find_generation(request, storage)
            if request.query.get("ifGenerationMatch", [generation])[0] != generation:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
            response["X-Goog-Generation"] = generation
        handler(request, response, storage, *arguments, **options)
    return handle

server.HANDLERS = tuple(
    (regex, {method: with_generations(handler) for method, handler in handlers.items()})
    for regex, handlers in server.HANDLERS
)
# With one thread, a client that is connected and silent would keep all others waiting.
server.server.HTTPServer = server.server.ThreadingHTTPServer
emulator = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket-one")
emulator.start()
print(emulator._api._httpd.server_address[1], flush=True)
sys.stdin.read()  # until the tests close it
emulator.stop()
"""
# Orbax's arrays are written by TensorStore, and all else by gcsfs.
VARIABLES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")


class Emulator:
    """Is a running emulator, whose one bucket is bucket-one."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", EMULATOR],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout
        self.address = f"http://127.0.0.1:{self.process.stdout.readline().strip()}"

    def names(self) -> bytes:
        """Returns an answer that has the names of all objects."""
        with urllib.request.urlopen(f"{self.address}/storage/v1/b/bucket-one/o") as answer:
            return answer.read()


@contextlib.contextmanager
def running_emulator() -> Iterator[tuple[Emulator, pytest.MonkeyPatch]]:
    """Yields an emulator, and what patches this process while it runs."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    emulator = Emulator()
    with emulator.process:
        with pytest.MonkeyPatch.context() as patch:
            # gcsfs would ask for credentials, and wait for a machine of Google Cloud to give them.
            patch.setenv("NO_GCE_CHECK", "true")
            yield emulator, patch
        emulator.process.communicate()


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """Yields an emulator that a test may stop."""
    with running_emulator() as (emulator, _):
        yield emulator


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """Yields the address of an empty bucket, which this process and those it starts can use."""
    with running_emulator() as (emulator, patch):
        for name in VARIABLES:
            patch.setenv(name, emulator.address)
        yield "gs://bucket-one"


@pytest.fixture
def workdir(bucket: str, request: pytest.FixtureRequest) -> str:
    """Returns the address of a directory that no other test uses."""
    return f"{bucket}/{os.getpid()}/{request.node.name.replace('[', '-').replace(']', '')}"
