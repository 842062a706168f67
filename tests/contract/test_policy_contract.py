"""What every weight policy promises, checked on all of them: as `check_estimator` does.

    mean one in expectation, finite and not negative, also with a sample that is not finite;
    no weight depends on how the samples are cut into micro-batches, nor on their order;
    a state that was saved and loaded goes on bit for bit;
    a micro-batch that is weighed again (Megatron's rerun machine) is weighed alike.

The samples are made up: useful ones have lower losses and states of their own, and the influence
says so, with noise. What this does not exercise: more than one rank (tests/distributed), and the
trainer (tests/functional).
"""

import ast
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

from megatron_dwm.config import DWMConfig  # noqa: E402
from megatron_dwm.config.policy_table import BUILT_IN, Needs, policy_needs  # noqa: E402
from megatron_dwm.core.topology import Megatron, OneProcess  # noqa: E402
from megatron_dwm.policies.base import (  # noqa: E402
    PolicyContext,
    SampleView,
    StepView,
    WeightPolicy,
    policy_class,
)
from megatron_dwm.policies.combined import build_policy  # noqa: E402
from megatron_dwm.weighting_model.scorer import Update  # noqa: E402

N, S, H = 32, 12, 8
USEFUL = torch.arange(N) % 2 == 0


class Own(WeightPolicy):
    """A user's policy, named by its path: longer samples weigh more."""

    needs = Needs(losses=True)

    def weights(self, view: SampleView) -> torch.Tensor:
        lengths = view.mask.sum(1)
        return torch.where(lengths > 0, lengths / (S - 1), 1.0)


def of_the_tutorial() -> str:
    """Makes the module of `docs/tutorials/your_own_policy.py`; returns the policy's name."""
    script = Path(__file__).resolve().parents[2] / "docs/tutorials/your_own_policy.py"
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "POLICY":
            module = sys.modules["policy_of_the_tutorial"] = ModuleType("policy_of_the_tutorial")
            exec(ast.literal_eval(node.value), vars(module))
    return "policy_of_the_tutorial:ByLoss"


class StandInScorer:
    """In the place of a transformer: a linear score of the first token, learned by plain SGD."""

    def __init__(self) -> None:
        self.table = torch.zeros(16)

    def scores(self, tokens, num_microbatches):
        return self.table[torch.cat(tokens)[:, 0].long()].clone()

    def update(self, tokens, num_microbatches, gradient):
        self.table.index_add_(0, torch.cat(tokens)[:, 0].long(), -2.0 * gradient.float())
        return Update(True, 1.0)

    def bad_parameters(self):
        return ~torch.isfinite(self.table).all()


CASES = {
    **{name: {"policy": name} for name in BUILT_IN if name != "model"},
    "model-chain": {"policy": "model", "rule": "chain"},
    "model-regression": {"policy": "model"},
    "model-softmax": {"policy": "model", "map": "softmax"},
    "shuffled-model": {"policy": "shuffled", "form": "model", "rule": "chain"},
    "head-guarded": {
        "policy": "head", "max_weight": 1.5, "uniform_mix": 0.1, "min_effective_samples": 0.9,
    },
    "head-ungated": {"policy": "head", "gate": "off"},
    "own": {"policy": f"{__name__}:Own"},
    "own-of-the-tutorial": {"policy": of_the_tutorial()},
    "extremes-sharp": {"policy": "extremes", "loss_temperature": 0.4},
    "linupper-cold": {"policy": "linupper", "loss_temperature": 1e-3},
    "curriculum-root": {
        "policy": "curriculum", "curriculum_pacing": "root", "curriculum_order": "descending",
    },
    "head+curriculum": {"policy": "head+curriculum", "curriculum_pacing": "step"},
    "model+static": {"policy": "model+static"},
    "domains+linupper": {"policy": "domains+linupper"},
    "influence+own": {"policy": f"influence+{__name__}:Own"},
}  # fmt: skip


@pytest.fixture(scope="module", params=["megatron", "one process"])
def topology(request):
    """Both implementations of the seam; what is right is the same."""
    if request.param == "one process":
        yield OneProcess()
        return
    import torch.distributed as dist

    started = not dist.is_initialized()
    if started:
        store = dist.HashStore()
        dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    world = dist.group.WORLD
    names = ("tp", "pp", "dp", "dp_cp", "cp", "mp")
    yield Megatron(ProcessGroupCollection(**dict.fromkeys(names, world)))
    if started:
        dist.destroy_process_group()


class Batch:
    """One made-up global batch."""

    def __init__(self, number: int, bad: bool = False) -> None:
        g = torch.Generator().manual_seed(1000 + number)
        shift = (~USEFUL).float()
        self.losses = 2 + 0.3 * torch.randn(N, S, generator=g) + shift[:, None]
        self.mask = torch.ones(N, S)
        self.mask[:, -1] = 0
        self.states = torch.randn(S, N, H, generator=g) + shift[None, :, None]
        if bad:
            self.losses[3] = float("nan")
            self.states[:, 3] = float("inf")
        self.influence = (shift - 0.5 + 0.2 * torch.randn(N, generator=g)) * 1e-3
        self.tokens = torch.stack([(~USEFUL).long() + 1] * S, 1)
        self.domains = (~USEFUL).long()
        self.documents = {
            "static_weights": 1 + 2 * USEFUL.double() * torch.rand(N, generator=g).double(),
            "curriculum_by": torch.rand(N, generator=g).double(),
            "reference_losses": 2 + 0.1 * torch.randn(N, generator=g).double(),
        }


class Driver:
    """Takes a policy through steps as the training step does."""

    def __init__(self, topology, values, micro_batch_size=8) -> None:
        config = DWMConfig(**values).with_defaults()
        assert config.problems() == []
        scorer = StandInScorer()
        context = PolicyContext(
            config=config,
            topology=topology,
            device=torch.device("cpu"),
            micro_batch_size=micro_batch_size,
            hidden_size=H,
            sequence_parallel=False,
            scorer=lambda: (scorer, {"num_layers": 1}),
            steps=80,
        )
        self.policy, self.b = build_policy(config.policies, context), micro_batch_size

    def views(self, batch):
        for k, i in enumerate(range(0, N, self.b)):
            part = slice(i, i + self.b)
            yield SampleView(
                k,
                batch.losses[part],
                batch.mask[part],
                batch.states[:, part],
                batch.domains[part],
                {name: numbers[part] for name, numbers in batch.documents.items()},
            )

    def step(self, number, batch=None, order=None, again=False, meta=True):
        batch = batch or Batch(number)
        tokens = [{"tokens": t} for t in batch.tokens.split(self.b)]
        holder = SimpleNamespace(first=lambda: tokens, last=lambda: tokens)
        step = StepView(number, N // self.b, holder, batch.domains)
        if self.policy.needs.influence_ahead:
            self.policy.foresee(step, batch.influence)
        self.policy.begin(step)
        views = list(self.views(batch))
        found = {}
        for _ in range(1 + again):
            for k in order or range(len(views)):
                found[k] = self.policy.weights(views[k])
        if meta and self.policy.needs.influence:
            assert self.policy.observe(step, batch.influence).causes == []
        self.policy.end(step)
        return torch.cat([found[k] for k in sorted(found)])

    def run(self, first, last, **options):
        return torch.stack([self.step(i, **options) for i in range(first, last)])


@pytest.fixture(params=CASES)
def values(request):
    return CASES[request.param]


def test_mean_is_one_in_expectation_and_weights_are_fit_to_train_with(topology, values):
    weights = Driver(topology, values).run(0, 140)
    assert weights.dtype == torch.float32 and weights.shape == (140, N)
    assert torch.isfinite(weights).all() and (weights >= 0).all()
    # The running mean of a product lags behind while its parts change, and weights that differ
    # much take more samples for their mean to be known.
    later = "+" in values["policy"] or "loss_temperature" in values
    settled = slice(60, 140) if later else slice(20, 60)
    assert abs(weights[settled].mean().item() - 1) < 0.02


LEARNING = ["head", "head-ungated", "model-regression", "influence", "domains", "model+static"]


@pytest.mark.parametrize("name", LEARNING)
def test_learned_weights_prefer_what_helps(topology, name):
    weights = Driver(topology, CASES[name]).run(0, 60)[20:]
    assert weights[:, USEFUL].mean() > 1.3 * weights[:, ~USEFUL].mean()


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "shuffled"])
def test_what_settings_are_checked_by_is_what_the_class_needs(name):
    assert policy_needs(name) == policy_class(name).needs


def test_what_several_policies_need_is_what_each_does():
    needs = policy_needs("head+curriculum+rho")
    assert needs == Needs(
        losses=True,
        states=True,
        influence=True,
        map=True,
        documents=("curriculum_by", "reference_losses"),
    )


def test_a_combination_is_the_product_of_its_parts_over_its_running_mean(topology):
    together = Driver(topology, {"policy": "linupper+static"})
    alone = [Driver(topology, {"policy": name}) for name in ("linupper", "static")]
    for number in range(12):
        product = torch.stack([one.step(number).double() for one in alone]).prod(0)
        mean = together.policy.running[0].item()
        together.policy._settle()
        mean = together.policy.running[0].item()
        assert torch.allclose(together.step(number).double(), product / mean, atol=1e-6)
    assert abs(mean - 1) > 0.01  # the means of both are one, and that of the product is not


@pytest.mark.parametrize("pacing, middle", [("linear", 0.6), ("root", 0.7211), ("step", 0.6)])
def test_a_curriculum_begins_with_the_easiest_and_ends_with_all(topology, pacing, middle):
    driver = Driver(topology, {"policy": "curriculum", "curriculum_pacing": pacing})
    shares = {}
    for number in range(60):
        batch = Batch(number)
        weights = driver.step(number, batch)
        shares[number] = driver.policy.figures()["curriculum"]
        kept = weights > 0
        places = batch.documents["curriculum_by"]
        if number and kept.any() and not kept.all():
            assert places[kept].max() < places[~kept].min()
        if number > 20:
            assert abs(kept.float().mean() - shares[number]) < 0.25
    assert shares[0] == 0.2 and shares[20] == pytest.approx(middle, abs=1e-3)
    assert shares[40] == 1.0 and torch.equal(weights, torch.ones(N))


@pytest.mark.parametrize("ties", ["all alike", "two numbers", "close"])
def test_a_curriculum_of_ties_keeps_the_mean_at_one(topology, ties):
    """Where the share ends among samples whose numbers are alike, they count in part."""
    driver = Driver(topology, {"policy": "curriculum", "curriculum_share": 1.0})
    weights = []
    for number in range(60):
        batch = Batch(number)
        numbers = batch.documents["curriculum_by"]
        if ties == "all alike":
            numbers[:] = 0.5
        elif ties == "two numbers":
            numbers[:] = torch.where(numbers < 0.6, 0.3, 0.8)
        else:
            numbers[:] = 0.5 + 1e-4 * numbers
        weights.append(driver.step(number, batch))
    if ties != "two numbers":  # a sample of another bin is none
        assert torch.allclose(torch.stack(weights), torch.ones(60, N), atol=1e-6)
    assert abs(torch.stack(weights).mean() - 1) < 0.03
    assert max(one.max() for one in weights) < 1 / 0.2 + 1e-6


def test_excess_losses_that_fall_keep_the_mean_at_one(topology):
    """Of a model that has begun to train: everything falls, far above the reference's losses."""
    driver, means = Driver(topology, {"policy": "rho"}), []
    for number in range(140):
        batch = Batch(number)
        batch.losses += max(0.0, 8 - 0.2 * number)
        weights = driver.step(number, batch)
        means.append(weights.mean().item())
        if number < 2:
            assert torch.equal(weights, torch.ones(N))
    assert 0.7 < min(means) and max(means) < 1.4
    assert abs(sum(means[110:]) / 30 - 1) < 0.05 and weights.std() > 0.2


def test_excess_losses_of_two_samples_say_which_counts_more(topology):
    driver = Driver(topology, {"policy": "rho"})
    driver.run(0, 20)
    batch = Batch(20)
    batch.losses[:] = 2.5
    batch.documents["reference_losses"][:] = 2.5
    batch.documents["reference_losses"][1] = 1.0  # a reference model finds it easy
    weights = driver.step(20, batch)
    assert weights[1] > 1.2 * weights[0]


def test_states_that_drift_drop_no_batch(topology):
    """As of a model that has begun to train: all features of all samples move, and then stop."""
    driver, means = Driver(topology, CASES["head"]), []
    for number in range(90):
        batch = Batch(number)
        drift = 0.6 * min(number, 40)
        batch.states += drift
        batch.losses -= 0.05 * min(number, 40)
        weights = driver.step(number, batch)
        means.append(weights.mean().item())
    assert 0.5 < min(means[:60]) and max(means[:60]) < 2
    assert weights[USEFUL].mean() > 1.3 * weights[~USEFUL].mean()


def test_domains_without_a_number_share_a_score(topology):
    driver = Driver(topology, {"policy": "domains", "gate": "off"})
    driver.run(0, 20)
    batch = Batch(20)
    batch.domains[:4] = -1
    weights = driver.step(20, batch)
    assert weights[:4].std() == 0 and torch.isfinite(weights).all()
    batch.domains[:] = 7  # a domain that no meta step has seen
    assert driver.step(21, batch, meta=False).std() == 0


def test_shuffled_weights_know_nothing(topology):
    weights = Driver(topology, CASES["shuffled"]).run(0, 60)[20:]
    assert weights.std() > 0.2
    assert abs(weights[:, USEFUL].mean() - weights[:, ~USEFUL].mean()) < 0.1


@pytest.mark.parametrize("name", ["shuffled", "head+curriculum", "head", "linupper"])
def test_what_a_gate_holds_back_says_so(topology, name):
    driver = Driver(topology, {"policy": name})
    driver.run(0, 1)
    gated = name != "linupper"
    assert driver.policy.opening == (0.0 if gated else 1.0)
    driver.run(1, 40)
    assert driver.policy.opening == 1.0


def test_a_sample_that_is_not_finite_spoils_no_other(topology, values):
    driver = Driver(topology, values)
    driver.run(0, 8)
    driver.policy.bad_scores()
    weights = driver.step(8, Batch(8, bad=True), meta=False)
    assert torch.isfinite(weights).all()
    after = driver.run(9, 12, meta=False)
    assert torch.isfinite(after).all() and not bool(driver.policy.broken())


def test_no_weight_depends_on_the_cut_into_micro_batches(topology, values):
    whole = Driver(topology, values, 16).run(0, 12)
    small = Driver(topology, values, 2).run(0, 12)
    assert (whole - small).abs().max() < 1e-6


def test_no_weight_depends_on_the_order_or_on_being_asked_twice(topology, values):
    plain = Driver(topology, values).run(0, 12)
    backwards = Driver(topology, values).run(0, 12, order=[3, 2, 1, 0], again=True)
    assert torch.equal(plain, backwards)


def test_a_saved_state_goes_on_bit_for_bit(topology, values):
    whole, first, second = (Driver(topology, values) for _ in range(3))
    expected = whole.run(0, 16)
    first.run(0, 9)
    file = io.BytesIO()
    policy = first.policy
    torch.save((policy.state_dict(), policy.local_state_dict(), policy.common_state()), file)
    file.seek(0)
    state, local, common = torch.load(file, weights_only=True)
    second.policy.load_state_dict(state)
    if common:
        second.policy.load_common_state(common)
    second.policy.load_local_state_dict(local)
    if second.policy.scorer is not None:  # saved beside, by Megatron's own means
        second.policy.scorer.table = first.policy.scorer.table.clone()
    # As text, since a figure that is not known yet is NaN.
    assert str(second.policy.figures()) == str(first.policy.figures())
    assert torch.equal(second.run(9, 16), expected[9:])
