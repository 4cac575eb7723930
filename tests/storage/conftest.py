"""Starts an emulator of Google Cloud Storage, on this machine, for the tests that ask for it."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

EMULATOR = """
import sys
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket-one")
server.start()
print(server._api._httpd.server_address[1], flush=True)
sys.stdin.read()  # until the tests close it
server.stop()
"""
# Orbax's arrays are written by TensorStore, and all else by gcsfs.
VARIABLES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """Yields the address of an empty bucket, which this process and those it starts can use."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    process = subprocess.Popen(
        [sys.executable, "-c", EMULATOR],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout
        address = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        with pytest.MonkeyPatch.context() as patch:
            for name in VARIABLES:
                patch.setenv(name, address)
            # gcsfs would ask for credentials, and wait for a machine of Google Cloud to give them.
            patch.setenv("NO_GCE_CHECK", "true")
            yield "gs://bucket-one"
        process.communicate()


@pytest.fixture
def workdir(bucket: str, request: pytest.FixtureRequest) -> str:
    """Returns the address of a directory that no other test uses."""
    return f"{bucket}/{os.getpid()}/{request.node.name.replace('[', '-').replace(']', '')}"
