"""Decides, on process 0, whether a process of the job has died, ended or is stuck.

The hub knows what the other processes say over one connection each. `moe.parallel.watch` starts it,
and explains the whole. It imports no JAX.
"""

import contextlib
import dataclasses
import hmac
import json
import secrets
import selectors
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from moe.exit_codes import BAD_INPUT, DIVERGED, INTERRUPTED, NOT_JOINED, PEER_DIED, PEER_STUCK, SLOW
from moe.parallel.cluster import process_name
from moe.parallel.rendezvous import open_server

# In "training" the host works on a step, in "scoring" on a batch of an evaluation, and in "waiting"
# it waits for the devices of either. The first step is "compiling" until it is done. Most of an
# evaluation's first batch may be a compilation too, so it is still "evaluating", and so is what
# follows the last batch.
Phase = Literal[
    "starting", "preparing", "compiling", "training", "waiting", "evaluating", "scoring", "saving"
]
IN_STEP = ("training", "scoring", "waiting")

TICK = 1.0  # seconds between two messages of a process that has nothing else to say
_JUDGE = 0.1  # seconds between two judgements
PAUSE = 5.0  # a process that has said nothing for so many seconds does not run
_GRACE = 2.0  # seconds in which the others may come to the same end as one that failed
_FAREWELL = 2.0  # seconds that the hub gives the others to leave before its own process does
_TIMES_SECONDS = 1.0  # how long process 0 waits for the times of a step that all have logged
_MESSAGE_BYTES = 1 << 16  # a message is far shorter
_STEPS = 10  # a step, or a batch, may take so many times the median of the latest ones

# All processes reach these ends together, at their own pace.
COMMON_ENDS = (0, DIVERGED, SLOW, INTERRUPTED)
# If one process ends with one of these, to start the job again would not help, so all say it.
_SHARED_CODES = (BAD_INPUT, NOT_JOINED)


class Place(NamedTuple):
    """Says what a process does: its phase, its step, and its batch in an evaluation, or 0."""

    phase: Phase
    step: int = 0
    batch: int = 0

    @property
    def name(self) -> str:
        return f"batch {self.batch} of an evaluation" if self.batch else f"step {self.step}"


class HostTimes(NamedTuple):
    """Holds how long the steps up to a logged one took on each process, in seconds a step."""

    step: int
    step_seconds: list[float]
    host_seconds: list[float]  # the part in which the host worked and did not wait for devices


class Verdict(NamedTuple):
    """Says why the processes that are left must end."""

    code: int
    text: str
    process_id: int  # the process that failed first
    speaker: int  # the process that shows the last lines of the one that failed


@dataclasses.dataclass
class Peer:
    """Holds what the hub knows about one process."""

    process_id: int
    host: str
    heard: float  # when its last message came
    since: float  # when it began its step or batch, or what it does between them
    place: Place
    is_connected: bool = True
    exit_code: int | None = None  # is set by its goodbye
    ended: float = 0.0  # when it said goodbye


class Connection:
    """Sends and receives messages, each of them a line of JSON, and never waits."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        _find_dead_hosts(connection)
        self.socket, self.is_open = connection, True
        self._received, self._lock = b"", threading.Lock()

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, **message: Any) -> None:
        """Sends a message. The other end counts as gone if it has not read for hours."""
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            try:
                self.is_open &= self.socket.send(data) == len(data)
            except OSError:
                self.is_open = False

    def receive(self) -> list[dict[str, Any]]:
        """Returns the messages that have come. Raises ValueError for any other bytes.

        It raises RecursionError for JSON that is nested too deeply.
        """
        try:
            while data := self.socket.recv(1 << 16):
                self._received += data
            self.is_open = False
        except BlockingIOError:
            pass
        except OSError:  # its process was killed, or its host does not answer
            self.is_open = False
        *lines, self._received = self._received.split(b"\n")
        if len(self._received) > _MESSAGE_BYTES:
            raise ValueError("a line that does not end")
        return [json.loads(line) for line in lines]


def _find_dead_hosts(connection: socket.socket) -> None:
    """Makes the system close the connection once the other host has been silent for 10 seconds."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 4),  # seconds, as the next one
        ("TCP_KEEPINTVL", 2),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 10_000),  # milliseconds until sent data must be acknowledged
    ):
        if hasattr(socket, name):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Hub:
    """Listens to all processes of a job, and tells them when one has failed.

    `end` ends this process, once the others have had the time to read the verdict.
    """

    def __init__(
        self, host: str, num_processes: int, stuck_seconds: float, end: Callable[[Verdict], None]
    ):
        self._server = open_server(host, port=0, backlog=4096)
        token = secrets.token_hex(16)
        # The token keeps out whatever else connects by mistake. It is no secret to somebody who can
        # reach JAX's own port, which has no authentication.
        self.address = json.dumps(
            [host, self._server.getsockname()[1], token, socket.gethostname()]
        )
        self.all_said_goodbye = threading.Event()
        self._token, self._end = token, end
        self._judge = Judge(num_processes, stuck_seconds)
        self._times: dict[int, dict[int, tuple[float, float]]] = {}
        self._complete: deque[HostTimes] = deque()
        self._connections: dict[int, Connection] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        threading.Thread(target=self._run, name="hub", daemon=True).start()

    def take_times(self, last: int) -> list[HostTimes]:
        """Returns the times that have come from every process since the last call.

        It waits up to a second for those of the step `last`, if there is one.
        """
        deadline = time.monotonic() + _TIMES_SECONDS
        while last and not (self._complete and self._complete[-1].step >= last):
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
        return [self._complete.popleft() for _ in range(len(self._complete))]

    def _run(self) -> None:
        """Reads messages and judges by them until a process has failed."""
        judge, ticked, judged = self._judge, time.monotonic(), 0.0
        while True:
            self._read_all(_JUDGE)
            now = time.monotonic()
            if now - judged < _JUDGE:  # messages of a thousand processes come one by one
                continue
            judged = now
            if verdict := judge.decide(now):
                break
            if now - ticked >= TICK:
                ticked, limit = now, judge.limit(now)
                for connection in self._connections.values():
                    connection.send(limit=limit, place=judge.place_name(0))
        told, deadline = {0}, time.monotonic() + _FAREWELL
        while time.monotonic() < deadline and judge.others_are_left():
            for number in self._connections.keys() - told:  # some connect only now
                self._connections[number].send(verdict=verdict)
                told.add(number)
            self._read_all(0.05)
        self._end(verdict)

    def _read_all(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._server:
                with contextlib.suppress(OSError):  # the other end has left already
                    connection = Connection(self._server.accept()[0])
                    self._selector.register(connection, selectors.EVENT_READ)
            else:
                self._read(key.fileobj, key.data)
        if self._judge.all_said_goodbye():
            self.all_said_goodbye.set()

    def _read(self, connection: Any, number: int | None) -> None:
        """Takes the messages of one connection, the first of which says which process it is."""
        now = time.monotonic()
        try:
            for message in connection.receive():
                if number is None:
                    number = self._greet(connection, message, now)
                elif "times" in message:
                    self._add_times(number, *message["times"])
                else:
                    self._judge.hear(number, message, now)
        except (ValueError, KeyError, TypeError, RecursionError):  # not one of ours
            connection.is_open = False
        if not connection.is_open:
            self._selector.unregister(connection)
            connection.socket.close()
            if number is not None:
                del self._connections[number]
                self._judge.lose(number)

    def _greet(self, connection: Connection, message: dict[str, Any], now: float) -> int:
        if not hmac.compare_digest(message["token"], self._token):
            raise ValueError("the token is wrong")
        number = int(message["process_id"])
        self._connections[number] = connection
        self._selector.modify(connection, selectors.EVENT_READ, number)
        self._judge.meet(number, str(message["host"]), now)
        return number

    def _add_times(self, number: int, step: int, step_seconds: float, host_seconds: float) -> None:
        """Notes a process's times of a step, and completes the step with those of the last one."""
        times = self._times.setdefault(step, {})
        times[number] = step_seconds, host_seconds
        if len(times) == self._judge.num_processes:
            seconds = [times[number] for number in sorted(times)]
            self._complete.append(HostTimes(step, *map(list, zip(*seconds, strict=True))))
            del self._times[step]


class Judge:
    """Keeps what the hub has heard from each process, and decides whether one has failed."""

    def __init__(self, num_processes: int, stuck_seconds: float):
        self.num_processes, self._stuck_seconds = num_processes, stuck_seconds
        self._peers: dict[int, Peer] = {}
        self._order: Verdict | None = None  # a process asks all to end
        # Until this time some process did something else than a step.
        self._busy_until = self._decided = 0.0
        # How long the latest steps took, and the latest batches of evaluations.
        self._steps: deque[float] = deque(maxlen=64)
        self._batches: deque[float] = deque(maxlen=64)

    def meet(self, number: int, host: str, now: float) -> None:
        """Takes in a process that has connected."""
        self._peers[number] = Peer(number, host, now, now, Place("starting"))

    def hear(self, number: int, message: dict[str, Any], now: float) -> None:
        """Takes in a message of a process: what it does now, or its goodbye."""
        peer = self._peers[number]
        peer.heard = now
        if "exit_code" in message:
            peer.exit_code, peer.ended = int(message["exit_code"]), now
            if reason := message["reason"]:
                text = f"{self._name(peer)} {reason}"
                self._order = self._verdict(peer.exit_code, text, peer)
            return
        place = Place(message["phase"], int(message["step"]), int(message["batch"]))
        self._note_duration(peer.place, place, now - peer.since)
        is_same = place[1:] == peer.place[1:]
        if not is_same or (place.phase in IN_STEP) != (peer.place.phase in IN_STEP):
            peer.since = now
        peer.place = place

    def _note_duration(self, before: Place, place: Place, seconds: float) -> None:
        """Notes how long a step or a batch took, if a process has come to a later one."""
        if place.phase not in IN_STEP:
            return
        if before.batch and before.step == place.step and place.batch > before.batch:
            self._batches.append(seconds / (place.batch - before.batch))
        is_step = before.phase in (*IN_STEP, "compiling") and not before.batch
        if is_step and place.step > before.step:
            self._steps.append(seconds / (place.step - before.step))

    def lose(self, number: int) -> None:
        """Notes that the connection of a process is closed."""
        self._peers[number].is_connected = False

    def place_name(self, number: int) -> str:
        """Returns the name of the step or batch that a process is in."""
        return self._peers[number].place.name if number in self._peers else ""

    def all_said_goodbye(self) -> bool:
        return all(
            number in self._peers and self._peers[number].exit_code is not None
            for number in range(1, self.num_processes)
        )

    def others_are_left(self) -> bool:
        """Returns whether another process is connected, or has still to connect."""
        return any(
            number not in self._peers or self._peers[number].is_connected
            for number in range(1, self.num_processes)
        )

    def limit(self, now: float) -> float | None:
        """Returns how long a step or a batch may take, whichever of them the processes are in.

        It is None while any process does something else.
        """
        places = [peer.place for peer in self._peers.values() if peer.exit_code is None]
        if len(self._peers) < self.num_processes or not places:
            return None
        if any(place.phase not in IN_STEP for place in places):
            return None
        kinds = [self._batches if place.batch else self._steps for place in places]
        if not all(kinds):
            return None
        return max(self._stuck_seconds, *(_STEPS * statistics.median(kind) for kind in kinds))

    def decide(self, now: float) -> Verdict | None:
        """Returns the verdict if a process has failed by the time `now`."""
        limit = self.limit(now)
        # After a pause of the hub's own process its clocks say nothing about the others.
        if limit is None or now - self._decided > PAUSE:
            self._busy_until = now
        self._decided = now
        if self._order:
            return self._order
        peers = [self._peers[number] for number in sorted(self._peers)]
        for peer in peers:
            if peer.exit_code is None and not peer.is_connected:
                return self._verdict(PEER_DIED, f"{self._name(peer)} died", peer)
        for peer in peers:
            if peer.exit_code not in (None, *COMMON_ENDS) and now - peer.ended > _GRACE:
                return self._ended(peer)
        return None if limit is None else self._find_stuck(peers, now, limit)

    def _find_stuck(self, peers: list[Peer], now: float, limit: float) -> Verdict | None:
        """Returns the verdict if a process is in its step or batch for longer than `limit`.

        The others wait for that process in the same one, or in the next one, and may be over the
        limit too. A process that does not run, or whose host still works, is the first suspect.
        """
        staying = [peer for peer in peers if peer.exit_code is None]
        late = [peer for peer in staying if now - max(peer.since, self._busy_until) > limit]
        if not late:
            return None
        if len(staying) < len(peers):  # they wait for one that has left
            return self._ended(next(peer for peer in peers if peer.exit_code is not None))
        runs = lambda peer: now - peer.heard < min(PAUSE, limit / 2)
        waits = lambda peer: peer.place.phase == "waiting"
        peer = min(late, key=lambda peer: (runs(peer), waits(peer), peer.place[1:]))
        text = f"{self._name(peer)} is stuck in {peer.place.name}"
        if not runs(peer):
            text += ", and does not run"
        elif waits(peer):
            text += ", in which all processes wait for their devices"
        return self._verdict(PEER_STUCK, text, peer)

    def _ended(self, peer: Peer) -> Verdict:
        assert peer.exit_code is not None
        code = peer.exit_code if peer.exit_code in _SHARED_CODES else PEER_DIED
        return self._verdict(
            code, f"{self._name(peer)} ended with exit code {peer.exit_code}", peer
        )

    def _verdict(self, code: int, text: str, failed: Peer) -> Verdict:
        survivors = [
            peer.process_id
            for peer in self._peers.values()
            if peer is not failed and peer.exit_code is None and peer.is_connected
        ]
        if 0 not in self._peers:  # it has the hub, and is there before it connects
            survivors.append(0)
        return Verdict(code, text, failed.process_id, min(survivors, default=failed.process_id))

    def _name(self, peer: Peer) -> str:
        return process_name(peer.process_id, self.num_processes, peer.host)
