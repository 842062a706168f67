"""Run under torchrun: as run_many.py, and writes down what the separate weighting model is.

Environment of a run: WHOLE=1 leaves its optimizer whole on each rank, as versions before it was
sharded did; NO_RELOAD=1 does not take a warm start's weights over into the optimizer. What comes
out has, beside run_many's, `dwm`: for each step the meta loss, the weights of its samples and a
hash of the DWM's parameters; its parameters at the end, flat (`end`); and the bytes that each of
its parameters takes on this rank (`bytes`), with the LLM's (`llm_bytes`).
"""

import contextlib
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from tests.functional import run_many  # noqa: E402  (installs the host before Megatron)

# isort: split
import torch  # noqa: E402

from megatron_dwm.core.optimizers import leaf_optimizers  # noqa: E402
from megatron_dwm.hosts.megatron_lm import build  # noqa: E402
from megatron_dwm.step.train_step import DWMTrainStep  # noqa: E402
from megatron_dwm.weighting_model.scorer import Scorer  # noqa: E402


def bytes_of(ddp, optimizer):
    """Returns bytes a parameter of all that a model and its optimizer keep, each storage once."""
    tensors = [t for b in ddp.buffers for t in (b.grad_data, b.param_data) if t is not None]
    tensors += ddp.module.parameters()
    for leaf in leaf_optimizers(optimizer):
        for group in leaf.optimizer.param_groups:
            for parameter in group["params"]:
                tensors += [parameter, *leaf.optimizer.state.get(parameter, {}).values()]
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.dim():
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / sum(p.numel() for p in ddp.module.parameters())


@contextlib.contextmanager
def noted(seen):
    """Within it, what the DWM is after each step is written down."""
    step, scorer, changed = DWMTrainStep.__call__, build.Scorer, Scorer.weights_changed

    def noted_step(self, stock_step, trainee, iteration):
        warm = self.warm_started
        result, record = step(self, stock_step, trainee, iteration)
        parameters = list(self.scorer.module.parameters())
        seen["steps"].append(
            {
                "meta_loss": None if record.meta is None else float(record.meta.loss),
                "grad_norm": None if record.meta is None else float(record.meta.grad_norm),
                "weights": None if record.weights is None else record.weights.tolist(),
                "dwm": run_many.parameters_hash([self.scorer.module]),
                "warm_start": warm != self.warm_started,
            }
        )
        seen["end"] = torch.cat([p.detach().float().view(-1) for p in parameters]).tolist()
        seen["bytes"] = bytes_of(self.scorer.ddp, self.scorer.optimizer)
        (chunk,) = trainee.model
        seen["llm_bytes"] = bytes_of(chunk, trainee.optimizer)
        return result, record

    def whole(*args, **kwargs):
        return scorer(*args, **{**kwargs, "sharded": False})

    def without_reload(self):
        self.ddp.broadcast_params()

    DWMTrainStep.__call__ = noted_step
    if os.environ.get("WHOLE") == "1":
        build.Scorer = whole
    if os.environ.get("NO_RELOAD") == "1":
        Scorer.weights_changed = without_reload
    try:
        yield
    finally:
        DWMTrainStep.__call__, build.Scorer, Scorer.weights_changed = step, scorer, changed


def main():
    """Runs all, in order."""
    with open(os.environ["RUNS"]) as file:
        runs = json.load(file)
    for item in runs:
        before = dict(os.environ)
        os.environ.update(item.get("env", {}))
        seen = {"steps": []}
        with noted(seen):
            result = run_many.run(item["args"])
        os.environ.clear()
        os.environ.update(before)
        name = os.path.join(os.environ["OUT"], f"{item['name']}.{os.environ['RANK']}.json")
        with open(name, "w") as file:
            json.dump({**result, "dwm": seen}, file)
        run_many.clean()
    run_many.end_process()


if __name__ == "__main__":
    main()
