"""All settings of the data weighting model, validated at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from megatron_dwm.config import validation
from megatron_dwm.config.choices import FORMS, attribute_name
from megatron_dwm.config.policy_table import Needs, policy_needs
from megatron_dwm.errors import DWMError


def _option(default: Any, help: str, **metadata: Any) -> Any:
    """Declares a field that carries its help text and argparse details."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DWMConfig:
    """Settings of the data weighting model; each field is the flag `--dwm-<name>`.

    Attributes:
        enabled: the flag `--dwm`.
        policy: how samples are weighted: `learned` (in the form that `form` names), another policy
            of `megatron_dwm.policies`, or your own as `package.module:Class`.
        form: `head` (a linear score on the LLM's own states) or `model` (a separate transformer).
        rule: how the form learns: `regression` of the influence, or `chain`, the paper's gradient
            through the weights.
        map: scores to weights.
        gate: whether weights move away from 1 only as far as out-of-sample correlation justifies.
        schedule: `staged`, `joint` or `frozen` (weights from `load`, no meta steps).
        estimator: how `c_i = dL_meta(theta+)/dw_i` is estimated.
        lookahead: whether the meta loss is differentiated after the LLM's step or before it.
        jacobian: the derivative of the optimizer's step that the meta-gradient goes through.
        mtp: whether weights also apply to the losses of multi-token prediction.
        sampling: which documents are read: Megatron's own order, or drawn by weight files.
    """

    enabled: bool = _option(False, "weigh every sample with a data weighting model (DWM)")
    policy: str = _option(
        "learned",
        "learned: what --dwm-form names; uniform: w = 1; linupper, quadratic, extremes, "
        "truncation: by the sample's loss; rho: by its loss relative to a reference model's; "
        "static: by a number of its documents; curriculum: easy documents first; domains: by the "
        "influence of its domain; influence: by the sample's own influence at every step; "
        "shuffled: the learned weights of other samples, a control; or your own policy, "
        "package.module:Class; several joined by +: the product of their weights",
    )
    form: str = _option(
        "head",
        "what is learned: head, a linear score on the LLM's own hidden states and losses, without "
        "an extra pass; model, a separate transformer (the paper's)",
    )
    rule: str | None = _option(
        None,
        "how it learns: regression of the samples' influence; chain, the meta loss's gradient "
        "through the weights (the paper's; form model only); default: regression",
    )
    map: str | None = _option(
        None,
        "scores to weights: sigmoid, bounded, with running centre and normaliser; softmax over the "
        "global batch (form model only); default: sigmoid; with --dwm-rule chain: softmax",
    )
    loss_temperature: float = _option(
        1.0,
        "policies linupper, quadratic and extremes: r in exp(shape(loss) / r); the smaller it is, "
        "the further weights are from 1",
    )
    static_weights: str = _option(
        "weights",
        "policy static: the weight file beside each training data set that holds the documents' "
        "weights: NAME for PREFIX.NAME.weights, weights for PREFIX.weights (megatron-dwm weights "
        "make)",
    )
    curriculum_by: str = _option(
        "length",
        "policy curriculum: what measures a document's difficulty: length, in tokens, or NAME for "
        "the numbers in PREFIX.NAME.weights beside each training data set",
    )
    curriculum_order: str = _option(
        "ascending",
        "policy curriculum: ascending, small numbers first; descending, large numbers first",
    )
    curriculum_pacing: str = _option(
        "linear",
        "policy curriculum: how the share of samples that count grows during training: linear, "
        "root (its square grows linearly), step (five equal steps)",
    )
    curriculum_start: float = _option(
        0.2, "policy curriculum: the share of samples that count at first, in (0, 1]"
    )
    curriculum_share: float = _option(
        0.5, "policy curriculum: the share of the training after which all samples count, in (0, 1]"
    )
    reference_losses: str = _option(
        "reference_loss",
        "policy rho: NAME of the files PREFIX.NAME.weights with the mean token loss of each "
        "document under a reference model",
    )
    slope: float = _option(3.0, "slope of the sigmoid, per standard deviation of the scores")
    gate: str | None = _option(
        None,
        "on: weights move away from 1 only as far as the out-of-sample correlation of scores and "
        "influence justifies; off: at once; default: on; with --dwm-rule chain: off",
    )
    forgetting: float = _option(
        0.98,
        "regression of form head: how much a meta step counts relative to the next, in (0, 1]",
    )
    ridge: float | None = _option(
        None,
        "regression of form head: ridge penalty, relative to the features' variance; default: set "
        "from the number of samples and from how well scores have predicted influence",
    )
    replay: int = _option(8, "regression of form model: meta steps whose samples are kept")
    replay_steps: int = _option(
        2, "regression of form model: kept meta steps that are replayed at each meta step"
    )
    teacher: str = _option(
        "head",
        "regression of form model: head, a head's scores are the labels between meta steps; none",
    )
    schedule: str | None = _option(
        None,
        "staged: each stage is a meta window and a frozen window; joint: a meta step every "
        "--dwm-meta-interval steps; frozen: weights from --dwm-load, no meta steps; default: "
        "joint; with --dwm-rule chain: staged",
    )
    stages: int = _option(
        5, "number of stages that the training is divided into; a snapshot is saved after each"
    )
    stage_meta_steps: int | None = _option(
        None, "length of each stage's meta window in steps; default: half of the stage"
    )
    warmup_steps: int | None = _option(
        None,
        "steps of uniform weights at the start of the training; default: 0; for policies linupper, "
        "quadratic and extremes: a twentieth of the training, as in their paper",
    )
    meta_interval: int | None = _option(
        None,
        "steps from one meta step to the next (joint, meta windows); default: 16; with --dwm-rule "
        "chain: 1",
    )
    meta_dense_steps: int | None = _option(
        None,
        "steps after the warm-up in which meta steps come four times as often, so that the "
        "weighting learns something early; default: 128; with --dwm-rule chain: 0",
    )
    meta_data_path: list[str] | None = _option(
        None,
        "meta set: one or more Megatron indexed data set prefixes, optionally WEIGHT PREFIX "
        "pairs as in --data-path; never the reported validation data",
        nargs="+",
    )
    meta_batch_size: int | None = _option(
        None,
        "samples of the meta set per meta step; default: the legal size nearest to a quarter of "
        "the global batch",
    )
    estimator: str = _option(
        "auto",
        "estimator of the per-sample meta-gradient: ghost (exact, by hooks), finite_difference "
        "(any layer), auto (ghost where it covers every parameter)",
    )
    lookahead: str | None = _option(
        None,
        "next: the meta loss after the LLM's step, exact; current: before the step, with Adam's "
        "current preconditioner, at the cost of one forward (ghost only); default: current if "
        "ghost covers the LLM, else next; with --dwm-rule chain: next",
    )
    jacobian: str = _option(
        "exact",
        "derivative of the LLM's optimizer step: exact (Adam, AdamW, SGD, Muon) or identity (any "
        "optimizer, treated as plain SGD with one learning rate)",
    )
    mtp: str = _option(
        "weighted",
        "losses of multi-token prediction (--mtp-num-layers): weighted, by their sample's weight, "
        "and part of its influence; plain, as without weighting, and not part of its influence",
    )
    overhead_budget: float | None = _option(
        None,
        "space the meta steps so that the DWM's measured time stays within this share of the "
        "LLM's step time; default: no limit",
    )
    verify_meta_gradient: int | None = _option(
        None,
        "interval in meta steps at which the LLM's step is re-run with a changed weight for a few "
        "samples and compared with the meta-gradient; default: never",
    )
    verify_samples: int = _option(4, "samples that are verified each time")
    verify_correlation: float = _option(
        0.9, "a verification whose correlation is lower is reported as an error in the log"
    )
    fd_relative_step: float | None = _option(
        None,
        "finite difference: norm of eps v relative to that of theta; default: at each meta step "
        "the smallest that the parameters' precision resolves (3e-4 to 2e-2)",
    )
    num_layers: int = _option(4, "layers of the DWM (llm:K and hf:DIR set it themselves)")
    hidden_size: int = _option(256, "hidden size of the DWM")
    ffn_hidden_size: int | None = _option(
        None, "MLP size of the DWM; default: 8/3 of the hidden size, rounded up to 64"
    )
    num_attention_heads: int = _option(4, "attention heads of the DWM")
    num_query_groups: int | None = _option(
        None, "query groups (GQA) of the DWM; default: as many as heads"
    )
    pooling: str = _option(
        "mean",
        "how token states become one vector per sample: last or mean (set by hf:DIR if DIR is a "
        "classifier)",
    )
    init: str = _option(
        "random",
        "random; llm:K (the LLM's embedding and first K layers, copied at the first meta step); "
        "hf:DIR (a Hugging Face Llama folder; if it is a classifier with one label, also its head "
        "and pooling)",
    )
    load: str | None = _option(
        None, "folder with stage snapshots (or one snapshot) that the DWM starts from"
    )
    head_lr: float = _option(3e-3, "learning rate of the DWM's score head")
    backbone_lr: float = _option(2e-4, "learning rate of the rest of the DWM")
    weight_decay: float = _option(0.0, "weight decay of the DWM (AdamW)")
    adam_beta1: float = _option(0.9, "Adam beta1 of the DWM")
    adam_beta2: float = _option(0.99, "Adam beta2 of the DWM")
    clip_grad: float = _option(1.0, "clip the DWM's gradient to this global norm; 0: off")
    temperature: float = _option(1.0, "tau in w = N softmax(s / tau)")
    min_effective_samples: float | None = _option(
        None,
        "floor on (sum w)^2 / (N sum w^2) of w = N softmax(s / tau), in (0, 1): in a batch below "
        "it tau is raised until it holds; default: no floor",
    )
    uniform_mix: float = _option(
        0.0, "share A of uniform weights, in [0, 1): w becomes (1 - A) w + A, never below A"
    )
    max_weight: float | None = _option(
        None,
        "cap on a sample's weight, above 1; what is cut off goes to the other samples in "
        "proportion to their weights; default: no cap",
    )
    max_bad_steps: int = _option(
        10,
        "end the run after this many steps in a row in which a loss, a score, the meta-gradient or "
        "the DWM was NaN or infinite; such a step leaves the DWM unchanged, and if scores are bad, "
        "its weights are 1",
    )
    sampling: str = _option(
        "stock",
        "stock: every document once an epoch, in Megatron's order; weights: documents are drawn by "
        "the weight file PREFIX.weights beside each training data set (megatron-dwm weights); a "
        "file that has changed takes over at the next stage, or when the run is resumed",
    )
    sampling_draws: str = _option(
        "systematic",
        "systematic: a document is read its expected number of times, rounded down or up; "
        "independent: independent draws, so the number of times varies",
    )
    sampling_max_repeats: int | None = _option(
        None,
        "highest expected number of times that a document is read per epoch; default: no limit",
    )
    seed: int = _option(1234, "seed of the DWM's initialisation and of the shuffled policy")
    document_weights: bool = _option(
        False,
        "record the mean weight of every document read, in the --save folder, without an extra "
        "pass; megatron-dwm weights from-run turns them into weight files, by which another run "
        "can draw",
    )
    log_samples: bool = _option(False, "write every sample's weight to the step log as well")
    log_expert_load: int = _option(
        0,
        "interval in steps at which the step log gets how evenly the samples of each domain use "
        "the experts of the MoE layers of the last pipeline stage; 0: never",
    )

    @property
    def trains(self) -> bool:
        """Whether the run takes any meta steps."""
        return self.uses_meta_set and self.schedule != "frozen" and self.needs.influence

    @property
    def uses_meta_set(self) -> bool:
        """Whether samples' influence on the meta set is needed, on meta steps or ahead of steps."""
        needs = self.needs
        return needs.influence_ahead or (needs.influence and self.schedule != "frozen")

    @property
    def scores(self) -> bool:
        """Whether samples are weighted at all."""
        return self.policy != "uniform"

    @property
    def learned(self) -> bool:
        """Whether the policy is the learned one, or a control derived from it."""
        return not {"learned", "shuffled", *FORMS}.isdisjoint(self.parts)

    @property
    def parts(self) -> list[str]:
        """Names of the policies that are combined, usually just one."""
        return self.policy.split("+")

    @property
    def policies(self) -> str:
        """Like `policy`, with `learned` replaced by the name of its form."""
        return "+".join(self.form if part == "learned" else part for part in self.parts)

    @property
    def has_model(self) -> bool:
        """Whether a separate weighting model is built."""
        return self.needs.model

    @property
    def needs(self) -> Needs:
        """What the policy needs; nothing if there is no policy of that name."""
        names = [self.form if n in ("learned", "shuffled") else n for n in self.parts]
        try:
            return policy_needs("+".join(names))
        except DWMError:
            return Needs()

    def with_defaults(self) -> DWMConfig:
        """Returns the settings, with defaults that depend on form and rule filled in."""
        form = self.form
        named = [part for part in self.parts if part in FORMS]
        if named and form == DWMConfig.form:
            form = named[0]
        chain = self.rule == "chain" and form == "model"
        defaults: dict[str, Any] = {
            "rule": "regression",
            "map": "softmax" if chain else "sigmoid",
            "gate": "off" if chain else "on",
            "schedule": "staged" if chain else "joint",
            "meta_interval": 1 if chain else 16,
            "meta_dense_steps": 0 if chain else 128,
            "lookahead": "next" if chain else "auto",
        }
        missing: dict[str, Any] = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        return dataclasses.replace(self, form=form, **missing)

    def problems(self) -> list[str]:
        """Returns one line for each setting that cannot work, independent of the LLM."""
        return validation.problems(self)

    @property
    def resolved_ffn_hidden_size(self) -> int:
        """MLP size; by default Llama's 8/3 of the hidden size, rounded up to a multiple of 64."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return -(-self.hidden_size * 8 // (3 * 64)) * 64

    def shape(self) -> dict[str, Any]:
        """Returns the sizes of the DWM, with defaults resolved."""
        names = ("num_layers", "hidden_size", "num_attention_heads", "pooling")
        return {
            **{name: getattr(self, name) for name in names},
            "ffn_hidden_size": self.resolved_ffn_hidden_size,
            "num_query_groups": self.num_query_groups or self.num_attention_heads,
        }

    @classmethod
    def from_args(cls, args: Any) -> DWMConfig:
        """Reads the config from parsed arguments; missing flags keep their default."""
        values = {}
        for spec in dataclasses.fields(cls):
            attribute = attribute_name(spec.name)
            if hasattr(args, attribute):
                values[spec.name] = getattr(args, attribute)
        return cls(**values)
