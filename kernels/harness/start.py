"""What a program does before torch is imported: threads that wait soon sleep, and Ctrl-C is quiet.

    if __name__ == "__main__":
        import kernels.harness.start

Imported for its effect, and only by what runs as a program: who imports a script keeps their own environment.
"""
import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # OpenMP reads both when torch loads it: threads that
os.environ.setdefault("GOMP_SPINCOUNT", "1000")          # wait would keep other programs from working
signal.signal(signal.SIGINT, signal.SIG_DFL)             # while packages load: no traceback
