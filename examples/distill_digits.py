"""A small student learns drawn digits from labels, and from a teacher's logits as well: accuracy by epoch.

    python examples/distill_digits.py [--images 2000] [--temperature 3] [--out distill_digits.png] [--quick]

The images are made here: a 5 × 7 font, turned, sheared, scaled, shifted and put under noise. A convolutional
teacher sees 6000 of them. Then the same multilayer perceptron, 11 times smaller, is trained twice on the same
few images, from the same start and in the same order: with cross-entropy, and with
``lissom.nn.DistillationLoss``. Everything is repeated over three seeds. Half a minute on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lissom.nn

FONT = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
"""Seven rows of five dots per digit."""

SIZE = 16
NOISE = 0.35
BATCH = 50


@dataclass(frozen=True)
class Digits:
    """``images`` ``[N, 1, SIZE, SIZE]`` and their ``labels`` ``[N]``."""

    images: Tensor
    labels: Tensor


def draw_digits(count: int, seed: int) -> Digits:
    """``count`` digits, each drawn in a way of its own."""
    g = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=g)

    font = torch.tensor([[[float(dot) for dot in row] for row in glyph.split()] for glyph in FONT])
    labels = torch.randint(10, (count,), generator=g)
    angle, shear = between(-0.4, 0.4), between(-0.3, 0.3)
    wide, high = between(1.3, 2.2), between(1.1, 1.7)
    across = torch.stack([wide * angle.cos(), wide * (shear - angle.sin()), between(-0.35, 0.35)], -1)
    down = torch.stack([high * angle.sin(), high * angle.cos(), between(-0.25, 0.25)], -1)
    grid = F.affine_grid(torch.stack([across, down], 1), [count, 1, SIZE, SIZE], align_corners=False)
    images = F.grid_sample(font[labels][:, None], grid, align_corners=False)
    return Digits(images + NOISE * torch.randn(images.shape, generator=g), labels)


def make_teacher() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (SIZE // 4) ** 2, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def make_student() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 24), nn.ReLU(), nn.Linear(24, 10))


def accuracy(model: nn.Module, data: Digits) -> float:
    with torch.no_grad():
        return float((model(data.images).argmax(-1) == data.labels).float().mean())


def train(
    model: nn.Module,
    data: Digits,
    epochs: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    test: Digits,
    seed: int,
) -> list[float]:
    """Accuracy on ``test`` after each epoch; ``loss`` takes logits and which of the images they are of."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(seed)
    curve = []
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.labels), generator=g).split(BATCH):
            optimizer.zero_grad()
            loss(model(data.images[chosen]), chosen).backward()
            optimizer.step()
        curve.append(accuracy(model, test))
    return curve


def run(images: int, temperature: float, epochs: int, seeds: int, teacher_images: int) -> dict[str, Tensor]:
    """Accuracies ``[seeds, epochs]`` of each kind of student, and ``[seeds]`` of the teachers."""
    found: dict[str, list[list[float]]] = {"labels only": [], "distilled": []}
    teachers = []
    test = draw_digits(4000, seed=10**6)
    for seed in range(seeds):
        torch.manual_seed(seed)
        much = draw_digits(teacher_images, seed=1000 + seed)
        teacher = make_teacher()
        train(teacher, much, 4, lambda z, i, y=much.labels: F.cross_entropy(z, y[i]), test, seed)
        teachers.append(accuracy(teacher, test))

        few = draw_digits(images, seed=seed)
        with torch.no_grad():
            knowledge = teacher(few.images)
        distillation = lissom.nn.DistillationLoss(temperature=temperature, ce_weight=0.5)
        losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "labels only": lambda z, i, y=few.labels: F.cross_entropy(z, y[i]),
            "distilled": lambda z, i, d=distillation, t=knowledge, y=few.labels: d(z, t[i], y[i]),
        }
        for name, loss in losses.items():
            torch.manual_seed(seed)  # the same start
            found[name].append(train(make_student(), few, epochs, loss, test, seed))
    return {name: torch.tensor(curves) for name, curves in found.items()} | {
        "teacher": torch.tensor(teachers)
    }


def print_table(found: dict[str, Tensor]) -> None:
    """Mean ± standard deviation over the seeds, at some epochs."""
    epochs = found["distilled"].shape[1]
    shown = sorted({max(1, epochs // 8), max(1, epochs // 4), max(1, epochs // 2), epochs})
    print(f"{'test accuracy, %':<18}" + "".join(f"{f'epoch {e}':>14}" for e in shown))
    for name in ("labels only", "distilled"):
        cells = [found[name][:, e - 1] * 100 for e in shown]
        print(f"{name:<18}" + "".join(f"{f'{c.mean():.1f} ± {c.std(correction=0):.1f}':>14}" for c in cells))
    print(f"{'teacher':<18}{100 * float(found['teacher'].mean()):>{14 * len(shown)}.1f}")


def draw(found: dict[str, Tensor], path: Path, title: str) -> bool:
    """The curves as a plot; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, color in (("distilled", "#c2410c"), ("labels only", "#1d4ed8")):
        curves = 100 * found[name]
        x, mean = range(1, curves.shape[1] + 1), curves.mean(0)
        axis.plot(x, mean, color=color, label=f"student, {name}")
        axis.fill_between(x, curves.amin(0), curves.amax(0), color=color, alpha=0.15, linewidth=0)
    teacher = float(100 * found["teacher"].mean())
    axis.axhline(teacher, color="#6b7280", linestyle="--", linewidth=1, label="teacher")
    axis.set(xlabel="epoch", ylabel="test accuracy, %", title=title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000, help="that the students see (default 2000)")
    parser.add_argument("--temperature", type=float, default=3.0, help="(default 3)")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("distill_digits.png"), help="the plot")
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs: a smoke run")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.epochs, options.seeds = 300, 4, 1
    began = time.perf_counter()
    found = run(
        options.images, options.temperature, options.epochs, options.seeds, 1500 if options.quick else 6000
    )
    sizes = [sum(p.numel() for p in model.parameters()) for model in (make_student(), make_teacher())]
    print(
        f"student {sizes[0]:,} parameters, teacher {sizes[1]:,}; {options.images} images; "
        f"{options.seeds} seed{'s' if options.seeds > 1 else ''}"
    )
    print_table(found)
    title = (
        f"{options.images} drawn digits, T = {options.temperature:g}; mean and range of {options.seeds} runs"
    )
    if draw(found, options.out, title):
        print(f"wrote {options.out}")
    else:
        print("no plot: it needs matplotlib (pip install matplotlib)")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
