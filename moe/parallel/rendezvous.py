"""Waits until every process of a job has come, and names those that have not. Imports no JAX.

JAX itself ends such a job by an abort that names nobody. So process 0 first listens at the
coordinator's address itself, and each process says there who it is. JAX starts at this address once
all have come.
"""

import contextlib
import errno
import json
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from moe.parallel.cluster import Cluster, process_name

_RETRY_SECONDS = 0.2
_ANNOUNCE_SECONDS = 20.0
_BIND_SECONDS = 10.0  # a process of an earlier attempt may still be ending
_GRACE_SECONDS = 30.0  # for an answer after process 0 stopped waiting
_ANSWER_SECONDS = 5.0  # for one process to take the answer
_MESSAGE_BYTES = 2**16


class NotJoined(RuntimeError):
    """Says that not all processes of the job have come, or that they do not fit together."""


class Arrival(NamedTuple):
    """What each process tells process 0."""

    process_id: int
    num_processes: int
    host: str
    gpus: tuple[str, ...]  # the unique identifiers of the GPUs that the process sees

    @property
    def name(self) -> str:
        """Returns the process's name in messages, such as "process 3 of 8 on node-1"."""
        return process_name(self.process_id, self.num_processes, self.host)


def meet(cluster: Cluster, gpus: Sequence[str], timeout_s: float) -> list[Arrival]:
    """Waits for all processes of the job, and returns them in the order of their numbers.

    Raises NotJoined, with one text in all the processes that came, which names those that did not
    come within `timeout_s`, or that do not belong to this job.
    """
    own = Arrival(cluster.process_id, cluster.num_processes, socket.gethostname(), tuple(gpus))
    if cluster.process_id == 0:
        return _receive(cluster, own, timeout_s)
    return _visit(cluster, own, timeout_s)


def listed(numbers: Sequence[int]) -> str:
    """Returns numbers of processes as a message lists them: the first eight, and how many more."""
    shown = ", ".join(map(str, numbers[:8]))
    rest = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"process{'es' if len(numbers) > 1 else ''} {shown}{rest}"


def bind_host(host: str) -> str:
    """Returns where process 0 listens if the others reach it at `host`.

    That is only the host's own address if they are all on this host, and otherwise "", which stands
    for all of its addresses.
    """
    return host if host == "localhost" or host.startswith("127.") else ""


def open_server(host: str, port: int, backlog: int) -> socket.socket:
    """Returns a socket that listens where others reach this process as `host`.

    It is for IPv6 and IPv4 where this machine has both. Port 0 is one that the system chooses.
    """
    bound = bind_host(host)
    both = not bound and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server((bound, port), family=family, backlog=backlog, dualstack_ipv6=both)


class _Visitor:
    """A connection to process 0, with what has been read from it."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.text = b""
        self.arrival: Arrival | None = None


def _receive(cluster: Cluster, own: Arrival, timeout_s: float) -> list[Arrival]:
    """Waits in process 0 until all have come or the time is over, and tells all the result."""
    begin = announced = time.monotonic()
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        listener = stack.enter_context(_listen(cluster))
        selector.register(listener, selectors.EVENT_READ)
        answer = None
        while answer is None:
            for key, _ in selector.select(_RETRY_SECONDS):
                if key.data is None:
                    _admit(selector, listener)
                else:
                    _read(selector, key.data)
            visitors = [key.data for key in list(selector.get_map().values()) if key.data]
            arrivals = [own, *(v.arrival for v in visitors if v.arrival)]
            now = time.monotonic()
            answer = _answer(arrivals, timeout_s if now - begin > timeout_s else None)
            if answer is None and now - announced > _ANNOUNCE_SECONDS:
                announced = now
                print(f"waiting for {_missing(arrivals)}", file=sys.stderr, flush=True)
        for visitor in visitors:
            with contextlib.suppress(OSError):  # it ended in this moment
                visitor.connection.settimeout(_ANSWER_SECONDS)
                visitor.connection.sendall(f"{json.dumps(answer)}\n".encode())
            visitor.connection.close()
    return _unpack(answer)


def _listen(cluster: Cluster) -> socket.socket:
    """Returns a socket at the coordinator's port. Raises NotJoined if another program holds it."""
    host, _, port = cluster.coordinator.rpartition(":")
    deadline = time.monotonic() + _BIND_SECONDS
    while True:
        try:
            listener = open_server(host, int(port), backlog=1024)
            listener.setblocking(False)
            return listener
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise NotJoined(
                    f"process 0 cannot listen at port {port} of {socket.gethostname()} "
                    f"({error.strerror}): set --coordinator_address to another port"
                ) from None
            time.sleep(_RETRY_SECONDS)


def _admit(selector: selectors.BaseSelector, listener: socket.socket) -> None:
    try:
        connection, _ = listener.accept()
    except OSError:  # the other side has left already
        return
    connection.setblocking(False)
    selector.register(connection, selectors.EVENT_READ, _Visitor(connection))


def _read(selector: selectors.BaseSelector, visitor: _Visitor) -> None:
    """Reads what a visitor says, and drops one that has left or says something else."""
    try:
        text = visitor.connection.recv(_MESSAGE_BYTES)
    except BlockingIOError:
        return
    except OSError:
        text = b""
    visitor.text += text
    if visitor.text.endswith(b"\n") and visitor.arrival is None:
        visitor.arrival = _parse_arrival(visitor.text)
    elif text and visitor.arrival is None and len(visitor.text) < _MESSAGE_BYTES:
        return  # the rest comes later
    if not text or visitor.arrival is None:
        selector.unregister(visitor.connection)
        visitor.connection.close()


def _parse_arrival(text: bytes) -> Arrival | None:
    """Returns what a process says of itself, or None if another program speaks."""
    try:
        process_id, num_processes, host, gpus = json.loads(text)
        return Arrival(int(process_id), int(num_processes), str(host), tuple(map(str, gpus)))
    except (ValueError, TypeError, RecursionError):
        return None


def _answer(arrivals: Sequence[Arrival], overdue_s: float | None) -> dict | None:
    """Returns what to tell the processes that have come, or None to go on waiting.

    `overdue_s` is the time that they have waited, once it is over.
    """
    own, by_id = arrivals[0], {}
    for arrival in arrivals:
        if arrival.num_processes != own.num_processes:
            return {"refused": f"{arrival.name} does not belong to the job of {own.name}"}
        if not 0 <= arrival.process_id < own.num_processes:
            return {"refused": f"{arrival.name} has a number that does not exist"}
        if arrival.process_id in by_id:
            other = by_id[arrival.process_id]
            return {
                "refused": f"{arrival.name} has come twice, from {other.host} and {arrival.host}: "
                "give each process its own process_id"
            }
        by_id[arrival.process_id] = arrival
    if len(by_id) == own.num_processes:
        return {"arrivals": [by_id[process_id] for process_id in range(len(by_id))]}
    if overdue_s is None:
        return None
    return {
        "refused": f"{_missing(arrivals)} did not reach process 0 on {own.host} within "
        f"{overdue_s:g} s: look at their own output"
    }


def _missing(arrivals: Sequence[Arrival]) -> str:
    total, present = arrivals[0].num_processes, {arrival.process_id for arrival in arrivals}
    return f"{listed([n for n in range(total) if n not in present])} of {total}"


def _visit(cluster: Cluster, own: Arrival, timeout_s: float) -> list[Arrival]:
    """Tells process 0 who this process is, and waits for the result."""
    host, _, port = cluster.coordinator.rpartition(":")
    begin = time.monotonic()
    while True:
        reason = "it ended"
        try:
            address = (host.strip("[]"), int(port))
            with socket.create_connection(address, timeout=_GRACE_SECONDS) as connection:
                connection.sendall(f"{json.dumps(own)}\n".encode())
                connection.settimeout(timeout_s + _GRACE_SECONDS)
                with connection.makefile(errors="replace") as file:
                    text = file.readline()
            if text.startswith("{"):
                return _unpack(json.loads(text))
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() - begin > timeout_s:
            raise NotJoined(
                f"process 0 of {cluster.num_processes} was not at {cluster.coordinator} within "
                f"{timeout_s:g} s ({reason}): look at its own output"
            )
        time.sleep(_RETRY_SECONDS)


def _unpack(answer: dict) -> list[Arrival]:
    """Returns all arrivals. Raises NotJoined if process 0 refused."""
    if "refused" in answer:
        raise NotJoined(answer["refused"])
    return [
        Arrival(process_id, num_processes, host, tuple(gpus))
        for process_id, num_processes, host, gpus in answer["arrivals"]
    ]
