"""Kills short real trainings at random moments, resumes them, and compares them with the run that nobody touched.

    python tests/benchmarks/kill_resume.py [--kills 50] [--seed 0] [--workers 2] [--out results/kill_resume.json]

Each trial starts the same training (real game, two emulators, a checkpoint about four times a second), kills it with
SIGKILL after a random time, looks at the checkpoint, resumes and kills it a second time, and then resumes it to the
end. Asked for in every trial: the checkpoint can be read; no episode that had ended before it is lost; no row comes
twice; episodes.csv (without the time column) and the final weights are bit for bit those of the unbroken run.
It also measures what a checkpoint costs: --cost RUN times the writing of that run's last.pt.
"""
import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import mario_ddqn  # noqa: E402

torch = mario_ddqn.torch

FLAGS = ["--double", "hasselt", "--envs", "2", "--steps", "700", "--learn-start", "40", "--memory", "1000", "--batch",
         "8", "--copy", "7", "--eps-decay", "0.99", "--eval-every", "300", "--eval-episodes", "2", "--threads", "1",
         "--checkpoint-minutes", "0.004"]


def train(folder, *flags):
    return subprocess.Popen([sys.executable, mario_ddqn.__file__, *flags], cwd=folder, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def rows_of(run):
    with open(run / "episodes.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def trial(number, seed, folder, whole, seconds):
    """One run, killed twice. Returns what was seen."""
    rng, run = random.Random(f"{seed} {number}"), folder / f"trial-{number}" / "run"
    run.parent.mkdir()
    seen = {"trial": number, "killed_at": [], "unreadable": 0, "lost": 0, "partial_left": 0}
    flags = [*FLAGS, "--runs", ".", "--name", "run"]
    for _ in range(2):
        process = train(run.parent, *flags)
        while not (run / "last.pt").exists() and process.poll() is None:  # before that there is nothing to resume
            time.sleep(0.01)
        time.sleep(rng.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen["partial_left"] += (run / "partial-last.pt").exists()  # killed while a checkpoint was written
        try:
            checkpoint, _ = mario_ddqn.load_file(run / "last.pt")
        except mario_ddqn.UserError:
            seen["unreadable"] += 1
            return seen
        finished = [{k: str(v) for k, v in row.items() if k != "seconds"} for row in json.loads(checkpoint["rows"])]
        seen["killed_at"].append(checkpoint["count"]["steps"])
        seen["lost"] += rows_of(run)[:len(finished)] != finished
        flags = ["--resume", "run"]
    process = train(run.parent, *flags)
    error = process.communicate()[1].decode()
    seen["exit_code"] = process.returncode
    if process.returncode:
        return {**seen, "error": error[-300:]}
    rows, expected = rows_of(run), rows_of(whole)
    seen["duplicated"] = len(rows) - len({row["episode"] for row in rows})
    seen["same_rows"] = rows == expected
    ends = [mario_ddqn.load_file(path / "last.pt")[0] for path in (run, whole)]
    seen["same_weights"] = all(torch.equal(ends[0][net][name], ends[1][net][name])
                               for net in ("local_net", "target_net") for name in ends[0][net])
    return seen


def cost(run):
    """Seconds to write this run's checkpoint again, and its size beside that of the frames it holds."""
    checkpoint, settings = mario_ddqn.load_file(run / "last.pt")
    settings = argparse.Namespace(**settings)
    agent = mario_ddqn.make_agent(settings)
    agent.load_state_dict(checkpoint)
    with tempfile.TemporaryDirectory(dir=run) as folder:
        started = time.perf_counter()
        content = {**checkpoint, **agent.state_dict()}
        mario_ddqn.write_atomically(Path(folder) / "last.pt", lambda file: torch.save(content, file))
        seconds = time.perf_counter() - started
        size = (Path(folder) / "last.pt").stat().st_size
    return {"seconds": round(seconds, 2), "megabytes": round(size / 1e6, 1), "frames": len(agent.memory),
            "megabytes_of_frames": round(len(agent.memory) * 84 * 84 / 1e6, 1),
            "interval_minutes": settings.checkpoint_minutes,
            "share_of_the_time": round(seconds / (60 * settings.checkpoint_minutes), 5)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs in all, two a trial (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="trials at a time (default: 2)")
    parser.add_argument("--cost", type=Path, metavar="RUN", help="also time the checkpoint of this (finished) run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "results" / "kill_resume.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        started = time.perf_counter()
        process = train(folder, *FLAGS, "--runs", ".", "--name", "whole")
        while not (folder / "whole" / "last.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        playing = time.perf_counter()
        process.communicate()
        seconds = 0.9 * (time.perf_counter() - playing)
        print(f"the unbroken run: {len(rows_of(folder / 'whole'))} episodes in {time.perf_counter() - started:.0f} s; "
              f"kills fall within the first {seconds:.0f} s of play", flush=True)
        with ThreadPoolExecutor(args.workers) as pool:
            trials = list(pool.map(lambda number: trial(number, args.seed, folder, folder / "whole", seconds),
                                   range(args.kills // 2)))
    summary = {"kills": sum(len(seen["killed_at"]) + seen["unreadable"] for seen in trials),
               "killed_while_writing_a_checkpoint": sum(seen["partial_left"] for seen in trials),
               "unreadable_checkpoints": sum(seen["unreadable"] for seen in trials),
               "lost_episodes": sum(seen["lost"] for seen in trials),
               "duplicated_rows": sum(seen.get("duplicated", 0) for seen in trials),
               "trials": len(trials),
               "identical_to_the_unbroken_run": sum(bool(seen.get("same_rows") and seen.get("same_weights"))
                                                    for seen in trials)}
    print(json.dumps(summary, indent=1))
    summary["seed"], summary["each"] = args.seed, trials
    if args.cost:
        summary["cost"] = cost(args.cost)
        print(json.dumps(summary["cost"], indent=1))
    mario_ddqn.write_json(args.out, summary)
    sys.exit(0 if summary["identical_to_the_unbroken_run"] == len(trials) else 1)


if __name__ == "__main__":
    main()
