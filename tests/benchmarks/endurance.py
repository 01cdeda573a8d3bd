"""Does a long training keep its memory, threads and files? Watches a run of mario_ddqn.py from outside (Linux).

    python tests/benchmarks/endurance.py                             a run of 200,000 steps of its own, then the figure
    python tests/benchmarks/endurance.py --attach PID --run RUN      watches a training that is under way
    python tests/benchmarks/endurance.py --plot                      only the figure and the verdict, from the CSV

Every --every seconds it writes what /proc says (resident memory, threads, open files) and how far episodes.csv is.
The verdict compares two medians, so that exams and checkpoints, which take memory for some seconds and give it back,
do not count: the first and the last tenth of the time after the replay memory is full. Threads and files are counted
at their lowest in the same two spans: what leaks is never given back.
"""
import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("seconds", "env_steps", "rss_mb", "threads", "files")


def sample(pid, run, started):
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    rows = (run / "episodes.csv").read_text().splitlines() if (run / "episodes.csv").exists() else []
    steps = rows[-1].split(",")[1] if len(rows) > 1 else "0"
    return {"seconds": round(time.time() - started), "env_steps": int(steps) if steps.isdigit() else 0,
            "rss_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1), "threads": int(status["Threads"]),
            "files": len(list(Path(f"/proc/{pid}/fd").iterdir()))}


def watch(pid, run, out, every):
    started = time.time()
    with open(out / "endurance.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        while True:
            try:
                writer.writerow(sample(pid, run, started))
            except (FileNotFoundError, KeyError, ProcessLookupError):  # it has ended (a zombie has no memory)
                return
            file.flush()
            time.sleep(every)


def judge(out, run_settings):
    """The figure and endurance.json, from endurance.csv. Returns the growth of the resident memory, a share."""
    with open(out / "endurance.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    full = [row for row in rows if row["env_steps"] > 1.05 * run_settings["memory"]]  # 1.05: the rings fill unevenly
    if len(full) < 20:
        sys.exit(f"only {len(full)} samples after the replay memory was full: too few for a verdict")
    tenth = len(full) // 10
    first, last = full[:tenth], full[-tenth:]
    before, after = (median(row["rss_mb"] for row in part) for part in (first, last))
    verdict = {"env_steps": int(rows[-1]["env_steps"]), "seconds": rows[-1]["seconds"], "samples": len(rows),
               "full_after_env_steps": int(full[0]["env_steps"]),
               "rss_mb_when_full": before, "rss_mb_at_the_end": after,
               "growth": round(after / before - 1, 5), "peak_rss_mb": max(row["rss_mb"] for row in rows),
               **{f"{name}_{when}": int(min(row[name] for row in part))
                  for name in ("threads", "files") for when, part in (("when_full", first), ("at_the_end", last))},
               "settings": run_settings}
    (out / "endurance.json").write_text(json.dumps(verdict, indent=1) + "\n")
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [row["env_steps"] / 1000 for row in rows]
    axes.plot(steps, [row["rss_mb"] for row in rows], color="#0072B2", linewidth=1)
    axes.axvline(full[0]["env_steps"] / 1000, color="#555555", linestyle="--")
    axes.text(full[0]["env_steps"] / 1000, 20, " replay memory full", color="#555555")
    axes.set(xlabel="environment steps (thousands)", ylabel="resident memory (MB)", ylim=(0, None),
             title=f"{verdict['growth']:+.2%} after the memory is full; spikes: exams and checkpoints")
    axes.grid(alpha=0.3)
    figure.savefig(out / "endurance.png", dpi=110)
    print(json.dumps({name: value for name, value in verdict.items() if name != "settings"}, indent=1))
    return verdict["growth"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attach", type=int, metavar="PID", help="a training that is under way (with --run)")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "endurance", help="its folder")
    parser.add_argument("--steps", type=int, default=200_000, help="environment steps (default: 200000)")
    parser.add_argument("--every", type=float, default=10, help="seconds between two samples (default: 10)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "endurance", help="where the results go")
    parser.add_argument("--plot", action="store_true", help="draw the CSV in --out once more")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.plot:
        settings = json.loads((args.out / "endurance.json").read_text())["settings"]
    else:
        training = None
        if args.attach is None:
            command = [sys.executable, str(ROOT / "mario_ddqn.py"), "--double", "--steps", str(args.steps), "--force",
                       "--runs", str(args.run.parent), "--name", args.run.name]
            training = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        watch(training.pid if training else args.attach, args.run, args.out, args.every)
        settings = json.loads((args.run / "settings.json").read_text())
    sys.exit(0 if judge(args.out, settings) < 0.01 else 1)


if __name__ == "__main__":
    main()
