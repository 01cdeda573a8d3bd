"""Seeds deliberate faults in mario_ddqn.py, one at a time, and looks whether the tests notice.

    python tests/benchmarks/mutants.py [--only N] [--jobs 2] [--out results/mutants.json]

Each fault is put into a copy of the repository, where the named test files run until the first failure. Before that
they run without a fault. A fault that no test notices has survived. With --only the file keeps what it says of the
other faults, unless they are no longer in the table.
"""
import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = {"E": "test_environment.py", "M": "test_memory.py", "A": "test_agent.py",
         "R": "test_run.py", "V": "test_evaluation.py", "C": "test_command_line.py"}
MUTANTS = [  # what stands in the program, what is put in its place, the files that should notice (E: see FILES)
    # 1. Settings
    ("low <= value <= high", "low <= value", "C"),
    ("elif type(value) not in (int, spec.type) or not low", "elif not low", "C"),
    ("self.memory < 2 * max(", "self.memory < 0 * max(", "C"),
    ("self.envs * (self.n_step + 8)", "0", "C"),
    ('"show_jump": False,\n        "bfloat16": False}', '"bfloat16": False}', "C"),
    # Practice
    ("if game.cleared or not before.cleared", "if not before.cleared", "R"),
    ("game.furthest_x >= before.furthest_x", "game.furthest_x <= before.furthest_x", "R"),
    ("game.cleared or not before.cleared and", "game.cleared or", "R"),
    ("agent.rng.random() >= share", "agent.rng.random() < share", "R"),
    ("max(0, last - 40)", "max(0, last - 80)", "R"),
    ("min(last, max(40, int(np.mean(lengths)) + 20))", "max(40, int(np.mean(lengths)) + 20)", "R"),
    ("max(40, int(np.mean(lengths)) + 20)", "int(np.mean(lengths)) + 20", "R"),
    ("int(np.mean(lengths)) + 20", "int(np.mean(lengths)) + 10", "R"),
    ('row["stage"] == stages[e]][-100:]', 'row["stage"] == stages[e]]', "R"),
    ('for row in rows if row["stage"] == stages[e]]', "for row in rows]", "R"),
    ('if kept.cleared else "random"', 'if not kept.cleared else "random"', "R"),
    ("self.rng.random() < 0.8", "self.rng.random() < 0.7", "E"),
    ("                    if not episodes[e].practice:", "                    if True:", "R"),
    # 2. Environment
    ("return np.maximum(*self.frames), total", "return self.frames[-1], total", "E"),
    ("            total_reward += reward", "            total_reward = reward", "E"),
    ("if terminated or truncated:\n                break", "if terminated:\n                break", "E"),
    ("emulator_picture(obs).copy())  # the next", "emulator_picture(obs))  # the next", "E"),
    ("cv2.COLOR_BGRA2GRAY", "cv2.COLOR_RGBA2GRAY", "E"),
    ("(84, 110), interpolation=cv2.INTER_AREA", "(84, 110), interpolation=cv2.INTER_LINEAR", "E"),
    ("small[18:102, :, None]", "small[17:101, :, None]", "E"),
    ("self.show_jump and action & 1", "self.show_jump and action & 2", "E"),
    ("self.show_jump and action & 1", "action & 1", "E"),
    ("[self.buffer[1:], obs]", "[obs, self.buffer[:-1]]", "E"),
    ("self.buffer = np.zeros((4,", "self.buffer = np.ones((4,", "E"),
    ("/ 255.0", "/ 256.0", "E"),
    ("reward -= 25 *", "reward -= 20 *", "E"),
    ("abs(moved) <= 5", "abs(moved) <= 50", "E"),
    ("int(rng.integers(31))", "int(rng.integers(30))", "E"),
    ("self.rng.random() < 0.05", "self.rng.random() < 0.1", "E"),
    ("self.rng.random() < 0.25", "self.rng.random() > 0.25", "E"),
    ("action = self.actions[-1] if self.actions else 0", "action = 0", "E"),
    ("else self.standing + 1", "else self.standing", "RE"),
    ('max(self.furthest_x, int(info["x_pos"]))', 'int(info["x_pos"])', "EVR"),
    # 3 and 4. Network, replay memory
    ("kernel_size=4, stride=2), nn.ReLU(),", "kernel_size=4, stride=2),", "A"),
    ("math.ceil(capacity / n_envs)", "math.ceil(capacity)", "M"),
    ("np.rint(frame * 255)", "frame * 255", "M"),
    ("self.priority[env, (at + np.arange(self.stack)) % self.size] = 0", "self.priority[env, at] = 0", "M"),
    ("self.TERMINATED if terminal else", "self.TERMINATED if terminal or truncated else", "M"),
    ("else self.TRUNCATED if truncated else 0", "else 0", "M"),
    ("max(1.0, self.priority.max())", "1.0", "M"),
    ("self._write(next_state[-1], env)", "self._write(next_state[0], env)", "M"),
    ("np.arange(max(complete, self.first[env]), now", "np.arange(complete, now", "M"),
    ("self.first[env]), now + 1)", "self.first[env]), now)", "M"),
    ("elif complete >= self.first[env]:", "else:", "M"),
    ("            self.first[env] = -1\n", "", "M"),
    ("p=priority / priority.sum()", "p=(priority > 0) / (priority > 0).sum()", "M"),
    ("np.cumsum(ends > 0, axis=1) == (ends > 0)", "np.cumsum(ends > 0, axis=1) >= 0", "M"),
    ("self.gamma ** np.arange(self.n_step)", "self.gamma ** np.arange(1, self.n_step + 1)", "M"),
    ("((ends == self.TERMINATED) & ours)", "((ends > 0) & ours)", "M"),
    ("self._stacks(env, at + steps)", "self._stacks(env, at + 1)", "M"),
    ("self.gamma**steps)", "self.gamma + 0 * steps)", "M"),
    ("np.arange(1 - self.stack, 1)", "np.arange(-self.stack, 0)", "M"),
    ('"written", "first")', '"written")', "MR"),
    ("settings.envs, settings.n_step, settings.gamma,", "settings.envs, settings.n_step, 1.0,", "A"),
    ("settings.envs, settings.n_step, settings.gamma,", "settings.envs, 1, settings.gamma,", "A"),
    ("settings.gamma, input_shape)", "settings.gamma)", "A"),
    ("DQNAgent(settings, n_actions=len(RIGHT_ONLY))", "DQNAgent(settings)", "V"),
    ("ReplayMemory(settings.memory,", "ReplayMemory(2 * settings.memory,", "R"),
    # 4. Agent: schedule, actions, target, loss, priorities
    ("torch.manual_seed(settings.seed)", "torch.manual_seed(0)", "A"),
    ("torch.random.fork_rng(devices=[])", "contextlib.nullcontext()", "A"),
    ("deepcopy(self.local_net)", "self.local_net", "A"),
    ("updates * self.settings.train_every / (", "updates / (", "A"),
    ("(self.settings.lr_end / self.settings.lr) ** done", "1 - done", "A"),
    ("max(self.settings.eps_min, self.settings.eps_decay**self.updates)", "self.settings.eps_decay**self.updates", "A"),
    ("self.q_values(states).argmax(1)", "self.q_values(states).argmin(1)", "A"),
    ("self.rng.random(len(states)) <", "self.rng.random(1).repeat(len(states)) <", "A"),
    ("reward * self.settings.reward_scale", "reward", "A"),
    (".float().div_(255)", ".float().div_(256)", "A"),
    ("self.local_net(next_state).max(1).values", "self.local_net(next_state).mean(1)", "A"),
    ("self.target_net(next_state).max(1).values", "self.local_net(next_state).max(1).values", "A"),
    ("best = self.local_net(", "best = self.target_net(", "A"),
    ("next_value.float() * (1 - terminal)", "next_value.float()", "A"),
    ("reward + discount *", "reward + self.settings.gamma *", "A"),
    ("< self.settings.learn_start", "< self.settings.batch", "A"),
    ("% self.settings.copy_every == 0", "% self.settings.copy_every == 1", "A"),
    ("with torch.no_grad(), autocast:", "with autocast:", "A"),
    ("self.local_net(state).gather(1, action[:, None]).squeeze(1)", "self.local_net(state).max(1).values", "A"),
    ("** -0.4", "** 0.4", "A"),
    ("(weight / weight.max() * huber)", "huber", "A"),
    ("functional.smooth_l1_loss(", "functional.mse_loss(", "A"),
    ("if not torch.isfinite(loss):", "if False:", "AR"),
    ("        self.optimizer.zero_grad()\n", "", "A"),
    ("        self.scheduler.step()\n", "", "A"),
    ("(td_error + 0.01) ** self.settings.priority", "(td_error + 0.01)", "A"),
    # 5. Training loop: files, signals, resume
    ("os.fsync(file.fileno())", "pass", "R"),
    ("os.replace(unfinished, path)", "path.write_bytes(content)", "R"),
    ("unfinished.unlink(missing_ok=True)", "pass", "R"),
    ("weights_only=True", "weights_only=False", "C"),
    ("if broken or content.get", "if content.get", "C"),
    ("weight.isfinite().all() for weight", "True for weight", "C"),
    ('FileLock(folder / "lock", timeout=0), ', "", "R"),
    ("signal.signal(number, signal.default_int_handler)  # asked", "pass  # asked", "R"),
    ("            signal.signal(number, handler)", "            pass", "R"),
    ("vars(episode).update(saved)", "pass", "RC"),
    ("return rows[:count]", "return rows", "R"),
    ('self.rng.bit_generator.state = saved["generator"]', "pass", "RA"),
    ('"optimizer", "scheduler", "memory")', '"scheduler", "memory")', "RA"),
    ("in episode.actions:", "in episode.actions[1:]:", "R"),
    ("agent.learnt = []", "pass", "R"),
    ("range((agent.steps + len(envs)) // settings.train_every - agent.steps // settings.train_every)",
     "range(len(envs) // settings.train_every)", "R"),
    ("truncated = truncated or episodes[e].standing >= settings.patience", "pass", "R"),
    ('settings.flag_bonus if info["flag_get"]', "settings.flag_bonus if terminated", "R"),
    ("agent.remember(states[e],", "agent.remember(states[0],", "R"),
    ("seconds - saved > CHECKPOINT_SECONDS", "False", "R"),
    ("while not (stop or finished)", "while not finished", "R"),
    ("agent.steps >= (settings.steps", "agent.steps > (settings.steps", "R"),
    ("raise KeyboardInterrupt(stop[0])", "raise KeyboardInterrupt", "R"),
    ("time.perf_counter() - seconds, False", "time.perf_counter(), False", "R"),
    ("round(agent.epsilon, 5)", "round(agent.epsilon / 2, 5)", "R"),
    ("bar.update(len(envs))", "bar.update(1)", "R"),
    ('"resume": {"steps", "episodes"}', '"resume": {"steps"}', "R"),
    ("initial=agent.steps, ", "", "R"),
    (" or count >= agent.settings.episodes:", ":", "R"),
    ("    if not finished:", "    if stop:", "R"),
    ("        write_rows(folder, rows)\n        started", "        started", "C"),
    # 6. Evaluation and pictures
    ("MaxAndSkipEnv(make_game(stage))", 'MaxAndSkipEnv(make_game("1-1"))', "V"),
    ("            episode = Episode(np.random.default_rng([seed, number]), noise)",
     "            episode = Episode(np.random.default_rng([seed, 0]), noise)", "V"),
    ("points = values / settings.reward_scale", "points = values", "V"),
    ("len(episode.actions) < MAX_STEPS", "len(episode.actions) <= MAX_STEPS", "V"),
    ("while not (terminated or truncated) and", "while not terminated and", "V"),
    ('"died" if terminated else', '"died" if terminated or truncated else', "V"),
    ("idle_envs.pop(), Episode(np.random.default_rng([seed, number])",
     "idle_envs.pop(), Episode(np.random.default_rng(seed)", "V"),
    ("z=1.96", "z=1.64", "V"),
    ('if end != "cleared"', 'if end == "died"', "V"),
    ("x // 50 * 50", "x // 100 * 100", "V"),
    ("picture[8:232, :, :3]", "picture[8:232, :, 2::-1]", "V"),
    ("chosen, played, buttons = points.argmax()", "chosen, played, buttons = points.argmin()", "V"),
    ('key in "q\\x1b"', 'key in "\\x1b"', "V"),
    ("returns[max(0, i - window):i]", "returns[:i]", "V"),
    ("cv2.waitKey(2000)", "cv2.waitKey(20)", "V"),
    ('in "q\\x1b":  # 2 s', 'in "":  # 2 s', "V"),
    ('.replace("$", r"\\$"))', ")", "V"),
    # 7. Command line
    ("path.suffix not in endings or", "", "C"),
    ("path.name.lower() ==", "path.name ==", "C"),
    ('"memory" not in repr(error).lower()', "False", "C"),
    ('not os.environ.get("DISPLAY")', 'not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)', "C"),
    ("any(folder.iterdir())", "False", "C"),
    ("{**(PRESETS[preset] if preset else {}), **typed}", "{**typed, **(PRESETS[preset] if preset else {})}", "C"),
    ("sorted(typed.keys() - FLAGS[mode])", "[]", "C"),
    ("allow_abbrev=False", "allow_abbrev=True", "C"),
    ('"const": "tutorial"', '"const": "hasselt"', "C"),
    ('reconfigure(errors="replace")', "flush()", "C"),
    ("lambda *_: os._exit(130)", "signal.default_int_handler", "C"),
    ("str(word).replace(os.sep, \"/\")", "str(word)", "C"),
]


def run_tests(folder, keys):
    """(exit code of pytest, the first test that failed) in this copy of the repository."""
    words = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={folder / 'pytest'}"]
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", *words, *(f"tests/{FILES[key]}" for key in keys)],
                              cwd=folder, capture_output=True, text=True, timeout=150,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    except subprocess.TimeoutExpired:
        return 1, "ran for too long"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    return done.returncode, failed[1] if failed else done.stdout.strip().rpartition("\n")[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of faults (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="copies that are tested side by side (default: 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "mutants.json")
    args = parser.parse_args()
    text, wrong = (ROOT / "mario_ddqn.py").read_text(), []
    for number, (old, new, _) in enumerate(MUTANTS):
        if text.count(old) != 1:
            wrong.append(f"fault {number}: {old!r} stands {text.count(old)} times in mario_ddqn.py, it should once")
        else:
            compile(text.replace(old, new), f"fault {number}", "exec")
    if wrong:
        sys.exit("\n".join([*wrong, "the program has changed: mend the table MUTANTS"]))
    chosen, copies, started = args.only or range(len(MUTANTS)), queue.Queue(), time.perf_counter()

    def try_fault(number):
        (old, new, keys), folder = MUTANTS[number], copies.get()
        (folder / "mario_ddqn.py").write_text(text.replace(old, new))
        code, test = run_tests(folder, keys)
        copies.put(folder)
        print(f"{number:3d} {'caught by ' + test if code else 'SURVIVED'}: {old!r} -> {new!r}", flush=True)
        return {"number": number, "old": old, "new": new, "files": [FILES[key] for key in keys], "caught": bool(code),
                "by": test if code else None}

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(args.jobs) as pool:
        for job in range(args.jobs):
            copies.put(folder := Path(place) / str(job))
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
        for key in sorted({key for number in chosen for key in MUTANTS[number][2]}):
            code, test = run_tests(folder, key)
            if code:
                sys.exit(f"{FILES[key]} fails without any fault: {test}")
        found = list(pool.map(try_fault, chosen))
    if args.only and args.out.exists():
        numbers = {(old, new): number for number, (old, new, _) in enumerate(MUTANTS) if number not in chosen}
        for mutant in json.loads(args.out.read_text())["mutants"]:
            if (fault := (mutant["old"], mutant["new"])) in numbers:
                found.append({**mutant, "number": numbers[fault]})
        found.sort(key=lambda mutant: mutant["number"])
    caught = sum(mutant["caught"] for mutant in found)
    print(f"caught {caught} of {len(found)} faults in {time.perf_counter() - started:.0f} s")
    args.out.write_text(json.dumps({"faults": len(found), "caught": caught, "mutants": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
