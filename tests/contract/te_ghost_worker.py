"""Run under torchrun, with Transformer Engine: the ghost estimator on its layers, case by case.

Writes for each case to the file OUT, as JSON: the relative errors of `<v, g_i>` for a random v
("whole"), with v on one kind of parameter at a time ("alone"), and read off the trainer's own pass
("training"), whether that left its gradient as it was ("untouched"), the error with the samples in
another order ("rolled"), and the types of the layers that have parameters.
"""

import json
import os
import re
import sys
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from megatron_dwm.hosts import cpu  # noqa: E402

cpu.install()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import (  # noqa: E402
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.transformer_config import (  # noqa: E402
    MLATransformerConfig,
    TransformerConfig,
)

from megatron_dwm.config import DWMConfig  # noqa: E402
from megatron_dwm.errors import DWMError  # noqa: E402
from megatron_dwm.meta_gradient.estimators import choose_estimator  # noqa: E402
from megatron_dwm.meta_gradient.ghost.recording import uncovered_parameters  # noqa: E402
from tests.contract.te_ghost_cases import CASES, REFUSED  # noqa: E402
from tests.contract.tiny_gpt import Run, error, products  # noqa: E402


def spec_of(options):
    """Returns the specification of Transformer Engine's layers."""
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=options.get("num_moe_experts"),
        moe_grouped_gemm=options.get("moe_grouped_gemm", False),
        qk_layernorm=options.get("qk_layernorm", False),
        multi_latent_attention=options.get("multi_latent_attention", False),
        use_te_op_fuser=options.get("use_transformer_engine_op_fuser", False),
        mla_down_proj_fusion=options.get("mla_down_proj_fusion", False),
    )


def run_of(options, groups):
    """Returns the tiny GPT of a case."""
    mla = options.get("multi_latent_attention", False)
    kind = MLATransformerConfig if mla else TransformerConfig
    return Run(options, groups, kind=kind, spec=spec_of)


def kind_of(name):
    """Returns the name of a parameter without the numbers of its layer and its expert."""
    return re.sub(r"\d+", "*", name)


def measure(options, groups):
    """Returns what came out of a case."""
    run = run_of(options, groups)
    gradients = run.per_sample_gradients()
    expected = products(gradients, run.v)
    found = run.estimate(run.v)
    alone = {}
    for kind in {kind_of(name) for name in run.v}:
        v = {n: d if kind_of(n) == kind else torch.zeros_like(d) for n, d in run.v.items()}
        products_alone = products(gradients, v)
        size = float(products_alone.abs().max())
        alone[kind] = {"error": error(run.estimate(v), products_alone), "size": size}
    run.model[0].zero_grad_buffer()
    run.schedule()
    plain = run.gradient()
    training = error(run.train(run.v), expected)
    return {
        "whole": error(found, expected),
        "rolled": error(found.roll(1), expected),
        "alone": alone,
        "training": training,
        "untouched": all(torch.equal(plain[n], g) for n, g in run.gradient().items()),
        "layers": sorted(
            {
                type(module).__name__
                for module in run.model[0].module.modules()
                if any(True for _ in module.parameters(recurse=False))
            }
        ),
    }


def refusal(options, groups):
    """Returns which estimator `auto` takes and why, and the first parameter that is not covered."""
    run = run_of(options, groups)
    name, why = choose_estimator(DWMConfig(), run.model, run.config)
    uncovered = uncovered_parameters(run.model)
    try:
        run.ghost()
    except DWMError as error:
        asked = str(error)
    else:
        asked = ""
    return {"estimator": name, "why": why, "uncovered": uncovered, "asked": asked}


def main():
    """Takes all cases."""
    torch.distributed.init_process_group(backend="gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(123)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    out = {}
    for cases, function in ((CASES, measure), (REFUSED, refusal)):
        for name, options in cases.items():
            try:
                out[name] = function(options, groups)
            except Exception:  # told to the test of this case, which fails by it
                out[name] = {"failed": traceback.format_exc()}
    with open(os.environ["OUT"], "w") as file:
        json.dump(out, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
