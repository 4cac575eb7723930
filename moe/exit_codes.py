"""Lists the exit codes of the commands, one for each cause.

Schedulers and scripts decide by them whether to start a command again. 0 means done. 1 means a bug
or a broken machine, with a traceback.
"""

BAD_INPUT = 2  # told in one line
# Too many updates in a row were not finite and were skipped, or the last validation is not finite.
DIVERGED = 3
# Not all processes of the job arrived, or they do not see the devices that they should.
NOT_JOINED = 69  # EX_UNAVAILABLE of sysexits.h
INTERRUPTED = 75  # EX_TEMPFAIL: the state is saved, and the same command goes on
PEER_DIED = 76  # another process of the job ended early: the same command resumes
PEER_STUCK = 77  # another process of the job stopped making progress: the same command resumes
