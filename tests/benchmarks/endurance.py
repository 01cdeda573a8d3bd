"""Does a long training keep its memory, threads and files? Watches a run of mario_ddqn.py from outside (Linux).

    python tests/benchmarks/endurance.py                             a run of 200,000 steps of its own, then the figure
    python tests/benchmarks/endurance.py --attach PID --run RUN      watches a training that is under way

Every --every seconds it writes what /proc says (resident memory, threads, open files) and how far episodes.csv is.
The verdict compares the first and the last tenth of the time after the replay memory is full: medians of the memory,
so that a checkpoint's short peak does not count, and the lowest number of threads and of files.
"""
import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
import mario_ddqn as m  # noqa: E402


def sample(pid, run, started):
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    rows = m.read_rows(run) if (run / "episodes.csv").exists() else []
    return {"seconds": round(time.time() - started), "env_steps": int(rows[-1]["env_steps"]) if rows else 0,
            "rss_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1), "threads": int(status["Threads"]),
            "files": len(list(Path(f"/proc/{pid}/fd").iterdir()))}


def watch(pid, run, out, every):
    """Samples until the process ends, each written at once to endurance.csv. Returns them."""
    started, samples = time.time(), []
    with open(out / "endurance.csv", "w", newline="") as file:
        while True:
            try:
                samples.append(sample(pid, run, started))
            except (FileNotFoundError, KeyError, ProcessLookupError):  # it has ended (a zombie has no memory)
                return samples
            writer = csv.DictWriter(file, samples[0])
            if len(samples) == 1:
                writer.writeheader()
            writer.writerow(samples[-1])
            file.flush()
            time.sleep(every)


def judge(samples, out, settings):
    """The figure and endurance.json. Returns the growth of the resident memory, a share."""
    full = [one for one in samples if one["env_steps"] > 1.05 * settings["memory"]]  # 1.05: the rings fill unevenly
    if len(full) < 20:
        sys.exit(f"only {len(full)} samples after the replay memory was full: too few for a verdict")
    parts = {"when_full": full[:len(full) // 10], "at_the_end": full[-(len(full) // 10):]}
    before, after = (median(one["rss_mb"] for one in part) for part in parts.values())
    verdict = {"env_steps": samples[-1]["env_steps"], "seconds": samples[-1]["seconds"], "samples": len(samples),
               "full_after_env_steps": full[0]["env_steps"], "rss_mb_when_full": before, "rss_mb_at_the_end": after,
               "growth": round(after / before - 1, 5), "peak_rss_mb": max(one["rss_mb"] for one in samples),
               **{f"{name}_{when}": min(one[name] for one in part)
                  for name in ("threads", "files") for when, part in parts.items()}}
    print(json.dumps(verdict, indent=1))
    content = json.dumps({**verdict, "settings": settings}, indent=1) + "\n"
    m.write_atomically(out / "endurance.json", content.encode())
    figure = m.Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([one["env_steps"] / 1000 for one in samples], [one["rss_mb"] for one in samples], color=m.COLOURS[0])
    axes.axvline(full[0]["env_steps"] / 1000, color="#555555", linestyle="--", label="replay memory full")
    axes.set(xlabel="environment steps (thousands)", ylabel="resident memory (MB)", ylim=(0, None),
             title=f"{verdict['growth']:+.2%} after the memory is full; spikes: checkpoints")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "endurance.png", dpi=110)
    return verdict["growth"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attach", type=int, metavar="PID", help="a training that is under way (with --run)")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "endurance", help="its folder")
    parser.add_argument("--steps", type=int, default=200_000, help="environment steps (default: 200000)")
    parser.add_argument("--every", type=float, default=10, help="seconds between two samples (default: 10)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "endurance", help="where the results go")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pid = args.attach or subprocess.Popen([sys.executable, m.__file__, "--double", "--steps", str(args.steps),
                                           "--out", args.run], stderr=subprocess.DEVNULL).pid
    samples = watch(pid, args.run, args.out, args.every)
    settings = json.loads((args.run / "settings.json").read_text())
    sys.exit(0 if judge(samples, args.out, settings) < 0.01 else 1)


if __name__ == "__main__":
    main()
