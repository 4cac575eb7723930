"""Lists the exit codes of the commands, one for each cause.

Schedulers and scripts decide by them whether to start a command again. 0 means done. 1 means a bug
or a broken machine, with a traceback.
"""

BAD_INPUT = 2  # a mistake in the input, which was printed in one line
# Too many updates in a row were not finite and were skipped, or the last validation is not finite.
DIVERGED = 3
SLOW = 4  # launch.preflight found a device or a process that is much slower than the others
# Not all processes of the job arrived, or they do not see the devices that they should.
NOT_JOINED = 69  # EX_UNAVAILABLE of sysexits.h
UNREACHABLE = 74  # EX_IOERR: the object store of the run did not answer
INTERRUPTED = 75  # EX_TEMPFAIL: the state is saved, and the same command goes on
PEER_DIED = 76  # another process of the job ended early: the same command resumes
PEER_STUCK = 77  # another process of the job stopped making progress: the same command resumes

# 128 + the number of a signal that people and terminals send: SIGHUP, SIGINT, SIGQUIT and SIGTERM.
_SENT_BY_USERS = (129, 130, 131, 143)


def may_restart(code: int) -> bool:
    """Returns whether a job that ended with this code by itself may be started again.

    A bug, a broken machine or network, and a kill may be gone next time. A mistake in the
    input and a run that diverged would be the same again. INTERRUPTED is not among these codes:
    whoever stopped the job knows whether it is to go on.
    """
    is_killed = code > 128 and code not in _SENT_BY_USERS
    return is_killed or code in (1, NOT_JOINED, UNREACHABLE, PEER_DIED, PEER_STUCK)
