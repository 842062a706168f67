"""What is relied on in Megatron 0.19: names, signatures, tuple lengths and attributes.

An upgrade of Megatron must fail here first, with the name of what has changed, and not in a
training run. Signatures and attributes are read from Megatron by import; where a function is too
large to be called, its source is parsed. Also here: that the rebinding of Megatron's names is
checked and undone, and that importing the package has no effects.
What these tests do not exercise: a training run (tests/functional has those), DDP and the
optimizers (test_optimizer_contract.py).
"""

import ast
import dataclasses
import inspect
import subprocess
import sys
import textwrap
import types
from types import SimpleNamespace

import numpy
import pytest
import torch

from megatron_dwm.hosts import cpu

cpu.install()

from megatron.core import package_info  # noqa: E402
from megatron.core.datasets.blended_dataset import BlendedDataset  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules  # noqa: E402
from megatron.core.rerun_state_machine import (  # noqa: E402
    RerunDataIterator,
    RerunMode,
    get_rerun_state_machine,
)
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.training import arguments, checkpointing, training  # noqa: E402

import megatron_dwm  # noqa: E402
from megatron_dwm.core.contexts import quiet  # noqa: E402
from megatron_dwm.core.random_states import restore_random_states  # noqa: E402
from megatron_dwm.errors import DWMError  # noqa: E402
from megatron_dwm.hosts import rebind  # noqa: E402
from megatron_dwm.hosts.megatron_lm import checks  # noqa: E402
from megatron_dwm.hosts.rebind import check_version, rebound  # noqa: E402
from megatron_dwm.step.loss import SampleLosses  # noqa: E402
from megatron_dwm.weighting_model import transformer as dwm_model  # noqa: E402


def parameters_of(function):
    return list(inspect.signature(function).parameters)


def tree_of(function):
    return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]


def own_returns(function):
    """The return statements of a function, those of functions inside it left out."""
    found, stack = [], list(tree_of(function).body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Return):
            found.append(node.value)
        stack += list(ast.iter_child_nodes(node))
    return found


def calls_of(function, name):
    """The calls of a plain name (not of an attribute) inside a function."""
    return [
        node
        for node in ast.walk(tree_of(function))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


# --------------------------------------------------------------------------- the trainer


class TestTrainStep:
    def test_signature(self):
        """The names that are rebound, in the order in which they are handed on."""
        assert parameters_of(training.train_step)[:8] == [
            "forward_step_func",
            "data_iterator",
            "model",
            "optimizer",
            "opt_param_scheduler",
            "config",
            "forward_backward_func",
            "iteration",
        ]

    def test_every_return_has_eight_values_with_losses_skip_and_norm_in_their_places(self):
        """Read by index: 0 the reported losses, 1 whether the step was skipped, 5 the norm."""
        returns = own_returns(training.train_step)
        assert len(returns) == 3
        for value in returns:
            assert isinstance(value, ast.Tuple) and len(value.elts) == 8
            losses, skipped, norm = (ast.unparse(value.elts[i]) for i in (0, 1, 5))
            assert losses in ("{}", "loss_reduced")
            assert skipped in ("skipped_iter", "True")
            assert norm in ("grad_norm", "None")

    def test_the_loop_calls_it_by_its_global_name_with_the_iteration(self):
        """Only then does rebinding the module's attribute reach the loop."""
        (call,) = calls_of(training.train, "train_step")
        assert "iteration" in [k.arg for k in call.keywords] or len(call.args) == 8

    def test_the_clip_norm_comes_from_before_the_clipping(self):
        """`optimizer.step()` returns (successful, norm, zeros), in that order."""
        names = [
            [target.id for target in node.targets[0].elts]
            for node in ast.walk(tree_of(training.train_step))
            if isinstance(node, ast.Assign) and ast.unparse(node.value) == "optimizer.step()"
        ]
        assert names == [["update_successful", "grad_norm", "num_zeros_in_grad"]]

    def test_the_schedule_gets_what_the_extra_passes_hand_it(self):
        (call,) = calls_of(training.train_step, "forward_backward_func")
        assert {
            "forward_step_func",
            "data_iterator",
            "model",
            "num_microbatches",
            "seq_length",
            "micro_batch_size",
            "decoder_seq_length",
            "forward_only",
        } <= {k.arg for k in call.keywords}


class TestSetup:
    def test_returns_model_optimizer_and_scheduler(self):
        (value,) = own_returns(training.setup_model_and_optimizer)
        assert [ast.unparse(e) for e in value.elts] == ["model", "optimizer", "opt_param_scheduler"]

    def test_signature_and_call(self):
        assert parameters_of(training.setup_model_and_optimizer)[:2] == [
            "model_type",
            "model_provider_func",
        ]
        assert len(calls_of(training.pretrain, "setup_model_and_optimizer")) == 1

    def test_our_flags_join_megatrons_parser_without_a_clash(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["x", "--dwm", "--dwm-stages", "3"])
        args = arguments.parse_args(megatron_dwm.add_dwm_args)
        config = megatron_dwm.DWMConfig.from_args(args)
        assert config == megatron_dwm.DWMConfig(enabled=True, stages=3)
        assert args.num_layers is None and args.seed == 1234

    def test_flags_that_are_refused_or_read_exist(self, monkeypatch):
        """A flag that was renamed would no longer be refused, without a word."""
        monkeypatch.setattr(sys, "argv", ["x"])
        args = arguments.parse_args()
        names = [*checks.REFUSED, "context_parallel_size", "cuda_graph_impl", "ckpt_format"]
        names += ["virtual_pipeline_model_parallel_size", "mock_data", "num_experts"]
        names += ["multi_latent_attention", "calculate_per_token_loss", "no_save_optim"]
        missing = [name for name in names if not hasattr(args, name)]
        # Set by the validation of the arguments, not by the parser.
        assert set(missing) <= {"virtual_pipeline_model_parallel_size"}

    def test_flags_of_the_cpu_host_are_accepted(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["x", *cpu.CPU_FLAGS])
        args = arguments.parse_args()
        assert args.transformer_impl == "local" and args.distributed_backend == "gloo"

    def test_config_fields_that_the_weighting_model_takes_over_exist(self):
        """They are copied where they exist, so a renamed one would fall back to its default."""
        fields = {field.name for field in dataclasses.fields(TransformerConfig)}
        assert set(dwm_model._HOST_FIELDS + dwm_model.LAYER_FIELDS) <= fields


class TestCheckpointing:
    def test_signature(self):
        assert {"args", "model", "optimizer", "optim_sd_kwargs", "model_sd_kwargs"} <= set(
            parameters_of(checkpointing.generate_state_dict)
        )

    @staticmethod
    def words(call):
        """The keyword arguments of a call, by name."""
        return {k.arg: k.value for k in call.keywords}

    def test_saving_names_its_keywords_and_is_not_loading(self):
        (call,) = calls_of(checkpointing.save_checkpoint, "generate_state_dict")
        words = self.words(call)
        assert {"optim_sd_kwargs", "model_sd_kwargs"} <= set(words)
        assert "is_loading" not in ast.unparse(words["optim_sd_kwargs"])
        assert "metadata" in ast.unparse(words["model_sd_kwargs"])

    def test_loading_says_that_it_is_loading(self):
        """So the weighting model's state is not asked of a checkpoint that may not hold it."""
        loading = [
            function
            for function in vars(checkpointing).values()
            if isinstance(function, types.FunctionType)
            and function.__module__ == checkpointing.__name__
            and function is not checkpointing.save_checkpoint
            and calls_of(function, "generate_state_dict")
        ]
        assert checkpointing.load_checkpoint in loading
        for function in loading:
            passed = [
                ast.unparse(self.words(call)["optim_sd_kwargs"])
                for call in calls_of(function, "generate_state_dict")
            ]
            assert set(passed) == {"optim_sd_kwargs"}
            assigned = [
                ast.unparse(node.value)
                for node in ast.walk(tree_of(function))
                if isinstance(node, ast.Assign)
                and [ast.unparse(t) for t in node.targets] == ["optim_sd_kwargs"]
            ]
            assert assigned and all("is_loading=True" in value for value in assigned)

    def test_path_of_the_checkpoint_that_is_loaded(self, tmp_path):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("120")
        args = SimpleNamespace(load=str(tmp_path), ckpt_step=None)
        path = checkpointing.get_load_checkpoint_path_by_args(args)
        assert path == str(tmp_path / "iter_0000120")
        args.ckpt_step = 60
        path = checkpointing.get_load_checkpoint_path_by_args(args)
        assert path == str(tmp_path / "iter_0000060")


# --------------------------------------------------------------------------- the step's parts


class TestRerunMachine:
    def test_the_replaying_iterator_drops_its_step_on_advance(self):
        iterator = RerunDataIterator(iter([1, 2]))
        iterator.saved_microbatches, iterator.replaying = [0], True
        iterator.advance()
        assert iterator.saved_microbatches == [] and next(iterator) == 1

    def test_the_mode_is_a_plain_attribute_that_can_be_set_and_put_back(self):
        """`quiet` switches the machine and the timers off for the extra passes."""
        machine = get_rerun_state_machine()
        before, config = machine.mode, SimpleNamespace(timers="timers")
        chunk = SimpleNamespace(ddp_config=SimpleNamespace(check_for_nan_in_grad=True))
        trainee = SimpleNamespace(config=config, model=[chunk])
        machine.mode = RerunMode.VALIDATE_RESULTS
        try:
            with pytest.raises(KeyError), quiet(trainee):
                assert machine.get_mode() == RerunMode.DISABLED and config.timers is None
                # A NaN in an extra pass must not end the run.
                machine.validate_result(
                    result=torch.tensor(float("nan")),
                    rejection_func=torch.isnan,
                    message="NaN",
                    tolerance=0.0,
                    fatal=True,
                )
                assert not chunk.ddp_config.check_for_nan_in_grad
                raise KeyError
            assert chunk.ddp_config.check_for_nan_in_grad
            assert "validate_result" not in vars(machine)
            assert machine.get_mode() == RerunMode.VALIDATE_RESULTS and config.timers == "timers"
        finally:
            machine.mode = before


class TestRandomStates:
    def test_there_are_three_and_they_can_be_put_back_more_than_once(self):
        """The passes of the finite difference each begin from the same saved states.

        The tracker's states too, from which dropout draws: it changes the dict that it is given.
        """
        tracker = megatron_random.get_cuda_rng_tracker()
        tracker.reset()  # of what other tests left there
        tracker.add("contract-test", 5)
        try:
            states = megatron_random._get_all_rng_states()
            assert len(states) == 3 and set(states[2]) == {"contract-test"}
            draws = []
            for _ in range(3):
                restore_random_states(states)
                with tracker.fork("contract-test"):
                    inside = torch.rand(5, device=cpu.device())
                draws.append((torch.rand(5), inside))
        finally:
            tracker.reset()
        for outside, inside in draws[1:]:
            assert torch.equal(outside, draws[0][0]) and torch.equal(inside, draws[0][1])
        assert not torch.equal(draws[0][0], draws[0][1].cpu())

    def test_signature(self):
        assert parameters_of(megatron_random._set_all_rng_states) == [
            "cpu_rng_state",
            "cuda_rng_state",
            "cuda_rng_state_tracker",
        ]


class TestData:
    def test_blended_samples_say_which_data_set_they_come_from(self):
        blend = BlendedDataset.__new__(BlendedDataset)
        blend.datasets = [[{"tokens": 10}, {"tokens": 11}], [{"tokens": 20}]]
        blend.dataset_index = numpy.array([1, 0], dtype=numpy.int16)
        blend.dataset_sample_index = numpy.array([0, 1])
        assert blend[0] == {"dataset_id": 1, "tokens": 20}
        assert blend[1] == {"dataset_id": 0, "tokens": 11}


class TestSchedules:
    @pytest.mark.parametrize(
        ("pp_size", "vp_size", "name"),
        [
            (1, None, "forward_backward_no_pipelining"),
            (2, None, "forward_backward_pipelining_without_interleaving"),
            (2, 2, "forward_backward_pipelining_with_interleaving"),
        ],
    )
    def test_chosen_by_explicit_sizes_and_callable_forward_only(self, pp_size, vp_size, name):
        schedule = get_forward_backward_func(pp_size=pp_size, vp_size=vp_size)
        assert schedule is getattr(schedules, name)
        assert {
            "forward_step_func",
            "data_iterator",
            "model",
            "num_microbatches",
            "seq_length",
            "micro_batch_size",
            "decoder_seq_length",
            "forward_only",
        } <= set(parameters_of(schedule))

    @pytest.mark.parametrize(
        ("form", "per_token", "context_parallel"),
        [("three", False, 1), ("three", True, 1), ("two", False, 1), ("two", False, 2)],
    )
    def test_scaling_of_the_loss_is_the_one_that_contributions_are_written_for(
        self, form, per_token, context_parallel
    ):
        """One rank: the schedule's loss is what `SampleLosses.contributions` sums to.

        Three values: / tokens / micro-batches, in place; per-token: untouched; two values:
        x context-parallel size / micro-batches. DDP's part is in test_optimizer_contract.py.
        """
        m, sums, tokens = 4, torch.tensor([3.0, 5.0]), torch.tensor(7)
        loss = sums.sum()
        outputs = (loss, tokens, {}) if form == "three" else (loss, {})
        config = SimpleNamespace(
            calculate_per_token_loss=per_token, timers=None, num_moe_experts=None
        )
        found, _ = schedules.forward_step_calc_loss(
            model=None,
            output_tensor=torch.zeros(2, 3),
            loss_func=lambda _: outputs,
            config=config,
            vp_stage=None,
            collect_non_loss_data=False,
            num_microbatches=m,
            forward_data_store=[],
            cp_group_size=context_parallel,
            is_last_stage=True,
        )
        losses = SampleLosses()
        losses.sums = [sums] * m
        losses.num_tokens = [tokens if form == "three" else None] * m
        losses.further = [None] * m
        expected = losses.contributions(per_token, context_parallel, context_parallel)
        # Averaged over the context-parallel ranks by DDP, unless the losses are per token.
        ddp = 1 if per_token else context_parallel
        assert found.item() / ddp == pytest.approx(expected[:2].sum().item(), rel=1e-6)


# --------------------------------------------------------------------------- rebinding


def plus(a, b=1):
    return a + b


@pytest.fixture
def module():
    return SimpleNamespace(__name__="some.module", plus=plus, version="1")


class TestRebound:
    def test_the_wrapper_gets_the_original_and_the_call(self, module):
        def wrapper(original, *args, **kwargs):
            return 100 * original(*args, **kwargs)

        with rebound(module, "plus", ("a", "b"), wrapper):
            assert module.plus(1) == 200 and module.plus(1, b=4) == 500
            # Megatron inspects what it calls; the replacement looks like the original.
            assert parameters_of(module.plus) == ["a", "b"] and module.plus.__name__ == "plus"
        assert module.plus is plus

    def test_restores_after_an_exception(self, module):
        with pytest.raises(KeyError), rebound(module, "plus", ("a",), lambda f, *a: None):
            raise KeyError
        assert module.plus is plus

    def test_refuses_a_missing_function(self, module):
        with pytest.raises(DWMError, match=r"some\.module\.minus is missing"):
            with rebound(module, "minus", ("a",), plus):
                pytest.fail("the body must not run")

    def test_refuses_a_changed_signature_and_leaves_the_module_alone(self, module):
        with pytest.raises(DWMError, match=r"some\.module\.plus takes a, b, but a, c were"):
            with rebound(module, "plus", ("a", "c"), plus):
                pytest.fail("the body must not run")
        assert module.plus is plus

    def test_arguments_that_a_release_adds_are_no_reason_to_refuse(self, module):
        with rebound(module, "plus", ("a",), lambda f, *a: "ours"):
            assert module.plus(1) == "ours"


class TestVersion:
    @pytest.mark.parametrize("version", ["0.18.0", "0.18.9", "0.20.0", "1.19.0", "0.2.19"])
    def test_others_are_refused_by_name_with_the_way_out(self, monkeypatch, version):
        monkeypatch.setattr(package_info, "__version__", version)
        with pytest.raises(DWMError, match="pip install") as caught:
            check_version()
        assert version in str(caught.value) and ">=0.19,<0.20" in str(caught.value)

    @pytest.mark.parametrize("version", ["0.19.0", "0.19.2", "0.19.99", "0.19.0rc1"])
    def test_0_19_is_accepted(self, monkeypatch, version):
        monkeypatch.setattr(package_info, "__version__", version)
        check_version()

    def test_the_installed_one_is_accepted_and_the_range_is_that_of_the_metadata(self):
        check_version()
        assert rebind.SUPPORTED == ((0, 19), (0, 20))


class TestAttach:
    NAMES = [
        (training, "train_step"),
        (training, "setup_model_and_optimizer"),
        (checkpointing, "generate_state_dict"),
    ]

    def test_three_names_are_rebound_inside_and_stock_again_outside(self):
        stock = [getattr(module, name) for module, name in self.NAMES]
        parse = arguments.parse_args
        with megatron_dwm.attach():
            inside = [getattr(module, name) for module, name in self.NAMES]
            assert not any(a is b for a, b in zip(inside, stock, strict=True))
            assert arguments.parse_args is parse
        assert all(getattr(m, n) is f for (m, n), f in zip(self.NAMES, stock, strict=True))

    def test_an_exception_of_the_script_passes_through_and_restores(self):
        stock = [getattr(module, name) for module, name in self.NAMES]
        with pytest.raises(KeyError), megatron_dwm.attach():
            raise KeyError
        assert all(getattr(m, n) is f for (m, n), f in zip(self.NAMES, stock, strict=True))

    def test_a_user_error_is_one_line_and_exit_code_2(self, capsys, monkeypatch):
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(SystemExit) as caught, megatron_dwm.attach():
            raise DWMError("--dwm-x is wrong")
        assert caught.value.code == 2
        assert capsys.readouterr().err == "megatron_dwm: error: --dwm-x is wrong\n"

    @pytest.mark.parametrize(("this_rank_only", "lines"), [(False, 0), (True, 1)])
    def test_other_ranks_print_what_rank_0_cannot_see(
        self, capsys, monkeypatch, this_rank_only, lines
    ):
        monkeypatch.setenv("RANK", "3")
        with pytest.raises(SystemExit), megatron_dwm.attach():
            raise DWMError("x", this_rank_only=this_rank_only)
        assert len(capsys.readouterr().err.splitlines()) == lines

    @pytest.mark.parametrize("provider", [None, lambda p: p.add_argument("--mine") and p])
    def test_flags_are_added_for_scripts_that_do_not(self, monkeypatch, provider):
        monkeypatch.setattr(sys, "argv", ["x", "--dwm"])
        with megatron_dwm.attach(add_arguments=True):
            args = arguments.parse_args(provider)
        assert args.dwm is True and hasattr(args, "mine") is (provider is not None)

    def test_an_unsupported_megatron_ends_before_anything_is_rebound(self, capsys, monkeypatch):
        monkeypatch.setattr(package_info, "__version__", "0.20.0")
        monkeypatch.setenv("RANK", "0")
        stock = training.train_step
        with pytest.raises(SystemExit), megatron_dwm.attach():
            pytest.fail("the body must not run")
        assert "0.20.0" in capsys.readouterr().err and training.train_step is stock


# --------------------------------------------------------------------------- import


class TestImport:
    def test_importing_the_package_and_adding_flags_imports_neither_torch_nor_megatron(self):
        code = (
            "import sys, argparse, megatron_dwm\n"
            "megatron_dwm.add_dwm_args(argparse.ArgumentParser())\n"
            "megatron_dwm.DWMConfig().problems()\n"
            "print([n for n in ('torch', 'megatron', 'numpy') if n in sys.modules])\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout == "[]\n"

    def test_public_names_can_all_be_had_and_others_cannot(self):
        assert all(getattr(megatron_dwm, name) is not None for name in megatron_dwm.__all__)
        with pytest.raises(AttributeError, match="no attribute 'bogus'"):
            megatron_dwm.bogus  # noqa: B018
