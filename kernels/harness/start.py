"""What a program does before torch is imported: a look at --data, threads that soon sleep, a quiet Ctrl-C.

    if __name__ == "__main__":
        import kernels.harness.start

Imported for its effect, and only by what runs as a program: who imports a script keeps their own environment.
"""
import os
import signal
import sys
from pathlib import Path

from .sources import problem

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # OpenMP reads both when torch loads it: threads that
os.environ.setdefault("GOMP_SPINCOUNT", "1000")          # wait would keep other programs from working
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")       # numpy's: for linear probes two threads take 2 to 20
                                                         # times as long as one, where all cores are busy 100
signal.signal(signal.SIGINT, signal.SIG_DFL)             # while packages load: no traceback

names = []                                               # given twice, the last one counts
for word, following in zip(sys.argv, [*sys.argv[1:], ""]):
    option, equals, value = word.partition("=")
    if option == "--data":
        names.append(value if equals else following)
wrong = problem(names[-1]) if names and names[-1] else None
if wrong and os.environ.get("RANK", "0") == "0":         # now: packages take seconds to load
    print(f"{Path(sys.argv[0]).name}: {' '.join(wrong.split())}", file=sys.stderr)
    sys.exit(2)
