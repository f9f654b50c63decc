"""Sparse training of a Q-network with torchrl: its loss, its replay buffer, its target network.

    python examples/torchrl_dqn.py

An agent learns to walk along a corridor. Pass the policy to `sparsify`, not the loss module: the
loss also holds the target network, an average of the weights, which stays dense and is not used
after training. Requires: pip install torch-feather torchrl
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.modules import MLP, QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate

import torch_feather as feather

PLACES, BATCH = 8, 64


def experience(count: int) -> TensorDict:
    """Return random steps in a corridor; the last place has the reward."""
    random = torch.Generator().manual_seed(0)
    place = torch.randint(PLACES - 1, (count,), generator=random)
    action = torch.randint(2, (count,), generator=random)  # 0: left, 1: right
    after = (place + 2 * action - 1).clamp(0, PLACES - 1)
    done = (after == PLACES - 1)[:, None]

    def seen(where: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(where, PLACES).float()

    following = {
        "observation": seen(after), "reward": done.float(), "done": done, "terminated": done,
    }  # fmt: skip
    return TensorDict({"observation": seen(place), "action": action, "next": following}, [count])


def train(folder: Path, steps: int, stop: int | None = None) -> QValueActor:
    """Train, from the checkpoint in `folder` if it exists; `stop` ends the run after that step."""
    torch.manual_seed(0)
    network = MLP(in_features=PLACES, out_features=2, num_cells=[64, 64])
    policy = QValueActor(network, in_keys=["observation"], action_space="categorical")
    loss = DQNLoss(policy, action_space="categorical", delay_value=True)
    loss.make_value_estimator(gamma=0.9)
    average = SoftUpdate(loss, eps=0.95)
    buffer = ReplayBuffer(storage=LazyTensorStorage(512), batch_size=BATCH)
    buffer.extend(experience(512))

    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    sparsifier = feather.sparsify(policy, optimizer, sparsity=0.9, total_steps=steps)  # new
    file = folder / "checkpoint.pt"
    if file.exists():
        state = torch.load(file)
        loss.load_state_dict(state["loss"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
    while sparsifier.step_count < (steps if stop is None else stop):
        loss(buffer.sample())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        average.step()
    state = {"loss": loss.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"random": torch.get_rng_state()}, file)
    if stop is None:
        sparsifier.finalize()  # new
    return policy


def main(steps: int = 200) -> None:
    """Train in two parts, then walk."""
    with TemporaryDirectory() as folder:
        train(Path(folder), steps, stop=steps // 2)
        policy = train(Path(folder), steps)
    places = torch.eye(PLACES)[:-1]
    actions = policy(TensorDict({"observation": places}, [len(places)]))["action"]
    right = (actions == 1).float().mean()
    zeros = feather.sparsity(policy)
    print(f"right at {right:.0%} of the places, {zeros:.2%} of the weights are zero")


if __name__ == "__main__":
    main()
