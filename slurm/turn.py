"""A job without Slurm until its turn comes: it waits for those before it and for a place, then this process becomes its keeper.

Many may wait for long, so nothing is imported here but a little of Python's own. Places are files that the jobs lock.
"""

import fcntl
import os
import signal
import sys
import time

POLL_S = 0.2
GPUS = "PATCHMILL_GPUS"  # of a place, for the job's script


def take(places: str, count: int) -> int | None:
    """Lock the first of ``count`` places that is free, for as long as this process lives, whatever it becomes."""
    for number in range(count):
        place = os.open(f"{places}-{number}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(place)
            continue
        os.set_inheritable(place, True)
        return number
    return None


def main(turn: str, before: str, places: str, gpus: str, *command: str) -> None:
    """Become ``command``. ``turn``: the descriptor of this job's lock, which the next one waits for as this one for ``before``.

    ``gpus``: those of each place, with spaces between the places.
    """
    forwarded = signal.pthread_sigmask(signal.SIG_SETMASK, ())  # they end what waits
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):  # what started it may ignore them
        signal.signal(number, signal.SIG_DFL)
    if before:
        with open(before) as other:
            fcntl.flock(other, fcntl.LOCK_SH)
    choices = gpus.split(" ")
    while (place := take(places, len(choices))) is None:
        time.sleep(POLL_S)
    signal.pthread_sigmask(signal.SIG_SETMASK, forwarded)
    os.close(int(turn))
    os.environ[GPUS] = choices[place]
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
