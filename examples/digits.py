"""Train a small convolutional network on real handwritten digits, watched by gradlens.

    python examples/digits.py --run runs/digits
    tensorboard --logdir runs

The two lines that watch are marked. Everything else is an ordinary training loop.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits
from torch import nn

import gradlens


def digits():
    """1,797 images of 8 x 8 pixels, shuffled once; the last 297 are for testing."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order[:1500]], y[order[:1500]]), (x[order[1500:]], y[order[1500:]])


class Net(nn.Module):
    """Two convolutions and two linear layers, 22,000 weights."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 2 * 2, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/digits"), help="where the records go (made anew)")
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    if (args.run / "run.json").exists():
        shutil.rmtree(args.run)  # the demo starts from scratch; without this a run is continued

    torch.manual_seed(0)
    (x, y), (test_x, test_y) = digits()
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=50, shuffle=True)

    lens = gradlens.watch(model, optimizer, run=args.run)  # <- the first line

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=not sys.stdout.isatty()) as progress:
        task = progress.add_task("training", total=args.epochs * len(loader))
        for _ in range(args.epochs):
            for batch_x, batch_y in loader:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(batch_x), batch_y)
                loss.backward()
                lens.observe(loss=loss, batch_size=len(batch_x))  # optional: the loss beside the gradients
                optimizer.step()
                progress.update(task, advance=1, description=f"training, loss {loss.item():.3f}")

    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean()
    print(f"\n{accuracy:.1%} of {len(test_y)} unseen digits are recognised.\n")
    print(lens.report() + "\n")
    weight = lens.weights(top=1).iloc[0]
    print(lens.explain(weight["parameter"], weight["index"]))

    lens.close()  # <- the second line (a forgotten close() is done at exit)

    tensorboard = Path(sys.executable).parent / "tensorboard"
    try:
        command = tensorboard.relative_to(Path.cwd())
    except ValueError:
        command = Path("tensorboard")
    print(f"\nThe dashboard:  {command} --logdir {args.run.parent}\nand open http://localhost:6006")


if __name__ == "__main__":
    main()
