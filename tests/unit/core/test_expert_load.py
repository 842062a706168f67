"""Which experts each domain's tokens go to, counted by a stand-in of Megatron's router."""

from types import SimpleNamespace

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core.transformer.moe.router import Router  # noqa: E402

from megatron_dwm.core.expert_load import ExpertLoad, load_by_domain  # noqa: E402
from megatron_dwm.errors import DWMError  # noqa: E402

S, B, M, E = 5, 3, 2, 4


class StandIn(Router):
    """Sends each token where it says: tokens are `[s, b]` numbers of experts."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def forward(self, experts):
        chosen = torch.nn.functional.one_hot(experts.reshape(-1), E).bool()
        return chosen.float(), chosen

    def routing(self, logits):
        return logits


@pytest.fixture(scope="module")
def alone():
    import torch.distributed as dist

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield SimpleNamespace(tp=dist.group.WORLD, dp_cp=dist.group.WORLD)
    if started:
        dist.destroy_process_group()


def test_tokens_are_counted_by_the_domain_of_their_sample(alone):
    model = torch.nn.Sequential(StandIn(), StandIn())
    load = ExpertLoad(model, 1)
    domains = torch.tensor([0, 1, -1, 1, 1, 4])  # two micro-batches of three samples
    generator = torch.Generator().manual_seed(1)
    expected = torch.zeros(2, 6, E)
    for _ in range(2):
        with load.listening(domains, M):
            for k in range(M):
                for layer, router in enumerate(model):
                    experts = torch.randint(0, E, (S, B), generator=generator)
                    with torch.no_grad():
                        router(experts)  # what recomputation throws away
                    router(experts)
                    for t in range(S):
                        for i in range(B):
                            place = int(domains[k * B + i]) + 1
                            expected[layer, place, experts[t, i]] += 1
    model[0](torch.zeros(S, B, dtype=torch.long))  # nobody looks on
    found = load.take(alone).float()
    assert torch.equal(found[:, :6], expected) and found[:, 6:].sum() == 0
    assert load.take(alone) is None


def test_one_domain_on_an_expert_of_its_own_is_far_from_all():
    counts = torch.zeros(1, 3, E, dtype=torch.float64)
    counts[0, 1] = 10  # even
    counts[0, 2, 3] = 40  # all on one
    found = load_by_domain(counts, ["even", "one"])
    assert found["even"] == pytest.approx({"imbalance": 1.0, "distance": 0.375})
    assert found["one"] == pytest.approx({"imbalance": 4.0, "distance": 0.375})


def test_a_model_without_experts_is_refused():
    with pytest.raises(DWMError, match="--dwm-log-expert-load is about MoE layers"):
        ExpertLoad(torch.nn.Linear(2, 2), 1)
