"""The settings: what is refused and how it is named, and that fields and flags are the same."""

import argparse
import dataclasses
from types import SimpleNamespace

import pytest

from megatron_dwm.config.choices import MODEL_ONLY, OF_POLICY, READ_BY, attribute_name, flag
from megatron_dwm.config.flags import add_dwm_args
from megatron_dwm.config.policy_table import BUILT_IN, policy_needs
from megatron_dwm.config.schema import DWMConfig
from megatron_dwm.config.validation import head_dim_problems, raise_all
from megatron_dwm.errors import DWMError
from megatron_dwm.policies.base import Needs, WeightPolicy

SOFTMAX = "--dwm-map softmax needs the scores of the whole batch before the step, but"
FIELDS = {spec.name: spec for spec in dataclasses.fields(DWMConfig)}

BAD_VALUES = [
    ("policy", "random"),
    ("form", "tree"),
    ("rule", "guess"),
    ("map", "linear"),
    ("gate", "ajar"),
    ("teacher", "nobody"),
    ("slope", 0.0),
    ("meta_dense_steps", -1),
    ("forgetting", 0.0),
    ("forgetting", 1.5),
    ("ridge", -0.1),
    ("replay", -1),
    ("log_expert_load", -1),
    ("replay_steps", -1),
    ("schedule", "cosine"),
    ("estimator", "magic"),
    ("lookahead", "previous"),
    ("jacobian", "numeric"),
    ("mtp", "none"),
    ("pooling", "max"),
    ("init", "llm:0"),
    ("init", "llm:"),
    ("init", "llm:-1"),
    ("init", "llm:2x"),
    ("init", "hf:"),
    ("init", "zeros"),
    ("stages", 0),
    ("meta_interval", 0),
    ("num_layers", 0),
    ("hidden_size", -64),
    ("num_attention_heads", 0),
    ("temperature", 0.0),
    ("head_lr", 0.0),
    ("warmup_steps", -1),
    ("loss_temperature", 0.0),
    ("curriculum_start", 0.0),
    ("curriculum_share", 1.5),
    ("backbone_lr", -1e-4),
    ("weight_decay", -0.1),
    ("clip_grad", -1.0),
    ("stage_meta_steps", 0),
    ("meta_batch_size", 0),
    ("ffn_hidden_size", -1),
    ("num_query_groups", 0),
    ("fd_relative_step", 0.0),
    ("fd_relative_step", 1.0),
    ("fd_relative_step", -3e-4),
    ("overhead_budget", 0.0),
    ("overhead_budget", -0.1),
    ("verify_meta_gradient", 0),
    ("verify_samples", 2),
    ("verify_correlation", 1.0),
    ("verify_correlation", -0.1),
    ("sampling", "random"),
    ("min_effective_samples", 0.0),
    ("min_effective_samples", 1.0),
    ("uniform_mix", -0.1),
    ("uniform_mix", 1.0),
    ("max_weight", 1.0),
    ("max_weight", -2.0),
    ("max_bad_steps", 0),
]

# Another legal value for every field, so that a round trip shows each one.
OTHER_VALUES = {
    "enabled": True,
    "policy": "shuffled",
    "form": "model",
    "rule": "chain",
    "map": "softmax",
    "loss_temperature": 0.4,
    "static_weights": "quality",
    "curriculum_by": "perplexity",
    "curriculum_order": "descending",
    "curriculum_pacing": "root",
    "curriculum_start": 0.5,
    "curriculum_share": 0.25,
    "reference_losses": "small",
    "slope": 2.0,
    "gate": "on",
    "forgetting": 0.5,
    "ridge": 0.25,
    "replay": 3,
    "replay_steps": 1,
    "teacher": "none",
    "schedule": "joint",
    "stages": 3,
    "stage_meta_steps": 17,
    "warmup_steps": 9,
    "meta_interval": 2,
    "meta_dense_steps": 40,
    "meta_data_path": ["0.3", "data/a", "0.7", "data/b"],
    "meta_batch_size": 16,
    "estimator": "ghost",
    "lookahead": "current",
    "jacobian": "identity",
    "mtp": "plain",
    "overhead_budget": 0.25,
    "verify_meta_gradient": 50,
    "verify_samples": 8,
    "verify_correlation": 0.5,
    "fd_relative_step": 1e-3,
    "num_layers": 2,
    "hidden_size": 128,
    "ffn_hidden_size": 320,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "pooling": "last",
    "init": "llm:2",
    "load": "some/folder",
    "head_lr": 0.125,
    "backbone_lr": 0.0,
    "weight_decay": 0.5,
    "adam_beta1": 0.75,
    "adam_beta2": 0.875,
    "clip_grad": 0.0,
    "temperature": 2.5,
    "min_effective_samples": 0.25,
    "uniform_mix": 0.125,
    "max_weight": 4.0,
    "max_bad_steps": 3,
    "sampling": "weights",
    "sampling_draws": "independent",
    "sampling_max_repeats": 3,
    "seed": 7,
    "document_weights": True,
    "log_samples": True,
    "log_expert_load": 5,
}


WITHOUT_MODEL = [n for n, (_, needs) in BUILT_IN.items() if not needs.model]
WITHOUT_MODEL = [n for n in WITHOUT_MODEL if n not in ("head", "shuffled")]  # by --dwm-form


class ReadsNothing(WeightPolicy):
    """A policy of a user's own."""


class ReadsAll(ReadsNothing):
    """One that is built of all that there is."""

    needs = Needs(influence=True, model=True, map=True, whole_batch=True)


def config_with(**values) -> DWMConfig:
    """Returns settings in which the values are asked for at all."""
    if set(values) & {*MODEL_ONLY, "temperature"}:
        values = {"form": "model", "rule": "chain", **values}
    if "loss_temperature" in values:
        values["policy"] = "linupper"
    if {"curriculum_start", "curriculum_share"} & set(values):
        values["policy"] = "curriculum"
    return DWMConfig(**values)


def parser_of_flags() -> argparse.ArgumentParser:
    return add_dwm_args(argparse.ArgumentParser(allow_abbrev=False))


class TestSampling:
    def test_values_are_checked(self):
        (problem,) = DWMConfig(sampling="weights", sampling_draws="some").problems()
        assert problem.startswith("--dwm-sampling-draws is 'some'; allowed are systematic, ")
        (problem,) = DWMConfig(sampling="weights", sampling_max_repeats=0).problems()
        assert problem.startswith("--dwm-sampling-max-repeats is 0; it must be above 0")

    @pytest.mark.parametrize("name", ["sampling_draws", "sampling_max_repeats"])
    def test_what_needs_weights_says_so(self, name):
        (problem,) = DWMConfig(**{name: OTHER_VALUES[name]}).problems()
        assert problem.startswith(f"{flag(name)} is about drawn documents; add --dwm-sampling weig")


class TestProblems:
    def test_defaults_are_fine(self):
        assert DWMConfig().problems() == []

    def test_every_other_value_is_fine(self):
        others = {"slope", "loss_temperature", *sum(OF_POLICY.values(), ())}
        values = {k: v for k, v in OTHER_VALUES.items() if k not in others}
        assert DWMConfig(**values).problems() == []
        policy = "head+linupper+static+curriculum+rho"
        values = {k: OTHER_VALUES[k] for k in others}
        assert DWMConfig(policy=policy, **values).problems() == []

    @pytest.mark.parametrize(("name", "value"), BAD_VALUES)
    def test_a_bad_value_is_one_line_with_its_flag_and_the_value_found(self, name, value):
        (problem,) = config_with(**{name: value}).problems()
        assert problem.startswith(f"{flag(name)} is ")
        assert str(value) in problem and "\n" not in problem

    @pytest.mark.parametrize(
        ("name", "allowed"),
        [
            ("policy", f"learned, {', '.join(BUILT_IN)}"),
            ("curriculum_pacing", "linear, root, step"),
            ("curriculum_order", "ascending, descending"),
            ("form", "head, model"),
            ("rule", "regression, chain"),
            ("map", "sigmoid, softmax"),
            ("gate", "on, off"),
            ("schedule", "staged, joint, frozen"),
            ("estimator", "auto, ghost, finite_difference"),
            ("lookahead", "auto, next, current"),
            ("jacobian", "exact, identity"),
            ("mtp", "weighted, plain"),
        ],
    )
    def test_a_choice_lists_what_is_allowed(self, name, allowed):
        values = {"policy": "curriculum"} if name.startswith("curriculum") else {}
        (problem,) = DWMConfig(**{name: "x"}, **values).problems()
        assert allowed in problem

    @pytest.mark.parametrize("name", ["overhead_budget", "verify_meta_gradient"])
    @pytest.mark.parametrize("how", [{"policy": "uniform"}, {"schedule": "frozen", "load": "dir"}])
    def test_what_is_about_meta_steps_needs_some(self, name, how):
        (problem,) = DWMConfig(**{name: 1}, **how).problems()
        assert (
            problem.startswith("--dwm-" + name.replace("_", "-"))
            and "takes no meta steps" in problem
        )
        assert DWMConfig(**{name: 1}).problems() == []

    def test_frozen_needs_the_weights_to_be_used(self):
        (problem,) = DWMConfig(schedule="frozen").problems()
        assert "--dwm-load" in problem
        assert DWMConfig(schedule="frozen", load="x").problems() == []
        assert DWMConfig(schedule="frozen", policy="uniform").problems() == []

    @pytest.mark.parametrize("estimator", ["auto", "ghost", "finite_difference"])
    @pytest.mark.parametrize("lookahead", ["next", "current"])
    @pytest.mark.parametrize("jacobian", ["exact", "identity"])
    def test_only_ghost_can_read_the_influence_off_the_training_pass(
        self, estimator, lookahead, jacobian
    ):
        """`auto` may still turn out not to cover the model; `choose_estimator` says so then."""
        options = {"estimator": estimator, "lookahead": lookahead, "jacobian": jacobian}
        problems = DWMConfig(**options).problems()
        if lookahead == "current" and estimator == "finite_difference":
            (problem,) = problems
            assert "--dwm-lookahead current needs --dwm-estimator ghost" in problem
        else:
            assert problems == []

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["overhead_budget", "verify_correlation", "fd_relative_step"])
    def test_a_number_that_is_not_finite_is_named(self, name, value):
        problems = DWMConfig(**{name: value}).problems()
        assert f"{flag(name)} is {value}; it must be a finite number" in problems

    def test_a_correlation_of_fewer_than_three_samples_says_nothing(self):
        assert DWMConfig(verify_samples=3).problems() == []
        (problem,) = DWMConfig(verify_samples=2).problems()
        assert "a correlation needs 3 or more" in problem

    def test_all_problems_are_listed_at_once(self):
        bad = {"policy": "x", "stages": 0, "warmup_steps": -1, "meta_batch_size": 0}
        problems = DWMConfig(**bad).problems()
        assert [p.split()[0] for p in problems] == [
            "--dwm-policy", "--dwm-stages", "--dwm-warmup-steps", "--dwm-meta-batch-size",
        ]  # fmt: skip
        with pytest.raises(DWMError) as caught:
            raise_all(problems)
        assert all(problem in str(caught.value) for problem in problems)
        assert "\n" not in str(caught.value)

    def test_no_problem_raises_nothing(self):
        raise_all([])

    @pytest.mark.parametrize(
        ("policy", "schedule", "scores", "trains"),
        [
            ("learned", "staged", True, True),
            ("head", "joint", True, True),
            ("linupper", "joint", True, False),
            ("influence", "joint", True, False),
            ("rho+static", "joint", True, False),
            ("domains", "joint", True, True),
            ("head+curriculum", "joint", True, True),
            ("shuffled", "joint", True, True),
            ("learned", "frozen", True, False),
            ("uniform", "staged", False, False),
        ],
    )
    def test_what_is_built_follows_policy_and_schedule(self, policy, schedule, scores, trains):
        config = DWMConfig(policy=policy, schedule=schedule)
        assert (config.scores, config.trains) == (scores, trains)
        assert config.uses_meta_set == (trains or policy == "influence")

    @pytest.mark.parametrize("name", MODEL_ONLY)
    def test_what_only_the_separate_model_has_is_refused_with_the_head(self, name):
        (problem,) = DWMConfig(**{name: OTHER_VALUES[name]}).problems()
        given = f"{flag(name)} {OTHER_VALUES[name]}"
        assert problem.startswith(f"{given}: about the separate model, but --dwm-form is head; add")
        assert "--dwm-form model" in problem

    @pytest.mark.parametrize("policy", WITHOUT_MODEL)
    @pytest.mark.parametrize("name", MODEL_ONLY)
    def test_what_only_the_separate_model_has_is_refused_without_one(self, policy, name):
        (problem,) = DWMConfig(policy=policy, **{name: OTHER_VALUES[name]}).problems()
        assert problem == (
            f"{flag(name)} {OTHER_VALUES[name]}: about the separate model, but --dwm-policy is "
            f"{policy}; take --dwm-policy model, or leave it out"
        )

    @pytest.mark.parametrize("policy", BUILT_IN)
    @pytest.mark.parametrize("need", READ_BY)
    def test_settings_are_taken_by_the_policies_that_read_them(self, policy, need):
        """As the table of needs says; and settings that are left alone are never refused."""
        config = DWMConfig(policy=policy)
        inner = "head" if policy == "shuffled" else policy
        if need == "learned":
            reads = inner in ("head", "model")
        else:
            reads = getattr(policy_needs(inner), need)
        about, _, names = READ_BY[need]
        values = {**OTHER_VALUES, "gate": "off"}
        for name in names:
            given = dataclasses.replace(config, **{name: values[name]})
            assert any(about in problem for problem in given.problems()) == (not reads), name
        assert config.problems() == []

    @pytest.mark.parametrize("policy, names", OF_POLICY.items())
    def test_settings_of_one_policy_are_refused_without_it(self, policy, names):
        for name in names:
            value = OTHER_VALUES[name]
            assert DWMConfig(policy=policy, **{name: value}).problems() == []
            assert DWMConfig(policy=f"head+{policy}", **{name: value}).problems() == []
            (problem,) = DWMConfig(policy="linupper", **{name: value}).problems()
            assert problem.startswith(f"{flag(name)} {value}: about --dwm-policy {policy}")
            assert f"linupper+{policy}" in problem

    @pytest.mark.parametrize(
        ("policy", "words"),
        [
            ("head+head", "names head twice"),
            ("head+uniform", "uniform is a control and works alone"),
            ("shuffled+static", "shuffled is a control and works alone"),
            ("learned+head", "names two learned policies"),
            ("head+", "--dwm-policy is ''; allowed are"),
            ("head+x", "--dwm-policy is 'x'; allowed are"),
        ],
    )
    def test_policies_that_cannot_work_together_are_refused(self, policy, words):
        assert any(words in problem for problem in DWMConfig(policy=policy).problems())

    def test_chain_is_refused_beside_another_policy(self):
        (problem,) = DWMConfig(policy="model+static", rule="chain").problems()
        assert "--dwm-rule regression" in problem

    def test_what_draws_does_not_weigh_as_well(self):
        (problem,) = DWMConfig(policy="static", sampling="weights").problems()
        assert "--dwm-static-weights is weights, by which --dwm-sampling weights draws" in problem
        other = {"sampling": "weights", "static_weights": "quality"}
        assert DWMConfig(policy="static", **other).problems() == []

    def test_a_policy_of_ones_own_says_what_it_reads(self):
        values = {"init": "llm:2", "form": "model", "rule": "chain", "max_weight": 4.0}
        assert DWMConfig(policy=f"{__name__}:ReadsAll", **values).problems() == []
        problems = DWMConfig(policy=f"{__name__}:ReadsNothing", **values).problems()
        assert [problem.split(":")[0] for problem in problems] == [
            "--dwm-init llm", "--dwm-max-weight 4.0", "--dwm-form model, --dwm-rule chain",
        ]  # fmt: skip

    @pytest.mark.parametrize("chain", [{}, {"rule": "chain"}])
    def test_settings_that_follow_from_others_are_not_taken_for_given(self, chain):
        """The paper's rule has another map and gate, which nobody asked for here."""
        config = DWMConfig(policy="linupper", form="model", **chain).with_defaults()
        (problem,) = config.problems()
        assert "--dwm-form model" in problem
        assert "--dwm-map" not in problem and "--dwm-gate" not in problem

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"rule": "chain"}, "--dwm-rule chain is the rule of a separate model"),
            ({"map": "softmax"}, "--dwm-map softmax needs the scores of the whole batch"),
            (
                {"policy": "rho", "map": "softmax"},
                f"{SOFTMAX} --dwm-policy rho",
            ),
            ({"policy": "domains", "map": "softmax"}, f"{SOFTMAX} --dwm-policy domains"),
            ({"policy": "model+rho", "map": "softmax"}, f"{SOFTMAX} --dwm-policy rho"),
            ({"policy": "domains", "form": "model"}, "--dwm-form model: about the learned policy"),
            (
                {"policy": "domains", "schedule": "frozen"},
                "--dwm-schedule frozen: --dwm-policy domains",
            ),
            ({"policy": "linupper", "load": "x"}, "--dwm-load x: about the learned policy"),
            ({"policy": "head+domains", "load": "x"}, "--dwm-load x: what --dwm-policy domains"),
            ({"temperature": 2.0}, "--dwm-temperature is about --dwm-map softmax, but the map is"),
            (
                {"form": "model", "rule": "chain", "slope": 2.0},
                "--dwm-slope is about --dwm-map sigmoid, but the map is softmax",
            ),
            ({"policy": "head", "form": "model"}, "--dwm-policy head contradicts --dwm-form model"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, values, words):
        (problem,) = DWMConfig(**values).problems()
        assert problem.startswith(words)

    def test_defaults_follow_from_form_and_rule(self):
        names = ("form", "rule", "map", "gate", "schedule", "lookahead")
        names += ("meta_interval", "meta_dense_steps")

        def resolved(**values):
            config = DWMConfig(**values).with_defaults()
            assert config == config.with_defaults()
            return tuple(getattr(config, name) for name in names)

        shared = ("regression", "sigmoid", "on", "joint", "auto", 16, 128)
        assert resolved() == ("head", *shared)
        assert resolved(form="model") == resolved(policy="model") == ("model", *shared)
        # The paper's form and rule, as before.
        chain = ("model", "chain", "softmax", "off", "staged", "next", 1, 0)
        assert resolved(form="model", rule="chain") == chain

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("no_such_module:Policy", "the module no_such_module cannot be imported"),
            ("megatron_dwm.errors:Nothing", "megatron_dwm.errors has no Nothing"),
            ("megatron_dwm.errors:DWMError", "is not a subclass of"),
        ],
    )
    def test_a_policy_by_path_that_is_none_is_named(self, name, words):
        (problem,) = DWMConfig(policy=name).problems()
        assert problem.startswith(f"--dwm-policy {name}") and words in problem


class TestShapes:
    def test_defaults_divide_at_the_usual_tensor_parallel_sizes(self):
        for size in (1, 2, 4):
            assert head_dim_problems(DWMConfig(), size) == []

    @pytest.mark.parametrize(
        ("options", "size", "words"),
        [
            ({"hidden_size": 250}, 1, ["--dwm-hidden-size 250", "--dwm-num-attention-heads 4"]),
            ({"hidden_size": 60}, 1, ["--dwm-hidden-size 60", "odd"]),
            ({"num_query_groups": 3}, 1, ["--dwm-num-query-groups 3"]),
            ({}, 8, ["--dwm-num-attention-heads 4", "--tensor-model-parallel-size 8"]),
            ({"num_query_groups": 1}, 2, ["--dwm-num-query-groups 1", "parallel-size 2"]),
            ({"ffn_hidden_size": 333}, 2, ["--dwm-ffn-hidden-size 333", "parallel-size 2"]),
            ({"hidden_size": 252}, 8, ["--dwm-hidden-size 252", "parallel-size 8"]),
        ],
    )
    def test_a_shape_that_does_not_divide_names_its_flags(self, options, size, words):
        problems = head_dim_problems(DWMConfig(**options), size)
        assert any(all(word in problem for word in words) for problem in problems), problems

    @pytest.mark.parametrize(("hidden", "ffn"), [(256, 704), (192, 512), (64, 192), (24, 64)])
    def test_mlp_size_is_llamas_rounded_up_to_64(self, hidden, ffn):
        assert DWMConfig(hidden_size=hidden).resolved_ffn_hidden_size == ffn
        assert DWMConfig(hidden_size=hidden, ffn_hidden_size=100).resolved_ffn_hidden_size == 100

    def test_shape_tells_apart_what_a_checkpoint_must_agree_in(self):
        """And fills in defaults, so that a default and its explicit value are the same shape."""
        shape = DWMConfig().shape()
        assert shape == DWMConfig(ffn_hidden_size=704, num_query_groups=4).shape()
        changes = {
            "num_layers": 3, "hidden_size": 128, "num_attention_heads": 8, "pooling": "last",
            "ffn_hidden_size": 64, "num_query_groups": 2,
        }  # fmt: skip
        assert set(changes) == set(shape)
        for name, value in changes.items():
            assert DWMConfig(**{name: value}).shape() != shape
        assert DWMConfig(head_lr=1.0, seed=2, temperature=3.0).shape() == shape


class TestFlags:
    def test_table_of_other_values_is_complete(self):
        """Guards the round trip below: a new field must be put into the table."""
        assert set(OTHER_VALUES) == set(FIELDS)

    def test_every_field_has_one_flag_with_its_default_and_a_help_text(self):
        parser = parser_of_flags()
        actions = {a.dest: a for a in parser._actions if a.dest != "help"}
        assert set(actions) == {attribute_name(name) for name in FIELDS}
        for name, spec in FIELDS.items():
            action = actions[attribute_name(name)]
            assert action.option_strings == [flag(name)]
            assert action.default == spec.default
            assert len(action.help.split()) >= 2

    def test_flags_are_dashed_names(self):
        assert flag("enabled") == "--dwm"
        assert flag("meta_batch_size") == "--dwm-meta-batch-size"
        assert attribute_name("enabled") == "dwm"
        assert attribute_name("meta_batch_size") == "dwm_meta_batch_size"

    def test_help_can_be_printed(self):
        """A bare percent sign in a help text would fail here."""
        text = parser_of_flags().format_help()
        assert all(flag(name) in text for name in FIELDS)

    def test_adding_twice_is_harmless(self):
        """The launcher adds them, and so may the script that it runs."""
        parser = parser_of_flags()
        count = len(parser._actions)
        assert add_dwm_args(parser) is parser
        assert len(parser._actions) == count

    def test_defaults_come_back_from_an_empty_command_line(self):
        assert DWMConfig.from_args(parser_of_flags().parse_args([])) == DWMConfig()

    def test_every_flag_comes_back_from_the_command_line_in_its_type(self):
        argv = []
        for name, value in OTHER_VALUES.items():
            argv.append(flag(name))
            if isinstance(value, list):
                argv += value
            elif value is not True:
                argv.append(str(value))
        config = DWMConfig.from_args(parser_of_flags().parse_args(argv))
        assert config == DWMConfig(**OTHER_VALUES)
        for name, value in OTHER_VALUES.items():
            assert type(getattr(config, name)) is type(value), name

    def test_arguments_without_the_flags_give_the_defaults(self):
        """A script that never added the flags runs stock training."""
        config = DWMConfig.from_args(SimpleNamespace(lr=1.0, num_layers=99))
        assert config == DWMConfig() and not config.enabled

    @pytest.mark.parametrize("argv", [["--dwm-stages", "two"], ["--dwm-head-lr"]])
    def test_a_value_of_another_type_is_refused_by_the_parser(self, argv, capsys):
        with pytest.raises(SystemExit):
            parser_of_flags().parse_args(argv)
        assert argv[0] in capsys.readouterr().err
