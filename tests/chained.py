"""What a process holds that trains some stages of a network beside others."""

import time

import torch
from torch import nn

from greedy.base.ranks import Ranks
from greedy.base.relay import Relay
from greedy.build.cut_network import CutNetwork
from greedy.losses import PredSim, make_heads
from greedy.memory.baselines import NetworkDemand
from greedy.memory.counting import Counter
from greedy.models import cut, shapes
from greedy.steps.guard import Guard
from greedy.steps.step import Learner
from greedy.steps.strategies import Joint
from greedy.stores.source import Batch

ROWS, CLASSES, STEPS = 64, 4, 6
PARTS = [range(1), range(1, 2), range(2, 4)]
SLEEPS = [0.0, 0.05, 0.15]  # so that batches queue up


def hold_what_was_planned(ranks: Ranks) -> None:
    """Trains for some steps, of which the last process takes the longest, and checks the plan."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()] * 2
    stages = cut(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)))
    network = CutNetwork(stages, shapes(stages, (3, 16, 16)), PredSim(), CLASSES)
    own = PARTS[ranks.rank]
    learners = []
    for position in own:
        loss = network.losses("joint")[position]
        heads = make_heads(loss, network.shapes[position].hidden, CLASSES)
        learner = Learner(stages[position], heads, loss, CLASSES, "float32")
        learner.optimizer = torch.optim.Adam(learner.parameters(), fused=True)
        learner.train()
        learners.append(learner)
    relay = Relay(ranks)
    strategy = Joint(learners, relay)
    images = (torch.randn(ROWS, 3, 16, 16) for _ in range(STEPS))
    inputs = relay.receive([ROWS] * STEPS, training=True) if ranks.rank else images
    with Counter() as counter:
        counter.add([p for learner in learners for p in learner.parameters()])
        for position, x in enumerate(inputs):
            time.sleep(SLEEPS[ranks.rank])
            batch = Batch(torch.arange(ROWS) % CLASSES, x.__getitem__)
            strategy.step(batch, [None] * len(learners), Guard(), position)
    ranks.meet()
    planned = NetworkDemand(network, ROWS, "joint", own=own).peak()
    assert counter.peak <= planned + 2**16, (ranks.rank, counter.peak, planned)
