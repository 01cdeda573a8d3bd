"""Drawing for the notebooks: colours, pictures side by side, curves, clips. Nothing here is about learning."""
import contextlib
import contextvars
import io
import threading
from types import SimpleNamespace

import cv2
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import DisplayHandle, Image, display
from matplotlib.figure import Figure
from PIL import Image as Pillow

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
SKY, BLACK = "#56B4E9", "#000000"
plt.rcParams.update({"font.size": 12, "axes.grid": True, "grid.alpha": 0.3,
                     "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True,
                     "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK])})


def image(figure, alt):
    """A figure as a picture with a text for readers who do not see it. 256 colours take a third of the bytes."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100, bbox_inches="tight")
    Pillow.open(drawn).convert("RGB").quantize(256, dither=Pillow.Dither.NONE).save(small, "PNG", optimize=True)
    return Image(small.getvalue(), format="png", alt=alt)


def show(alt):
    """The current figure, with a text for readers who do not see it."""
    display(image(plt.gcf(), alt))
    plt.close()


# ===== Notebook 2: Mario. Games, and what the network makes of them.

def record(q_values, settings, noise="none", seed=0):
    """One greedy game. For each step, and for the end: pictures, states, points (the Q-values in points), totals (the
    reward so far). And actions, end, x."""
    import mario_ddqn  # here, because notebook 1 does without it

    game = SimpleNamespace(pictures=[], states=[], points=[], totals=[])

    def look(picture, state, values, episode):
        game.pictures.append(picture)
        game.states.append(state)
        game.points.append(values / settings.reward_scale)
        game.totals.append(episode.total_reward)

    episode = mario_ddqn.Episode(np.random.default_rng([0, seed]), noise)
    env = mario_ddqn.make_env(settings.stage, settings.show_jump)
    game.end, game.x = mario_ddqn.play_episode(env, q_values, episode, look)
    game.actions, game.points = np.array(episode.actions[1 - len(game.points):]), np.array(game.points)
    return game


def record_clear(q_values, settings, tries=10):
    """The first of some games with random actions that clears the level; if none does, the one that got furthest."""
    games = []
    while not games or games[-1].end != "cleared" and len(games) < tries:
        games.append(record(q_values, settings, "epsilon", len(games)))
    return max(games, key=lambda game: game.x)


def panels(game, steps, points=None):
    """The watch panel, (336, 640, 3) uint8, of these steps of a game. points: of another network, and its choices."""
    from mario_ddqn import watch_panel

    played, points = (game.actions, game.points) if points is None else (points.argmax(1), points)
    for t in np.minimum(steps, len(game.actions)):  # the last one is the end
        cleared = game.end == "cleared" and t == len(game.actions)
        episode = SimpleNamespace(actions=played[:t + 1], cleared=cleared)
        past = points[max(0, t - 99):t + 1].max(1)
        yield half(watch_panel(game.pictures[t], game.states[t], points[t], past, episode))[:, :, ::-1]


def watch_clip(game, every):
    """The watch panel of a game, in the page, with a picture for `every` steps."""
    alt = (f"A game that ends at x = {game.x}: {game.end}. Beside it the four frames that the network gets, its "
           "Q-values as bars, and the highest of them over 100 steps")
    clip(panels(game, range(0, len(game.actions) + every, every)), alt, every)


def compare_clip(game, points, titles, steps):
    """The watch panel of some steps of a game; below, the same steps with the points of another network."""
    both = zip(panels(game, steps), panels(game, steps, points), strict=True)
    clip([np.vstack(list(map(label, pair, titles))) for pair in both],
         f"The last steps of a game, in two rows: {titles[0]} above, {titles[1]} below", steps.step)


def half(picture):
    return cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


def label(picture, text):
    """A white line of text above the picture."""
    strip = np.full((28, picture.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([strip, picture])


def side_by_side(games, titles, every):
    """Pictures of several games at once. A game that is over keeps its last picture. The last game sets the length."""
    for t in range(0, len(games[-1].pictures) + every, every):
        parts = []
        for game, title in zip(games, titles, strict=True):
            over = t >= len(game.pictures) - 1
            picture = rgb(game.pictures[min(t, len(game.pictures) - 1)])[8:232]
            picture = label(picture, f"{title}: {game.end}, x = {game.x}" if over else title)
            parts.append(np.pad(picture, ((0, 0), (0, 8), (0, 0)), constant_values=255))  # white between them
        yield np.hstack(parts)


def clip(pictures, alt, every, width=None, colours=32):
    """A GIF in the page, of a picture for `every` steps. It stops for three seconds at its end."""
    pictures = list(pictures)
    palette = Pillow.fromarray(np.vstack(pictures[::5])).quantize(colours)
    frames = [Pillow.fromarray(np.ascontiguousarray(picture)).quantize(palette=palette, dither=Pillow.Dither.NONE)
              for picture in pictures]
    data, pause = io.BytesIO(), [1000 * every // 15] * (len(frames) - 1) + [3000]  # milliseconds
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=pause, loop=0)
    display(Image(data.getvalue(), format="png", width=width, alt=alt))  # "png": some pages show no GIF, browsers do


def rgb(picture):
    """The emulator's picture (240, 256, 4) uint8 in B, G, R, unused -> (240, 256, 3) in R, G, B."""
    return picture[:, :, 2::-1]


def apart(heights, count, distance):
    """Where `heights` has its greatest values: `count` places that far apart, from left to right."""
    found = []
    for place in np.argsort(heights)[::-1]:
        if len(found) < count and all(abs(place - other) > distance for other in found):
            found.append(int(place))
    return sorted(found)


def value_curve(points, came, moments):
    """The highest and the lowest Q-value along a game, and the discounted reward that came. moments: steps to mark."""
    best, worst = points.max(1), points.min(1)
    plt.figure(figsize=(9, 3.8))
    plt.fill_between(range(len(best)), worst, best, color=SKY, alpha=0.5, label="lowest to highest Q-value")
    plt.plot(best, color=BLUE, label="highest Q-value")
    plt.plot(came, "--", color=RED, linewidth=1.5, label="reward that came, discounted")
    for number, t in enumerate(moments, 1):
        plt.axvline(t, color=BLACK, linestyle=":", linewidth=1)
        plt.text(t + 2, 1.1 * best.max(), str(number), fontweight="bold")
    plt.ylim(top=1.22 * best.max())
    plt.xlabel("agent step")
    plt.ylabel("points")
    plt.legend(fontsize=10, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    show("The highest and lowest Q-value over the steps of the game, and the discounted reward that came")


def value_table(points, moments, names):
    """Q-values at these steps, the highest of each step marked."""
    print("moment" + "".join(f"{'+'.join(buttons):>14}" for buttons in names))
    for number, t in enumerate(moments, 1):
        print(f"{number:6}" + "".join(f"{q:13.1f}{'*' if q == points[t].max() else ' '}" for q in points[t]))


# ----- Pictures side by side

def panel(axis, image, title, note="", **font):
    axis.imshow(image, cmap="gray", vmin=0, vmax=255 if image.dtype == np.uint8 else 1, interpolation="nearest")
    axis.set_title(title, fontsize=11, **font)
    axis.set_xlabel(note, fontsize=10)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(True)


def pictures(images, titles, alt, height=2.6):
    """Pictures side by side, each below its title."""
    figure, axes = plt.subplots(1, len(images), figsize=(min(9, 1.1 * height * len(images)), height), squeeze=False)
    for axis, image, title in zip(axes[0], images, titles, strict=True):
        panel(axis, image, title)
    show(alt)


def wrappers(frames, state, actions):
    """What each wrapper hands on. frames: the two last of the emulator, state: the stack made of them."""
    stack = np.uint8(state * 255)
    mosaic = np.vstack([np.hstack(stack[:2]), np.hstack(stack[2:])])
    shown = {"the game": (rgb(frames[-1]), "240 × 256 × 3 uint8\n60 frames a second"),
             "1 MaxAndSkipEnv": (rgb(np.maximum(*frames)), "240 × 256 × 4 uint8\n15 steps a second"),
             "2 ProcessFrame84": (stack[3], "84 × 84 × 1 uint8\ngrey, no score"),
             "3 ImageToPyTorch": (stack[3], "1 × 84 × 84 uint8\nsame numbers"),
             "4 BufferWrapper": (mosaic, "4 × 84 × 84 uint8\noldest first"),
             "5 ScaledFloatFrame": (mosaic / 255, "4 × 84 × 84 float32\n0 to 1")}
    figure, axes = plt.subplots(2, 4, figsize=(9, 5.6))
    for axis, (name, (image, note)) in zip(axes.flat, shown.items(), strict=False):
        panel(axis, image, name, note, fontweight="bold")
    buttons = "\n".join(f"{action}  {' + '.join(names)}" for action, names in enumerate(actions))
    axes.flat[6].text(0, 0.1, buttons, linespacing=1.6)
    axes.flat[6].set_title("6 JoypadSpace", fontsize=11, fontweight="bold", y=0.8)
    for axis in axes.flat[6:]:
        axis.axis("off")
    show("Seven panels: the frame of the game, and what each of the six wrappers hands on")


# ----- Curves

def rolling(values, window):
    """The mean of the last `window` values, at each place."""
    return [np.mean(values[max(0, k - window):k]) for k in range(1, len(values) + 1)]


def steps_axis(axis, label="environment steps (4 frames each)"):
    axis.set_xlabel(label)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter("{x:,.0f}")


def lines(curves, xlabel, ylabel, alt, height=3):
    """curves: {label: y, or (x, y)}. Lines in different colours and styles."""
    plt.figure(figsize=(9, height))
    for (name, values), style in zip(curves.items(), ("-", "--", "-.", ":"), strict=False):
        plt.plot(*(values if isinstance(values, tuple) else (values,)), style, label=name)
    plt.xlabel(xlabel)
    plt.ylabel(ylabel)
    plt.ylim(bottom=-0.02 * plt.ylim()[1])  # a line at 0 is not hidden by the axis
    if len(curves) > 1:
        plt.legend(fontsize=10, ncols=len(curves), loc="lower left", bbox_to_anchor=(0, 1))
    plt.gca().xaxis.set_major_formatter("{x:,.0f}")
    show(alt)


def dots(groups, xlabel, alt, height, band=None):
    """groups: {name: values}. A row of dots for each, its mean in black; the range of `band` is tinted."""
    plt.figure(figsize=(9, height))
    if band:
        plt.axvspan(min(band), max(band), color=BLACK, alpha=0.1)
    for k, values in enumerate(groups.values()):
        near = k + np.random.default_rng(0).uniform(-0.15, 0.15, len(values))
        plt.scatter(values, near if len(values) > 5 else [k] * len(values), color=BLUE, alpha=0.7)
        plt.plot([np.mean(values)] * 2, [k - 0.3, k + 0.3], color=BLACK, linewidth=3)
    plt.yticks(range(len(groups)), groups)
    plt.ylim(len(groups) - 0.4, -0.6)
    plt.xlabel(xlabel)
    show(alt)


def reward_figure(rows, window, random_returns):
    """A point for each episode, the rolling mean, and the return of random play as a band: figure and text."""
    steps, returns, cleared = (np.array([row[name] for row in rows]) for name in ("env_steps", "return", "cleared"))
    mean, error = np.mean(random_returns), np.std(random_returns) / len(random_returns)**0.5
    figure = Figure(figsize=(9, 4.5))
    axis = figure.subplots()
    axis.axhspan(mean - 2 * error, mean + 2 * error, color=RED, alpha=0.3,
                 label="random play (mean ± 2 standard errors)")
    axis.plot(steps, returns, ".", markersize=5, color=SKY, alpha=0.6, label=f"one episode ({len(rows):,})")
    axis.plot(steps, rolling(returns, window), color=BLUE, linewidth=2.5, label=f"mean of the last {window}")
    axis.plot(steps[cleared > 0], returns[cleared > 0], "*", color=ORANGE, label=f"cleared: {sum(cleared)}")
    axis.set_ylabel("total reward of an episode (points)")
    axis.legend(fontsize=10, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    steps_axis(axis)
    return figure, (f"Return of {len(rows)} training games over the steps, with their rolling mean, and random play at "
                    f"{mean:.0f} points")


@contextlib.contextmanager
def growing_curve(rows, window, random_returns, seconds=5):
    """While its block runs, one figure in the page grows: the reward curve of what `rows()` returns by then."""
    handle, over = DisplayHandle(), threading.Event()

    def draw():
        handle.update(image(*reward_figure(rows(), window, random_returns)))

    def grow():
        while not over.wait(seconds):
            with contextlib.suppress(Exception):  # no folder yet, no rows yet
                draw()

    handle.display(image(*reward_figure([], window, random_returns)))
    thread = threading.Thread(target=contextvars.copy_context().run, args=(grow,))  # the context knows the cell
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        draw()


def old_against_new(old, new, exact):
    """Two toy trainings: (returns, highest Q-value by square). exact: the true values of the new one."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for (returns, values), name, style in ((old, "old", ":k"), (new, "new", "-C0")):
        left.plot(rolling(returns, 20), style, label=name, linewidth=2.5)
        right.plot(range(11 - len(values), 11), values, style, label=name, linewidth=2.5)
    right.plot(range(11 - len(exact), 11), exact, "--", color=RED, label="true value (new)")
    left.set(xlabel="game", ylabel="return, mean of the last 20", ylim=(0, 10.5))
    right.set(xlabel="square", ylabel="highest Q-value (points)", ylim=(0, 11))
    right.set_xticks(range(3, 11))
    for axis in (left, right):
        axis.legend(fontsize=10, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    show("Left: returns of the toy trainings, old and new. Right: the highest Q-value along the corridor")


# ----- The long runs

def seed_curves(runs, window, random_returns):
    """{name: rows}. The rolling mean of each run, a tick for each clear, and random play as a line."""
    plt.figure(figsize=(9, 4.5))
    for k, (name, rows) in enumerate(runs.items()):
        steps, returns, cleared = (np.array([row[key] for row in rows]) for key in ("env_steps", "return", "cleared"))
        line, = plt.plot(steps, rolling(returns, window), linewidth=2, label=f"{name}: {sum(cleared)} clears")
        plt.plot(steps[cleared > 0], np.full(sum(cleared), -90 * (k + 1)), "|", color=line.get_color(), markersize=5)
    plt.axhline(np.mean(random_returns), color=BLACK, linestyle=":", label="random play")
    plt.ylabel(f"total reward, mean of the last {window}\n(a tick below: cleared)")
    plt.legend(fontsize=10, ncols=2)
    steps_axis(plt.gca())
    show(f"Returns of {len(runs)} trainings over the steps, with a tick for every clear")


def walls(rows):
    """The furthest x of every training game of a run."""
    steps, furthest, cleared = (np.array([row[key] for row in rows]) for key in ("env_steps", "furthest_x", "cleared"))
    plt.figure(figsize=(9, 4.5))
    plt.plot(steps[cleared == 0], furthest[cleared == 0], ".", markersize=4, alpha=0.5, color=BLUE, label="not cleared")
    plt.plot(steps[cleared > 0], furthest[cleared > 0], ".", markersize=4, color=ORANGE, label="cleared")
    plt.ylabel("furthest x of the game (pixels)")
    plt.ylim(0, 3_400)
    plt.legend(fontsize=10, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), markerscale=3)
    steps_axis(plt.gca())
    show("The furthest x of every training game over the steps; many games end at the same few places")


def rates(found, noises, interval):
    """{run: {noise: evaluation}}. The rate of each run under each noise, with its interval."""
    plt.figure(figsize=(9, 0.9 + 0.22 * len(noises) * (len(found) + 1)))
    for k, (run, evaluations) in enumerate(found.items()):
        for row, noise in enumerate(noises):
            if e := evaluations.get(noise):
                low, high = interval(e["cleared"], e["episodes"])
                y, rate = row + 0.7 * ((k + 0.5) / len(found) - 0.5), e["cleared"] / e["episodes"]
                plt.errorbar(100 * rate, y, xerr=[[100 * (rate - low)], [100 * (high - rate)]], fmt="osD^vP*X"[k % 8],
                             capsize=3, color=f"C{k % 7}", label=run if row == 0 else None)
    plt.yticks(range(len(noises)), [f"{noise}\n{meaning}" for noise, meaning in noises.items()])
    plt.xlim(0, 101)
    plt.ylim(len(noises) - 0.5, -0.5)
    plt.xlabel("games cleared (%), with the 95 % interval")
    plt.legend(fontsize=10, loc="upper left", bbox_to_anchor=(1, 1))
    show(f"Clear rates of {len(found)} networks under three kinds of noise, with 95 % intervals")


def lost_games(evaluations, noises):
    """{noise: evaluation}. Where lost games end."""
    figure, axes = plt.subplots(len(noises), 1, figsize=(9, 5), sharex=True, sharey=True)
    for axis, noise in zip(axes, noises, strict=True):
        for way, colour in (("died", RED), ("out of time", SKY)):
            x = [x for end, x in evaluations[noise]["lost"] if end == way]
            axis.hist(x, np.arange(0, 3_300, 50), color=colour, label=f"{way}: {len(x)}")
        axis.legend(fontsize=10, loc="upper left", bbox_to_anchor=(1, 1))
        axis.set_ylabel(f"{noise}\ngames")
    axes[-1].set_xlabel("x at the end (pixels; the flag of 1-1 is at about 3,160)")
    show("Where lost games end, a row for each of: " + ", ".join(noises))


def double_or_not(runs, window=100):
    """The runs of results/double: returns over the steps, and Q-values against what came."""
    colours = {"single": (BLUE, "-", "o"), "tutorial": (ORANGE, "--", "s"), "hasselt": (GREEN, "-.", "^")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    for run in runs:
        colour, style, mark = colours[run["rule"]]
        left.plot(run["env_steps"], rolling(run["return"], window), style, color=colour, linewidth=1.5)
        right.plot(run["discounted_return"], run["q"], mark, color=colour, markersize=8)
    for rule, (colour, style, mark) in colours.items():
        left.plot([], [], style, color=colour, label=rule)
        right.plot([], [], mark, color=colour, label=rule)
    ends = [min(run["discounted_return"] for run in runs), max(run["q"] for run in runs)]
    right.plot(ends, ends, ":", color=BLACK, label="equal")
    left.set_ylabel(f"total reward, mean of the last {window}")
    left.locator_params(axis="x", nbins=4)
    steps_axis(left, "environment steps")
    right.set(xlabel="discounted return that came (points)", ylabel="Q of the actions played (points)")
    left.legend(fontsize=10)
    right.legend(fontsize=10)
    show("Left: returns of the runs of three rules over the steps. Right: their Q-values against the returns that came")


# ----- Drawings of ideas

def canvas(width, height, figsize):
    plt.figure(figsize=figsize)
    axis = plt.gca()
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    return axis


def arrow(axis, tail, tip, colour, **style):
    axis.annotate("", tip, tail, arrowprops={"arrowstyle": "-|>", "linewidth": 2, "color": colour, "mutation_scale": 18,
                                             "shrinkA": 0, "shrinkB": 0, **style})


def replay_ring(frames, place=8):
    """Frames in a ring of places, and two states that are put together from them. frames: (n, 84, 84)."""
    axis, n = canvas(20, 9.6, (9, 4.32)), len(frames)
    axis.set_aspect("equal")

    def frame(k, x, y, size, colour=None):
        axis.imshow(frames[k], cmap="gray", extent=(x - size, x + size, y - size, y + size), zorder=2, vmin=0, vmax=1)
        axis.add_patch(plt.Rectangle((x - size, y - size), 2 * size, 2 * size, fill=False, edgecolor=colour or BLACK,
                                     linewidth=3 if colour else 0.5, zorder=3))

    def at(k, radius):
        angle = np.pi / 2 - 2 * np.pi * k / n
        return 4.8 + radius * np.cos(angle), 4.8 + radius * np.sin(angle)

    for k in range(n):
        frame(k, *at(k, 3.4), 0.62)
        axis.text(*at(k, 2.35), str(k), ha="center", va="center", fontsize=11)
    for first, radius, colour in ((place - 3, 4.4, BLUE), (place - 2, 4.65, ORANGE)):
        axis.plot(*np.array([at(k, radius) for k in np.linspace(first - 0.35, first + 3.35, 40)]).T, color=colour,
                  linewidth=4, solid_capstyle="butt")
    axis.text(4.8, 4.8, f"{n} places,\na frame in each,\nthe oldest is\noverwritten", ha="center", va="center", size=10)
    for y, first, name, colour in ((6.6, place - 3, f"state of place {place}", BLUE),
                                   (2.2, place - 2, "the next state", ORANGE)):
        axis.text(11, y + 1.35, f"{name}: places {first} to {first + 3}", color=BLACK, fontsize=12)
        for j in range(4):
            frame(first + j, 12 + 2.2 * j, y, 1, colour)
    axis.text(11, 4.55, "three of the four frames are the same", fontsize=11)
    axis.set(xlim=(0, 20), ylim=(0, 9.6))
    show(f"A ring of {n} frames. A state is put together from four neighbours; the next state shares three of them")


def target_copy(copy_every):
    """Two networks, and the copy now and then. Below: one weight of each over the updates."""
    figure, (axis, below) = plt.subplots(2, 1, figsize=(9, 4.8), height_ratios=(3, 4))
    axis.set(xlim=(0, 20), ylim=(0, 5))
    axis.axis("off")
    for x, name, note, colour in ((0.5, "local network", "plays, and learns\nat every update", BLUE),
                                  (13, "target network", "values the next state\nin the target", ORANGE)):
        axis.add_patch(plt.Rectangle((x, 0.3), 6.5, 4.4, facecolor=colour, alpha=0.2))
        axis.add_patch(plt.Rectangle((x, 0.3), 6.5, 4.4, fill=False, edgecolor=colour, linewidth=2))
        axis.text(x + 3.25, 3.7, name, ha="center", va="center", fontsize=13, fontweight="bold")
        axis.text(x + 3.25, 1.8, note, ha="center", va="center", fontsize=11)
    arrow(axis, (7.2, 3.6), (12.8, 3.6), BLUE)
    axis.text(10, 4, f"a copy every {copy_every:,} updates", ha="center", fontsize=11)
    arrow(axis, (12.8, 1.2), (7.2, 1.2), ORANGE)
    axis.text(10, 1.6, "target of the update", ha="center", fontsize=11)
    updates = np.arange(5 * copy_every + 1)
    phase = updates / copy_every
    local = phase**0.7 + 0.12 * np.sin(5 * phase) + 0.06 * np.sin(17 * phase)
    below.plot(updates, local, color=BLUE, label="a weight of the local network")
    below.step(updates, local[updates // copy_every * copy_every], color=ORANGE, linewidth=2.5, linestyle="--",
               label="the same weight of the target network")
    below.set(xlabel="update", ylabel="weight (a sketch)", yticks=[], xlim=(0, 5 * copy_every))
    below.xaxis.set_major_formatter("{x:,.0f}")
    below.legend(fontsize=10, loc="upper left")
    show("The local network is copied to the target network now and then, so the target's weights move in steps")


def n_step_line(n, gamma):
    """A time line: which rewards and which state a target takes into account, for one step and for n."""
    axis = canvas(20, 9, (9, 4))
    places = np.linspace(1.2, 18.2, n + 1)
    for y, steps, colour, name in ((6.6, 1, ORANGE, "one step"), (2.2, n, BLUE, f"n = {n} steps")):
        axis.text(0.2, y + 1.75, name, fontsize=12, fontweight="bold")
        axis.plot(places[[0, -1]], [y, y], color=BLACK, linewidth=1, zorder=1)
        for k, x in enumerate(places):
            axis.plot(x, y, "o", markersize=13, color=colour if k in (0, steps) else "white", markeredgecolor=BLACK)
            axis.text(x, y - 1, "$s_t$" if k == 0 else f"$s_{{t+{k}}}$", ha="center", va="center")
        for k in range(steps):
            middle = (places[k] + places[k + 1]) / 2
            arrow(axis, (places[k] + 0.35, y), (places[k + 1] - 0.35, y), colour)
            factor = "" if k == 0 else r"\gamma" if k == 1 else rf"\gamma^{k}"
            axis.text(middle, y + 0.45, f"${factor} r_{{{'t' if k == 0 else f't+{k}'}}}$", ha="center")
        tail = r"\gamma" if steps == 1 else rf"\gamma^{steps}"
        axis.text(places[steps], y + 1.0, rf"$+\ {tail}\,\max\,Q$", ha="center", fontsize=12, fontweight="bold")
    axis.text(0.2, 0.1, f"γ = {gamma}: the network's estimate counts {gamma:.2f} after one step, {gamma**n:.2f} after "
              f"{n}. White: states that the target does not use.", fontsize=10)
    show(f"Two time lines. A one-step target uses one reward and the next state, an n-step target {n} rewards and the "
         f"state {n} steps later")


def ring(memory):
    """The places of a small replay memory as a table; its frames are the numbers 0 (black), 1 (A), 2 (B) …"""
    names = ["black", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    frames = [names[frame.item()] for frame in memory.frames[0, :memory.written[0]]]
    columns = {"place": range(memory.size), "frame": frames + ["-"] * (memory.size - len(frames)),
               **{name: getattr(memory, name)[0] for name in ("actions", "rewards", "ends", "priority")}}
    for name, values in columns.items():
        print(f"{name:9}" + "".join(f"{value if isinstance(value, str) else f'{value:g}':>7}" for value in values))


# ===== Notebook 1: the grid
from grid_qlearning import ARROWS, MOVES, N_STATES, SIZE, Grid  # noqa: E402

GREY, PALE = "#555555", "#BBBBBB"


def agent_environment_loop(agent="acts, and learns\nfrom the reward", environment="follows its rules"):
    """Who hands what to whom in one step. agent, environment: a note in each of the two boxes."""
    plt.figure(figsize=(8, 2.5))
    axis = plt.gca()
    axis.set(xlim=(0, 16), ylim=(0, 5))
    axis.axis("off")
    for x, name, note, color in ((0.1, "agent", agent, BLUE), (11.3, "environment", environment, GREEN)):
        axis.add_patch(plt.Rectangle((x, 0.2), 4.6, 4.6, facecolor=color, alpha=0.15))
        axis.add_patch(plt.Rectangle((x, 0.2), 4.6, 4.6, fill=False, edgecolor=color, linewidth=2))
        axis.text(x + 2.3, 3.6, name, size=15, weight="bold", ha="center", va="center")
        axis.text(x + 2.3, 2.4, note, size=12, ha="center", va="top", linespacing=1.4)
    for y, text, tail, tip, color in ((3.8, "action $a$", 4.9, 11.1, BLUE), (2.3, "reward $r$", 11.1, 4.9, GREEN),
                                      (0.8, "next state $s'$, and: the end?", 11.1, 4.9, GREEN)):
        axis.annotate("", (tip, y), (tail, y), arrowprops={"arrowstyle": "-|>", "linewidth": 2.5, "color": color,
                                                           "mutation_scale": 20, "shrinkA": 0, "shrinkB": 0})
        axis.text(8, y + 0.2, text, size=12, ha="center", va="bottom")
    show("A loop of two boxes. The agent hands an action to the environment. The environment hands back a reward, the "
         "next state, and whether that was the end.")


def squares(axis, title, width, color, line):
    """Lines around the squares of the grid, each `width` units wide."""
    edges = np.arange(SIZE + 1) * width - 0.5
    axis.set(xticks=edges, yticks=edges, xlim=edges[[0, -1]], ylim=edges[[-1, 0]], aspect="equal")
    axis.set_title(title, fontsize=12)
    axis.tick_params(length=0, labelbottom=False, labelleft=False)
    axis.grid(True, color=color, linewidth=line, alpha=1)
    axis.spines[:].set(visible=True, color=color, linewidth=line)


def draw_board(axis, title):
    """The nine squares with their numbers."""
    squares(axis, title, 1, GREY, 1)
    for state in range(N_STATES):
        row, col = divmod(state, SIZE)
        word = {Grid.start: " start", Grid.end: " end"}.get(state, "")
        axis.text(col - 0.44, row - 0.34, f"{state}{word}", color=RED if word else GREY)


def draw_path(axis, states):
    """The steps of an episode on a board: an arrow for a move, a ring for a bump into the edge."""
    colors = plt.get_cmap("viridis")(np.linspace(0.75, 0, len(states) - 1))
    for step, (here, there, color) in enumerate(zip(states, states[1:], colors, strict=False), 1):
        shift = 0.17 * np.array([np.cos(2.4 * step), np.sin(2.4 * step)])  # keeps arrows apart
        tail, tip = (np.array(divmod(state, SIZE)[::-1]) + shift for state in (here, there))
        if here == there:
            axis.plot(*tail, "o", markersize=22, markerfacecolor="none", markeredgewidth=2, color=color)
        else:
            axis.annotate("", tip, tail, arrowprops={"arrowstyle": "-|>", "linewidth": 2, "color": color,
                                                     "shrinkA": 9, "shrinkB": 2})
        axis.text(*tail, step, ha="center", va="center", color=color, weight="bold")


def draw_q(axis, q, title, visits=None, few=10, low=-2.0, high=0.0, cmap="viridis", arrows=True):
    """A table, (9, 8), as a picture: a small square for each move, in its direction, and in the middle the best moves
    (a dot: more than three are equally good). By visits, (9, 8), a move that was tried fewer than `few` times is grey,
    and an arrow if its move was tried fewer than 10 times."""
    visits = np.full(q.shape, 10) if visits is None else visits
    values, seldom = np.full((2, 3 * SIZE, 3 * SIZE), np.nan)
    for state in range(N_STATES):
        row, col = (3 * k + 1 for k in divmod(state, SIZE))  # the middle of the square
        if state == Grid.end:
            axis.text(col, row, "end", ha="center", va="center", color=RED, weight="bold")
            continue
        for action, (down, right) in enumerate(MOVES):
            values[row + down, col + right] = q[state, action]
            seldom[row + down, col + right] = 0.25 if visits[state, action] < few else np.nan
        best = np.flatnonzero(np.isclose(q[state], q[state].max()))
        text = "".join(ARROWS[action] for action in best) if len(best) <= 3 else "•"
        axis.text(col, row, text if arrows else "", size={1: 15, 2: 11, 3: 8}[len(text)], ha="center", va="center",
                  color=BLACK if (visits[state, best] >= 10).all() else PALE)
    squares(axis, title, 3, "white", 4)
    image = axis.imshow(values, cmap=cmap, vmin=low, vmax=high)
    axis.imshow(seldom, cmap="Greys", vmin=0, vmax=1)
    return image


def table_film(episodes, alt, few=1):
    """A GIF with a picture for each episode. episodes: (table, visits of this episode, return) of each."""
    figure = plt.figure(figsize=(7.4, 3.7), dpi=90, layout="none")
    left, right = figure.add_axes((0.01, 0.03, 0.43, 0.86)), figure.add_axes((0.68, 0.17, 0.29, 0.72))
    bar, images, visits, returns = figure.add_axes((0.455, 0.11, 0.02, 0.7)), [], 0, []
    for number, (table, new_visits, total) in enumerate(episodes, 1):
        left.clear()
        right.clear()
        visits, returns = visits + new_visits, [*returns, total]
        image = draw_q(left, table, f"Q-values after episode {number}", visits, few)
        if number == 1:
            figure.colorbar(image, bar, label="Q(s, a), in units of reward")
        right.axhline(-1, color=GREY, linestyle="--", linewidth=1)
        right.plot(range(1, number + 1), returns, color=BLUE)
        right.set(xlim=(0, len(episodes)), ylim=(min(episode[2] for episode in episodes) - 1, 0.5), xlabel="episode")
        right.set_title("return of each episode", fontsize=12)
        figure.canvas.draw()
        images.append(np.array(figure.canvas.buffer_rgba())[:, :, :3])
    plt.close(figure)
    palette = Pillow.fromarray(np.vstack(images[::12])).quantize(128, Pillow.Quantize.MAXCOVERAGE)
    images = [Pillow.fromarray(image).quantize(palette=palette, dither=Pillow.Dither.NONE) for image in images]
    data = io.BytesIO()
    images[0].save(data, "GIF", save_all=True, append_images=images[1:], loop=0,
                   duration=[100] * (len(images) - 1) + [3000])
    display(Image(data.getvalue(), format="png", width=666, alt=alt))  # "png": as in `clip`


def band(axis, runs, color, label=None, style="-", window=10):
    """runs: the returns of several trainings, (runs, episodes). Their mean, and the middle 80 % of them."""
    means = np.array([rolling(returns, window)[window - 1:] for returns in runs])
    episodes = range(window, window + means.shape[1])
    axis.plot(episodes, means.mean(axis=0), style, color=color, label=label)
    axis.fill_between(episodes, *np.quantile(means, (0.1, 0.9), axis=0), color=color, alpha=0.2, linewidth=0)
    axis.set_xlabel("episode")
    return episodes, means.mean(axis=0)


def learner_panels(curves, alt):
    """A panel for each {name: (runs, episodes)}: this learner with its band, and the others as grey lines."""
    figure, axes = plt.subplots(1, len(curves), figsize=(9.4, 3.6), sharey=True)
    colors = (BLUE, RED, GREEN)
    lines = [band(axis, runs, color) for axis, runs, color in zip(axes, curves.values(), colors, strict=True)]
    for axis, name in zip(axes, curves, strict=True):
        for line in lines:
            axis.plot(*line, color=PALE, linewidth=1, zorder=1)
        axis.axhline(-1, color=GREY, linestyle="--", linewidth=1)
        axis.set_title(name, fontsize=12)
    axes[0].set_ylabel("return (mean of 10 episodes)")
    show(alt)


def old_and_new(old, new, alt):
    """Returns and tables of two settings. old, new: (agent, returns, visits) of each of several trainings."""
    figure, axes = plt.subplots(1, 3, figsize=(9.8, 3.4), width_ratios=(6, 5, 5))
    for axis, name, runs, color, style in ((axes[1], "old", old, BLUE, "-"), (axes[2], "new", new, RED, "--")):
        band(axes[0], [returns for _, returns, _ in runs], color, name, style)
        agent, _, visits = runs[0]
        image = draw_q(axis, agent.action_values(), f"{name}, first training", visits, few=1)
    axes[0].set_title(f"{len(old)} trainings each", fontsize=12)
    axes[0].set_ylabel("return (mean of 10 episodes)")
    axes[0].legend(loc="lower right")
    figure.colorbar(image, ax=axes, label="Q(s, a), in units of reward", shrink=0.8)
    show(alt)
