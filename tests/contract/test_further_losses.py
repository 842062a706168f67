"""Losses of multi-token prediction: weighted and measured as if they had passed a loss function.

On a real GPTModel with two extra layers, one rank. The reference weighs them by hand: Megatron
multiplies each token's loss by the loss mask, so a mask of weights, with the division by the mask's
sum undone by the factor, is the weighted loss itself.

Not exercised here: whole runs and layouts (tests/distributed/test_multi_token_prediction.py).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.multi_token_prediction import (  # noqa: E402
    MTPLossAutoScaler,
    MTPLossLoggingHelper,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_dwm.core import further_losses  # noqa: E402
from megatron_dwm.core.contexts import configs_of  # noqa: E402
from megatron_dwm.errors import DWMError  # noqa: E402
from megatron_dwm.hosts.megatron_lm.mtp_losses import interposed  # noqa: E402

B, S, V, LAYERS = 3, 8, 16, 2
WEIGHTS = torch.tensor([0.25, 1.0, 2.5])


@pytest.fixture
def model(groups: Any) -> GPTModel:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        mtp_num_layers=LAYERS,
        mtp_loss_scaling_factor=0.7,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    layer = get_gpt_layer_local_spec()
    torch.manual_seed(0)
    return GPTModel(
        config=config,
        transformer_layer_spec=layer,
        vocab_size=V,
        max_sequence_length=S,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False),
    )


@pytest.fixture(autouse=True)
def scale() -> Any:
    """As the schedule sets it for one micro-batch; and an empty log."""
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    MTPLossLoggingHelper.tracker.clear()
    yield
    MTPLossLoggingHelper.tracker.clear()


def losses(model: GPTModel, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The model's per-token losses of one batch `[b, s]`; its further losses are attached."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (B, S + 1), generator=generator)
    positions = torch.arange(S).expand(B, S)
    causal = torch.triu(torch.ones(1, 1, S, S, dtype=torch.bool), 1)
    mask = torch.ones(B, S) if mask is None else mask
    return model(tokens[:, :-1], positions, causal, labels=tokens[:, 1:], loss_mask=mask)


def gradient(model: GPTModel, loss: torch.Tensor) -> torch.Tensor:
    """The gradient by all parameters; of tied ones the sum of all uses."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None])


def by_hand(model: GPTModel, weights: torch.Tensor) -> torch.Tensor:
    """The gradient with further losses weighted through the mask, and main ones by a factor."""
    factor, config = model.config.mtp_loss_scaling_factor, model.config
    # Shifting leaves S - k positions a sample, so that the mask's sum is `sum w (S - k)` where it
    # was `B (S - k)`, in each layer k alike.
    config.mtp_loss_scaling_factor = factor * weights.sum().item() / B
    further = gradient(model, 0.0 * losses(model, weights[:, None].expand(B, S).contiguous()).sum())
    config.mtp_loss_scaling_factor = 0.0
    main = gradient(model, (losses(model) * weights[:, None]).sum())
    config.mtp_loss_scaling_factor = factor
    return further + main


def heard(model: GPTModel, weights: torch.Tensor) -> torch.Tensor:
    """The gradient with weights that are known after the forward pass only."""
    later = further_losses.WeightLater()
    with interposed():
        with further_losses.listening(later):
            output = losses(model)
        later.weights = weights
        return gradient(model, (output * weights[:, None]).sum())


def test_a_weight_reaches_them_in_the_backward_pass(model: GPTModel) -> None:
    """To 1e-6; and main losses alone, or unweighted further ones, are far from it."""
    expected = by_hand(model, WEIGHTS)
    assert (heard(model, WEIGHTS) - expected).norm() < 1e-6 * expected.norm()
    unheard = gradient(model, (losses(model) * WEIGHTS[:, None]).sum())
    assert (unheard - expected).norm() > 1e-2 * expected.norm()


def test_weights_of_one_change_no_bit(model: GPTModel) -> None:
    assert torch.equal(heard(model, torch.ones(B)), gradient(model, losses(model).sum()))


def test_a_sample_s_sum_is_the_derivative_by_its_weight(model: GPTModel) -> None:
    """What is measured is what is weighted: the sums are what the mask of one sample leaves."""
    summed = further_losses.SumLater()
    with interposed(), further_losses.listening(summed):
        losses(model)
    seen: list[torch.Tensor] = []
    with interposed(), further_losses.listening(lambda x: seen.append(x.detach())):
        for i in range(B):
            losses(model, torch.eye(B)[i][:, None].expand(B, S).contiguous())
    alone = torch.stack(seen).view(B, LAYERS, B, S).sum((1, 2, 3)) / B
    assert torch.allclose(summed.sums.float(), alone, rtol=1e-5)


def test_they_are_switched_off_for_the_meta_loss(model: GPTModel) -> None:
    with further_losses.without_further_losses(model.config):
        off = gradient(model, losses(model).sum())
    MTPLossAutoScaler.set_loss_scale(torch.tensor(0.0))
    assert torch.equal(off, gradient(model, losses(model).sum()))
    assert model.config.mtp_loss_scaling_factor == 0.7


def test_chunks_with_configs_of_their_own_are_all_switched_off() -> None:
    """As scripts build them under virtual pipeline stages: each chunk from the arguments anew."""
    chunks = [torch.nn.Linear(1, 1) for _ in range(3)]
    configs = [SimpleNamespace(mtp_num_layers=1, mtp_loss_scaling_factor=x) for x in (0.1, 0.2)]
    for chunk, config in zip(chunks, [*configs, configs[1]], strict=True):
        chunk.config = config
    found = configs_of(chunks)
    assert found == configs
    with further_losses.without_further_losses(*found):
        assert [config.mtp_loss_scaling_factor for config in configs] == [0.0, 0.0]
    assert [config.mtp_loss_scaling_factor for config in configs] == [0.1, 0.2]


def test_what_the_trainer_logs_of_them_is_put_back(model: GPTModel) -> None:
    losses(model)
    kept = further_losses.logged()
    before = {k: v.clone() for k, v in kept.items() if isinstance(v, torch.Tensor)}
    losses(model)
    tracker = MTPLossLoggingHelper.tracker
    assert not torch.equal(tracker["loss_values"], before["loss_values"])
    further_losses.put_back_logged(kept)
    assert before and all(torch.equal(tracker[k], v) for k, v in before.items())


def test_megatron_is_left_as_it_was(model: GPTModel) -> None:
    inherited = MTPLossAutoScaler.apply
    with interposed():
        assert MTPLossAutoScaler.apply != inherited
    assert MTPLossAutoScaler.apply == inherited and "apply" not in vars(MTPLossAutoScaler)


def test_another_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MTPLossAutoScaler, "forward", staticmethod(lambda ctx, a, b, c: a))
    with pytest.raises(DWMError, match=r"takes a, b, c, but output, mtp_loss"):
        with interposed():
            pass
