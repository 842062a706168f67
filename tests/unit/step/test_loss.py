"""Per-sample weights in the loss: what is differentiated, what is reported, what is measured.

The trainer's scaling chain, by the form of what `loss_func` returns, for micro-batch k of m on
one of D data-parallel ranks (context parallelism of size C is part of D):

    three values (loss sum, tokens, report)    sum / tokens_k / m, then DDP's mean over D
    the same, --calculate-per-token-loss       sum, then DDP's sum over D / tokens of all ranks
    two values (loss, report)                  loss * C / m, then DDP's mean over D

`trainer_loss` writes that chain down once; tests/contract proves that Megatron's is the same.
What these tests do not exercise: Megatron's schedules and real data-parallel ranks.
"""

import contextlib
import functools

import pytest
import torch

from megatron_dwm.errors import DWMError
from megatron_dwm.step.loss import WeightedForwardStep, token_counts

B, S, FEATURES = 3, 5, 4


def three_values(mask, output):
    """Megatron's own form: sum, number of tokens, report of both."""
    loss = (output.float().view(-1) * mask.view(-1)).sum()
    tokens = mask.sum().detach().to(torch.int)
    report = torch.cat([loss.detach().clone().view(1), tokens.view(1).float()])
    return loss, tokens, {"lm loss": report}


def two_values(mask, output):
    """The legacy form: averaged by `loss_func` itself."""
    loss = (output.float() * mask).sum() / mask.sum()
    return loss, {"lm loss": loss.detach().clone()}


FORMS = pytest.mark.parametrize("loss_func", [three_values, two_values])


class ToyModel(torch.nn.Module):
    """Per-token losses `[b, s]` that are not linear in the parameters."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.theta = torch.nn.Parameter(torch.randn(FEATURES, generator=generator))

    def forward(self, x):
        return torch.tanh(x @ self.theta) ** 2 + 0.1


def micro_batches(count, seed=1):
    """Inputs `[b, s, f]` and a mask in which every sample has another number of tokens."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        mask = (torch.rand(B, S, generator=generator) > 0.3).float()
        mask[:, 0] = 1.0
        mask[0, 1:] = 0.0
        batches.append({"x": torch.randn(B, S, FEATURES, generator=generator), "mask": mask})
    return batches


def forward_step_of(loss_func):
    def forward_step(data_iterator, model):
        batch = next(data_iterator)
        return model(batch["x"]), functools.partial(loss_func, batch["mask"])

    return forward_step


def trainer_loss(outputs, m, ranks, per_token=False, all_tokens=1, context_parallel=1):
    """The chain at the top of this file, DDP's reduction included."""
    if len(outputs) == 2:
        return outputs[0] * context_parallel / m / ranks
    loss, tokens, _ = outputs
    return loss / all_tokens if per_token else loss / tokens.clamp(min=1) / m / ranks


def gradient(model, loss):
    return torch.autograd.grad(loss, model.theta)[0]


def run(step, model, batches):
    """One pass of the trainer over its micro-batches."""
    iterator = iter(batches)
    results = []
    for _ in batches:
        output, loss_func = step(iterator, model)
        results.append(loss_func(output))
    return results


def random_weights(m, seed=5):
    return torch.rand(m, B, generator=torch.Generator().manual_seed(seed)) * 2


class TestWeighted:
    @FORMS
    def test_gradient_is_the_weighted_sum_of_per_sample_gradients(self, loss_func):
        """Also with a mask that leaves samples of different length: w_i scales sample i alone."""
        model, m = ToyModel(), 2
        batches, weights = micro_batches(m), random_weights(m)
        step = WeightedForwardStep(forward_step_of(loss_func))
        with step.weighted(weights):
            outputs = run(step, model, batches)
        found = sum(gradient(model, trainer_loss(o, m, 1)) for o in outputs)

        expected = torch.zeros(FEATURES)
        for k, batch in enumerate(batches):
            for i in range(B):
                # Sample i alone: the same denominator, the other samples' losses cut off.
                only = torch.zeros(B, 1)
                only[i] = 1.0
                outputs = loss_func(batch["mask"], model(batch["x"]) * only)
                expected += weights[k, i] * gradient(model, trainer_loss(outputs, m, 1))
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
        # Negative control: the unweighted gradient is another one.
        plain = run(WeightedForwardStep(forward_step_of(loss_func)), model, batches)
        plain = sum(gradient(model, trainer_loss(o, m, 1)) for o in plain)
        assert not torch.allclose(plain, expected, rtol=1e-2)

    @FORMS
    def test_weight_one_is_bit_identical_to_stock(self, loss_func):
        """Loss, token count, gradient and report: not close but equal."""
        model, batches = ToyModel(), micro_batches(2)
        stock = run(forward_step_of(loss_func), model, batches)
        step = WeightedForwardStep(forward_step_of(loss_func))
        with step.weighted(torch.ones(2, B)):
            ours = run(step, model, batches)
        for a, b in zip(stock, ours, strict=True):
            assert len(a) == len(b)
            assert torch.equal(a[-1]["lm loss"], b[-1]["lm loss"])
            assert all(torch.equal(x, y) for x, y in zip(a[:-1], b[:-1], strict=True))
            assert torch.equal(gradient(model, a[0]), gradient(model, b[0]))

    @FORMS
    def test_report_is_unweighted_and_cut_off_from_the_graph(self, loss_func):
        model, batches = ToyModel(), micro_batches(2)
        stock = run(forward_step_of(loss_func), model, batches)
        step = WeightedForwardStep(forward_step_of(loss_func))
        with step.weighted(random_weights(2)):
            ours = run(step, model, batches)
        for a, b in zip(stock, ours, strict=True):
            assert torch.equal(a[-1]["lm loss"], b[-1]["lm loss"])
            assert not torch.equal(a[0], b[0])
            assert not b[-1]["lm loss"].requires_grad

    def test_token_count_is_untouched(self):
        batches = micro_batches(1)
        step = WeightedForwardStep(forward_step_of(three_values))
        with step.weighted(torch.zeros(1, B)):
            ((_, tokens, _),) = run(step, ToyModel(), batches)
        assert tokens.item() == int(batches[0]["mask"].sum()) and tokens.dtype == torch.int

    def test_a_second_run_of_the_step_begins_again_with_the_first_weights(self):
        """Megatron's rerun state machine runs all passes of a step again, within one step."""
        model, batches, weights = ToyModel(), micro_batches(2), random_weights(2)
        step = WeightedForwardStep(forward_step_of(three_values))
        with step.weighted(weights):
            first, second = run(step, model, batches), run(step, model, batches)
        assert [o[0] for o in first] == [o[0] for o in second]
        assert first[0][0] != first[1][0]

    def test_a_new_step_begins_with_the_first_weights_after_one_that_was_cut_short(self):
        model, batches, weights = ToyModel(), micro_batches(2), random_weights(2)
        step = WeightedForwardStep(forward_step_of(three_values))
        with step.weighted(weights):
            run(step, model, batches[:1])
        with step.weighted(weights):
            again = run(step, model, batches)
        expected = (model(batches[0]["x"]) * batches[0]["mask"] * weights[0][:, None]).sum()
        assert again[0][0].item() == pytest.approx(expected.item(), rel=1e-6)

    def test_outside_and_after_an_exception_it_is_the_stock_forward_step(self):
        """Evaluation runs the same wrapped function between training steps."""
        model, batches = ToyModel(), micro_batches(1)
        step = WeightedForwardStep(forward_step_of(three_values))
        with pytest.raises(KeyError), step.weighted(torch.zeros(1, B)):
            raise KeyError
        assert run(step, model, batches)[0][0] == run(step.forward_step, model, batches)[0][0]
        with step.weighted(None):
            assert run(step, model, batches)[0][0] == run(step.forward_step, model, batches)[0][0]

    def test_arguments_of_forward_step_and_of_loss_func_pass_through(self):
        seen = {}

        def loss_func(output, **kwargs):
            seen["loss_func"] = kwargs
            return output.sum(), {}

        def forward_step(data_iterator, model, *args, **kwargs):
            seen["forward_step"] = (args, kwargs)
            return torch.ones(B, S), loss_func

        step = WeightedForwardStep(forward_step)
        with step.weighted(torch.ones(1, B)):
            output, function = step(None, None, 7, return_schedule_plan=True)
            function(output, extra=1)
        assert seen == {
            "forward_step": ((7,), {"return_schedule_plan": True}),
            "loss_func": {"extra": 1},
        }
        seen.clear()
        with step.measured():
            output, function = step(None, None)
            function(output, extra=2)
        assert seen["loss_func"] == {"extra": 2}

    def test_looks_like_the_function_it_wraps(self):
        """Megatron's trainer reads attributes of the forward step's function."""

        def forward_step(data_iterator, model):
            """Words."""

        forward_step.mark = 3
        step = WeightedForwardStep(forward_step)
        assert step.__name__ == "forward_step" and step.__doc__ == "Words." and step.mark == 3

    @pytest.mark.parametrize(
        ("shape", "weights"),
        [((1, 40), (1, B)), ((B,), (1, B)), ((B, S, 2), (1, B)), ((S, B), (1, B))],
        ids=["packed", "one-dimensional", "three-dimensional", "transposed"],
    )
    def test_an_output_that_is_not_samples_by_tokens_is_refused(self, shape, weights):
        step = WeightedForwardStep(lambda *_: (torch.ones(shape), lambda o: (o.sum(), {})))
        with step.weighted(torch.ones(weights)):
            output, loss_func = step(None, None)
            with pytest.raises(DWMError, match=r"packed \(thd\)") as caught:
                loss_func(output)
        assert str(list(shape)) in str(caught.value)
        # The other pipeline stages never see the losses.
        assert caught.value.this_rank_only

    def test_bfloat16_losses_stay_bfloat16(self):
        seen = []

        def loss_func(output):
            seen.append(output.dtype)
            return output.float().sum(), {}

        step = WeightedForwardStep(lambda *_: (torch.ones(B, S).bfloat16(), loss_func))
        with step.weighted(torch.ones(1, B)):
            output, function = step(None, None)
            function(output)
        assert set(seen) == {torch.bfloat16}


class TestMeasured:
    def test_three_values_give_masked_sums_and_token_counts(self):
        model, batches = ToyModel(), micro_batches(2)
        step = WeightedForwardStep(forward_step_of(three_values))
        with torch.no_grad(), step.measured() as losses:
            run(step, model, batches)
        for k, batch in enumerate(batches):
            # In float64: a finite difference is of two sums that are nearly alike.
            expected = (model(batch["x"]) * batch["mask"]).double().sum(dim=1)
            assert torch.allclose(losses.sums[k], expected, rtol=1e-14)
            assert losses.num_tokens[k] == batch["mask"].sum()
            assert not losses.sums[k].requires_grad

    def test_two_values_give_each_samples_share_of_the_mean(self):
        model, batches = ToyModel(), micro_batches(1)
        step = WeightedForwardStep(forward_step_of(two_values))
        with step.measured() as losses:
            ((loss, _),) = run(step, model, batches)
        mask = batches[0]["mask"]
        expected = (model(batches[0]["x"]) * mask).double().sum(dim=1) / mask.sum()
        assert torch.allclose(losses.sums[0], expected, rtol=1e-6)
        assert losses.num_tokens == [None]
        assert losses.sums[0].sum().item() == pytest.approx(loss.item(), rel=1e-6)

    @FORMS
    def test_what_the_schedule_gets_is_stock_and_differentiable(self, loss_func):
        """The meta loss is differentiated while it is measured."""
        model, batches = ToyModel(), micro_batches(1)
        stock = run(forward_step_of(loss_func), model, batches)[0]
        step = WeightedForwardStep(forward_step_of(loss_func))
        with step.measured():
            ours = run(step, model, batches)[0]
        assert torch.equal(stock[0], ours[0])
        assert torch.equal(gradient(model, stock[0]), gradient(model, ours[0]))

    def test_the_schedules_in_place_division_does_not_reach_what_was_measured(self):
        """Megatron divides the returned loss in place by tokens and micro-batches."""
        model, batches = ToyModel(), micro_batches(1)
        step = WeightedForwardStep(forward_step_of(three_values))
        with torch.no_grad(), step.measured() as losses:
            ((loss, _, _),) = run(step, model, batches)
            before = losses.sums[0].clone()
            loss /= 1000
        assert torch.equal(losses.sums[0], before)

    def test_measuring_inside_a_weighted_step_ignores_the_weights(self):
        """Passes C and D run while pass B's weights may still be set."""
        model, batches = ToyModel(), micro_batches(1)
        step = WeightedForwardStep(forward_step_of(three_values))
        with step.measured() as plain:
            run(step, model, batches)
        with step.weighted(torch.zeros(1, B)), step.measured() as losses:
            run(step, model, batches)
        assert torch.equal(plain.sums[0], losses.sums[0])


class TestTokenCounts:
    """What scales the gradient of the schedule's loss to the trainer's."""

    @staticmethod
    def modes(step):
        @contextlib.contextmanager
        def weighted():
            with step.weighted(random_weights(2)) as applied:
                yield applied.num_tokens

        return {"weighted": weighted, "counted": step.counted}

    @pytest.mark.parametrize("mode", ["weighted", "counted"])
    def test_one_of_each_micro_batch_in_order(self, mode):
        batches = micro_batches(2)
        step = WeightedForwardStep(forward_step_of(three_values))
        with self.modes(step)[mode]() as num_tokens:
            assert num_tokens == []
            run(step, ToyModel(), batches)
        expected = [int(batch["mask"].sum()) for batch in batches]
        assert [int(t) for t in num_tokens] == expected and expected[0] != expected[1]
        assert [int(t) for t in token_counts(num_tokens)] == expected

    @pytest.mark.parametrize("mode", ["weighted", "counted"])
    def test_none_where_the_loss_function_averages_by_itself(self, mode):
        step = WeightedForwardStep(forward_step_of(two_values))
        with self.modes(step)[mode]() as num_tokens:
            run(step, ToyModel(), micro_batches(2))
        assert num_tokens == [None, None]

    def test_what_the_trainer_does_to_its_count_does_not_reach_ours(self):
        """The schedule sums the counts of the micro-batches in place."""
        batches = micro_batches(1)
        step = WeightedForwardStep(forward_step_of(three_values))
        with step.weighted(torch.ones(1, B)) as applied:
            ((_, tokens, _),) = run(step, ToyModel(), batches)
            tokens += 1000
        assert int(applied.num_tokens[0]) == int(batches[0]["mask"].sum())

    def test_passes_that_are_taken_again_count_once(self):
        """Megatron's rerun machine; the last passes are those that the step is made of."""
        first, second = micro_batches(2), micro_batches(2, seed=3)
        step = WeightedForwardStep(forward_step_of(three_values))
        weights = random_weights(2)
        with step.weighted(weights) as applied:
            run(step, ToyModel(), first)
            run(step, ToyModel(), second)
        expected = [int(batch["mask"].sum()) for batch in second]
        assert [int(t) for t in applied.num_tokens] == expected
        assert torch.equal(applied.weights, weights.view(-1))
        assert expected != [int(batch["mask"].sum()) for batch in first]

    def test_none_are_collected_on_ranks_that_see_no_losses(self):
        step = WeightedForwardStep(forward_step_of(three_values))
        with step.weighted(None) as applied:
            assert applied.num_tokens == [] and applied.weights is None

    @FORMS
    def test_counted_is_the_stock_forward_step_and_ends_with_its_context(self, loss_func):
        """Pass D of the ghost estimator: the unweighted losses, gradient and report."""
        model, batches = ToyModel(), micro_batches(2)
        stock = run(forward_step_of(loss_func), model, batches)
        step = WeightedForwardStep(forward_step_of(loss_func))
        with pytest.raises(KeyError), step.counted() as num_tokens:
            ours = run(step, model, batches)
            raise KeyError
        for a, b in zip(stock, ours, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a[:-1], b[:-1], strict=True))
            assert torch.equal(a[-1]["lm loss"], b[-1]["lm loss"])
            assert torch.equal(gradient(model, a[0]), gradient(model, b[0]))
        run(step, model, batches)
        assert len(num_tokens) == 2

    def test_per_token_loss_without_a_count_is_refused_with_what_is_needed(self):
        one = torch.tensor(3)
        assert token_counts([one, one]) == [one, one]
        for counts in ([None], [one, None]):
            with pytest.raises(DWMError, match="--calculate-per-token-loss") as caught:
                token_counts(counts)
            assert "num_tokens" in str(caught.value) and caught.value.this_rank_only


CHAINS = pytest.mark.parametrize(
    ("loss_func", "per_token", "context_parallel"),
    [
        (three_values, False, 1),
        (three_values, True, 1),
        (two_values, False, 1),
        (two_values, False, 2),
    ],
    ids=["mean-of-micro-batches", "per-token", "two-values", "two-values-cp2"],
)


class TestContributions:
    @CHAINS
    def test_weighted_contributions_are_the_loss_that_the_trainer_differentiates(
        self, loss_func, per_token, context_parallel
    ):
        """`sum_i w_i contributions_i` equals the trainer's loss, over two ranks' batches.

        So `dL/dw_i` of the trainer's own loss is the contribution, whatever the normalisation.
        """
        model, m, ranks = ToyModel(), 2, 2
        total, ours = torch.zeros(()), torch.zeros(())
        data = [micro_batches(m, seed=10 + rank) for rank in range(ranks)]
        all_tokens = sum(batch["mask"].sum() for part in data for batch in part)
        for rank, batches in enumerate(data):
            weights = random_weights(m, seed=20 + rank)
            step = WeightedForwardStep(forward_step_of(loss_func))
            with step.weighted(weights):
                for outputs in run(step, model, batches):
                    total = total + trainer_loss(
                        outputs, m, ranks, per_token, all_tokens, context_parallel
                    )
            with step.measured() as losses:
                run(step, model, batches)
            parts = losses.contributions(per_token, ranks, context_parallel)
            assert parts.shape == (m * B,)
            # --calculate-per-token-loss: the division by all tokens is the caller's.
            ours = ours + (weights.view(-1) * parts).sum() / (all_tokens if per_token else 1)
        assert ours.item() == pytest.approx(total.item(), rel=1e-6)

    def test_normalisation_differs_between_the_forms(self):
        """Negative control: the wrong form's normalisation misses the loss by far."""
        step = WeightedForwardStep(forward_step_of(three_values))
        batches = micro_batches(2)
        with step.measured() as losses:
            outputs = run(step, ToyModel(), batches)
        loss = sum(trainer_loss(o, 2, 1) for o in outputs).item()
        assert losses.contributions(False, 1).sum().item() == pytest.approx(loss, rel=1e-6)
        assert losses.contributions(True, 1).sum().item() > 2 * loss

    def test_a_micro_batch_without_tokens_contributes_nothing(self):
        """Megatron clamps the token count to 1 there; no division by zero may come out."""
        batches = micro_batches(2)
        batches[1]["mask"].zero_()
        step = WeightedForwardStep(forward_step_of(three_values))
        with step.measured() as losses:
            run(step, ToyModel(), batches)
        parts = losses.contributions(False, 1)
        assert torch.isfinite(parts).all()
        assert torch.equal(parts[B:], torch.zeros(B)) and (parts[:B] > 0).all()
