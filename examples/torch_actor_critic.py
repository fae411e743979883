"""An actor and a critic that learn to balance a pole, in torch: advantage actor-critic, with fastopt's AdamW.

    python examples/torch_actor_critic.py

Reinforcement learning makes many small steps on small networks, where an optimizer's overhead counts. One sees the
mean length of an episode rise from about 20 steps (random) to more than 100. The cart and its pole are simulated here,
32 at a time, with the equations of Barto, Sutton and Anderson (1983); an episode ends when the pole falls, the cart
leaves the track, or after 200 steps. Needs torch: ``pip install 'fastopt[torch]'``.
"""

from __future__ import annotations

import sys

import numpy as np

try:
    import torch
except ImportError:
    sys.exit("torch_actor_critic.py needs torch: pip install 'fastopt[torch]'")

import fastopt.torch

CARTS, HORIZON, UPDATES, DISCOUNT, LONGEST = 32, 16, 150, 0.99, 200


class Carts:
    """A pole on each of CARTS carts: position, speed, angle, angular speed; an action pushes to the left or right."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.state = self.start(CARTS)
        self.age = np.zeros(CARTS, int)
        self.lengths: list[int] = []
        """Steps of every finished episode."""

    def start(self, count: int) -> np.ndarray:
        """Return states near the upright one."""
        return self.rng.uniform(-0.05, 0.05, (count, 4)).astype(np.float32)

    def step(self, actions: np.ndarray) -> np.ndarray:
        """Push each cart for 0.02 s; return which episodes have ended, and begin those again."""
        _, speed, angle, turning = self.state.T
        force = np.where(actions == 1, 10.0, -10.0)
        sine, cosine = np.sin(angle), np.cos(angle)
        push = (force + 0.05 * turning**2 * sine) / 1.1
        turn = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        move = push - 0.05 * turn * cosine / 1.1
        self.state += 0.02 * np.stack([speed, move, turning, turn], axis=1).astype(np.float32)
        self.age += 1
        over = (abs(self.state[:, 0]) > 2.4) | (abs(self.state[:, 2]) > 0.21) | (self.age >= LONGEST)
        self.lengths += self.age[over].tolist()
        self.state[over] = self.start(over.sum())
        self.age[over] = 0
        return over


def main() -> None:
    """Alternate between HORIZON pushes of all carts and one update of actor and critic."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the networks are small
    carts = Carts(np.random.default_rng(0))
    actor = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
    critic = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    groups = [{"params": actor.parameters(), "lr": 3e-3}, {"params": critic.parameters(), "lr": 1e-2}]
    opt = fastopt.torch.AdamW(groups, weight_decay=0.0, max_norm=0.5)  # clips in the same launch
    for update in range(1, UPDATES + 1):
        log_chances, values, entropies, overs = [], [], [], []
        for _ in range(HORIZON):
            state = torch.from_numpy(carts.state.copy())
            policy = torch.distributions.Categorical(logits=actor(state))
            action = policy.sample()
            log_chances.append(policy.log_prob(action))
            values.append(critic(state)[:, 0])
            entropies.append(policy.entropy())
            overs.append(torch.from_numpy(carts.step(action.numpy())))

        with torch.no_grad():  # returns, from the last step back; the reward of each step is 1
            future = critic(torch.from_numpy(carts.state))[:, 0]
            returns = []
            for over in reversed(overs):
                future = 1.0 + DISCOUNT * torch.where(over, 0.0, future)
                returns.insert(0, future)
        advantage = torch.stack(returns) - torch.stack(values)
        loss = -(torch.stack(log_chances) * advantage.detach()).mean()
        loss = loss + 0.5 * advantage.square().mean() - 0.01 * torch.stack(entropies).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        if update % 30 == 0:
            print(f"update {update:3d}   mean length of the last 50 episodes {np.mean(carts.lengths[-50:]):.0f}")


if __name__ == "__main__":
    main()
