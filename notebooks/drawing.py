"""Drawing for notebook 2: colours, pictures side by side, curves, clips. Nothing here is about learning."""
import io

import cv2
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display
from PIL import Image as Pillow
from PIL import ImageSequence

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
SKY, BLACK = "#56B4E9", "#000000"
plt.rcParams.update({"font.size": 12, "axes.grid": True, "grid.alpha": 0.3,
                     "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True,
                     "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK])})


def show(alt):
    """The current figure, with a text for readers who do not see it."""
    png = io.BytesIO()
    plt.savefig(png, format="png", dpi=100, bbox_inches="tight")
    plt.close()
    display(Image(png.getvalue(), format="png", alt=alt))


def rgb(picture):
    """The emulator's picture (240, 256, 4) uint8 in B, G, R, unused -> (240, 256, 3) in R, G, B."""
    return picture[:, :, 2::-1]


def panel(axis, image, title, note="", **font):
    axis.imshow(image, cmap="gray", vmin=0, vmax=255 if image.dtype == np.uint8 else 1, interpolation="nearest")
    axis.set_title(title, fontsize=11, **font)
    axis.set_xlabel(note, fontsize=10)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(True)


def pictures(images, titles, alt, height=2.6):
    """Pictures side by side, each below its title."""
    figure, axes = plt.subplots(1, len(images), figsize=(9, height), squeeze=False)
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


def apart(heights, count, distance):
    """Where `heights` has its greatest values: `count` places that far apart, from left to right."""
    found = []
    for place in np.argsort(heights)[::-1]:
        if len(found) < count and all(abs(place - other) > distance for other in found):
            found.append(int(place))
    return sorted(found)


def rolling(values, window):
    """The mean of the last `window` values, at each place."""
    return [np.mean(values[max(0, k - window):k]) for k in range(1, len(values) + 1)]


def steps_axis(axis, label="environment steps (4 frames each)"):
    axis.set_xlabel(label)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter("{x:,.0f}")


def reward_curve(rows, window, random_returns):
    """A point for each episode, the rolling mean, and the return of random play as a band."""
    steps, returns, cleared = (np.array([row[name] for row in rows]) for name in ("env_steps", "return", "cleared"))
    mean, error = np.mean(random_returns), np.std(random_returns) / len(random_returns)**0.5
    plt.figure(figsize=(9, 4.5))
    plt.scatter(steps, returns, s=8, color=SKY, alpha=0.6, label="one episode")
    plt.plot(steps, rolling(returns, window), color=BLUE, linewidth=2.5, label=f"mean of the last {window}")
    plt.plot(steps[cleared > 0], returns[cleared > 0], "*", color=ORANGE, label=f"cleared: {cleared.sum()}")
    plt.axhspan(mean - 2 * error, mean + 2 * error, color=RED, alpha=0.3,
                label="random play (mean ± 2 standard errors)")
    plt.ylabel("total reward of an episode (points)")
    plt.legend(fontsize=10, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    steps_axis(plt.gca())
    show(f"Return of {len(rows)} training games over the steps: the rolling mean ends at "
         f"{rolling(returns, window)[-1]:.0f} points, random play has {mean:.0f}")


def with_bars(picture, values, action, names, longest):
    """A frame, and on its right a bar for each action: the best one's is full, `longest` points less make it empty."""
    wide = np.zeros((240, 376, 3), np.uint8)
    wide[:, :256] = picture[:, :, :3]
    for a, buttons in enumerate(names):
        length = int(110 * np.clip(1 + (values[a] - values.max()) / longest, 0.02, 1))
        colour = (0, 159, 230) if a == action else (178, 114, 0)  # B, G, R
        y = 24 + 48 * a
        cv2.putText(wide, "+".join(buttons), (262, y), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255,) * 3, 1)
        cv2.rectangle(wide, (262, y + 8), (262 + length, y + 20), colour, -1)
    return wide


def clip(path, alt, width, every=1):
    """A GIF in the page, with only every so many of its pictures."""
    with Pillow.open(path) as gif:
        frames = [frame.copy() for frame in ImageSequence.Iterator(gif)][::every]
        duration = gif.info["duration"] * every
    data = io.BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    display(Image(data.getvalue(), format="png", width=width, alt=alt))  # "png": some pages show no GIF, browsers do


def ring(memory):
    """The places of a small replay memory as a table; its frames are the numbers 0 (black), 1 (A), 2 (B) …"""
    names = ["black", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    frames = [names[frame.item()] for frame in memory.frames[0, :memory.written[0]]]
    columns = {"place": range(memory.size), "frame": frames + ["-"] * (memory.size - len(frames)),
               **{name: getattr(memory, name)[0] for name in ("actions", "rewards", "ends", "priority")}}
    for name, values in columns.items():
        print(f"{name:9}" + "".join(f"{value if isinstance(value, str) else f'{value:g}':>7}" for value in values))
