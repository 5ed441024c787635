"""VICReg and IConE, whole, without what prevents collapse, and with each choice made otherwise: a table.

    python tests/experiments/ablations.py --jobs 2                       # half an hour on 2 cores; goes on where it stopped

Runs the scripts as a user does, on the CPU, one thread a run, `jobs` at a time, into runs/ablations.
"""
import argparse
from collections import Counter

from common import make, of, options_of_all, run, spread

RUNS = {  # script and its options: seeds
    "vicreg.py": 3, "vicreg.py --variance 0": 3, "vicreg.py --covariance 0": 3,
    "icone.py": 3, "icone.py --weight 0": 3,
    **{f"icone.py {choice}": 1 for choice in (
        "--window 0", "--table-init encoder", "--window 0 --table-init encoder", "--table-init normal", "--bank 256",
        "--temperature 0.1", "--temperature 0.5", "--diversity relu2", "--projector 128",
        "--centre 0", "--table-lr 0.1")}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args = options_of_all(parser, "ablations")
    jobs = {}
    for name, seeds in RUNS.items():
        for seed in range(seeds):
            script, *options = name.split()
            jobs[name, seed] = (args.out / f"{name} {seed}").resolve(), script, [*options, "--seed", str(seed)]
    reports = make(jobs, lambda job: run(*job), args)
    print(f"| run | seeds | k-NN | linear | raw std of z | RankMe of z | verdict |\n{'|---' * 7}|")
    for row in ("raw pixels", "random encoder"):
        if probes := [report["probes"][row] for report in of(reports, "vicreg.py")]:
            cells = [spread([probe[column] for probe in probes]) for column in ("k-NN", "linear")]
            print(f"| {row} | {len(probes)} | {' | '.join(cells)} | | | |")
    for name in RUNS:
        if not (own := of(reports, name)):
            continue
        cells = [spread([report["probes"]["trained encoder"][column] for report in own]) for column in ("k-NN", "linear")]
        cells += [spread([report["panels"]["projector z"][column] for report in own], decimals)
                  for column, decimals in (("raw std", 3), ("RankMe", 0))]
        verdicts = Counter(report["verdict"].split(":")[0].split(",")[0].lower() for report in own)
        cells.append(", ".join(f"{verdict} {count} of {len(own)}" for verdict, count in verdicts.items()))
        print(f"| `{name}` | {len(own)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
