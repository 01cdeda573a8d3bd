"""How long does a training take until its network clears 90 of 100 games after idle starts?

    python tests/benchmarks/minutes.py --keep RUN         beside the training: keeps each network that it saves
    python tests/benchmarks/minutes.py --judge RUN ...    afterwards: plays with them, oldest first, until one clears 90

A training saves its network every 10 minutes. A network that has lost 11 games plays no further ones. `--judge` adds
the runs to results/training/minutes.json; a run's name says what it was and ran on: "one-core-(seed-3)".
"""
import argparse
import json
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
import mario_ddqn as m  # noqa: E402

GAMES, ENOUGH = 100, 90


def keep(run):
    """Copies RUN/network.pt to RUN/networks/STEPS.pt whenever it is new, until the training is at its last step."""
    (run / "networks").mkdir(exist_ok=True)
    last_step, steps = json.loads((run / "settings.json").read_text())["steps"], 0
    while steps < last_step:
        time.sleep(30)
        steps = m.load_tensors(run / "network.pt")["steps"]
        shutil.copy(run / "network.pt", run / "networks" / f"{steps}.pt")


def judge(run):
    """One dict for a run: of each network, up to the first that clears enough games, how old it is and how it did."""
    found = []
    for path in sorted((run / "networks").glob("*.pt"), key=lambda path: int(path.stem)):
        saved, (_, q_values, settings) = m.load_tensors(path), m.load_network(path)
        played, cleared = 0, 0
        while played < GAMES and played - cleared <= GAMES - ENOUGH:
            results = m.play(q_values, settings, 10, "noop", seed=played)
            played, cleared = played + 10, cleared + sum(end == "cleared" for end, _, _ in results)
        found.append({"steps": saved["steps"], "minutes": saved["seconds"] / 60, "played": played, "cleared": cleared})
        print(path, found[-1], flush=True)
        if cleared >= ENOUGH:
            break
    return {"run": run.name.replace("-", " "), "networks": found}


def sentence(found):
    """What README says of them."""
    first = {run["run"]: run["networks"][-1] for run in found}
    said = [f"{last['minutes']:.0f} minutes ({last['steps']:,} steps) on {name}" if last["cleared"] >= ENOUGH else
            f"not reached on {name}" for name, last in first.items()]
    return f"First saved network to clear {ENOUGH} of {GAMES} games after idle starts: {'; '.join(said)}."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="RUN")
    parser.add_argument("--judge", type=Path, metavar="RUN", nargs="+")
    args = parser.parse_args()
    if args.keep:
        keep(args.keep)
    if args.judge:
        path = ROOT / "results" / "training" / "minutes.json"
        found = {run["run"]: run for run in [*json.loads(path.read_text()), *map(judge, args.judge)]}
        path.write_text(json.dumps([*found.values()], indent=1) + "\n")
        print(sentence(found.values()))


if __name__ == "__main__":
    main()
