"""Kills short real trainings at random moments, resumes them, and compares them with the run that nobody touched.

    python tests/benchmarks/kill_resume.py [--kills 50] [--cost RUN] [--out results/kill_resume.json]

Each trial starts the same training (real game, two emulators, a checkpoint about four times a second), kills it with
SIGKILL after a random time, looks at the checkpoint, resumes and kills it a second time, and then resumes it to the
end. Asked for in every trial: the checkpoint can be read; no episode that had ended before it is lost; no row comes
twice; episodes.csv (without the time column) and the final weights are bit for bit those of the unbroken run.
--cost RUN also measures how long it takes to write that run's checkpoint.
"""
import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from conftest import ROOT, csv_of, m  # noqa: E402

STEPS = 700
FLAGS = ["--double", "hasselt", "--envs", "2", "--steps", STEPS, "--learn-start", "40", "--memory", "1000", "--batch",
         "8", "--copy-every", "7", "--eps-decay", "0.99", "--patience", "60"]
PROGRAM = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import mario_ddqn as m; m.CHECKPOINT_SECONDS = 0.25; " \
          "sys.exit(m.main(sys.argv[1:]))"


def start(*flags):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *map(str, flags)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)


def wait_for_checkpoint(run, process):
    """Until this process has written a checkpoint, or has ended."""
    path = run / "last.pt"
    before = path.stat().st_mtime_ns if path.exists() else None
    while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
        time.sleep(0.01)


def trial(number, seed, whole, seconds):
    """One run, killed twice. Returns what was seen."""
    rng, run = random.Random(f"{seed} {number}"), whole.with_name(f"trial-{number}")
    seen = {"trial": number, "killed_at": [], "after_the_end": 0, "unreadable": 0, "lost": 0, "partial_left": 0}
    flags, left = [*FLAGS, "--out", run], 1.0  # the share of the run that is still to be played
    for _ in range(2):
        (run / "partial-last.pt").unlink(missing_ok=True)
        process = start(*flags)
        wait_for_checkpoint(run, process)
        time.sleep(rng.uniform(0, seconds * left))
        process.kill()
        process.communicate()
        seen["after_the_end"] += process.returncode >= 0
        seen["partial_left"] += (run / "partial-last.pt").exists()  # killed while a checkpoint was written
        try:
            checkpoint = m.load_tensors(run / "last.pt")
        except m.UserError:
            seen["unreadable"] += 1
            return seen
        seen["killed_at"].append(checkpoint["steps"])
        count = checkpoint["rows"]
        seen["lost"] += sum(row != other for row, other in
                            itertools.zip_longest(csv_of(run)[:count], csv_of(whole)[:count]))
        flags, left = ["--resume", run], 1 - checkpoint["steps"] / STEPS
    process = start(*flags)
    error = process.communicate()[1].decode()
    seen["exit_code"] = process.returncode
    if process.returncode and checkpoint["steps"] < STEPS:  # a finished run is not resumed
        return {**seen, "error": error[-300:]}
    rows = csv_of(run)
    seen["duplicated"] = len(rows) - len({row["episode"] for row in rows})
    seen["same_rows"] = rows == csv_of(whole)
    ends = [m.load_tensors(folder / "last.pt") for folder in (run, whole)]
    seen["same_weights"] = all(m.torch.equal(ends[0][net][name], ends[1][net][name])
                               for net in ("local_net", "target_net") for name in ends[0][net])
    return seen


def cost(run):
    """Seconds to write this run's checkpoint again, and its size beside that of the frames it holds."""
    agent = m.DQNAgent(m.load_network(run)[2])
    agent.load_state_dict(m.load_tensors(run / "last.pt"))
    with tempfile.TemporaryDirectory(dir=run) as folder:
        started = time.perf_counter()
        m.save(Path(folder), agent, [], [], 0)
        seconds, size = time.perf_counter() - started, (Path(folder) / "last.pt").stat().st_size
    frames = int(agent.memory.written.clip(max=agent.memory.size).sum())
    return {"seconds": round(seconds, 2), "megabytes": round(size / 1e6, 1), "frames": frames,
            "megabytes_of_frames": round(frames * 84 * 84 / 1e6, 1), "interval_minutes": m.CHECKPOINT_SECONDS / 60,
            "share_of_the_time": round(seconds / m.CHECKPOINT_SECONDS, 5)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs in all, two a trial (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="trials at a time (default: 2)")
    parser.add_argument("--cost", type=Path, metavar="RUN", help="also time the checkpoint of this run")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "kill_resume.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        process = start(*FLAGS, "--out", whole)
        wait_for_checkpoint(whole, process)
        playing = time.perf_counter()
        process.communicate()
        seconds = 0.9 * (time.perf_counter() - playing)
        print(f"the unbroken run: {len(csv_of(whole))} episodes; kills within {seconds:.0f} s of play", flush=True)
        with ThreadPoolExecutor(args.workers) as pool:
            trials = list(pool.map(lambda number: trial(number, args.seed, whole, seconds), range(args.kills // 2)))
    summary = {"kills": sum(len(seen["killed_at"]) + seen["unreadable"] - seen["after_the_end"] for seen in trials),
               "too_late": sum(seen["after_the_end"] for seen in trials),
               "killed_while_writing_a_checkpoint": sum(seen["partial_left"] for seen in trials),
               "unreadable_checkpoints": sum(seen["unreadable"] for seen in trials),
               "lost_episodes": sum(seen["lost"] for seen in trials),
               "duplicated_rows": sum(seen.get("duplicated", 0) for seen in trials), "trials": len(trials),
               "identical_to_the_unbroken_run": sum(bool(seen.get("same_rows") and seen.get("same_weights"))
                                                    for seen in trials)}
    if args.cost:
        summary["cost"] = cost(args.cost)
    print(json.dumps(summary, indent=1))
    m.write_atomically(args.out, (json.dumps({**summary, "each": trials}, indent=1) + "\n").encode())
    sys.exit(0 if summary["identical_to_the_unbroken_run"] == len(trials) else 1)


if __name__ == "__main__":
    main()
