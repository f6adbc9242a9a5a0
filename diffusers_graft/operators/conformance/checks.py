"""The checks of the conformance suite, each a function that raises `ConformanceError` under its own name."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ...core.context import Context, Grid
from ...errors import GeometryError, GraftError
from .. import available, configure
from ..base import Operator
from ..registry import configure_class
from .case import Subject, fail, gradients, in_context, run
from .visibility_checks import (
    check_honours_mask,
    check_honours_others,
    check_mask_bias,
    check_receptive_field,
    check_scale,
    check_sees_ahead,
)


def check_config_round_trip(subject: Subject) -> None:
    """A config comes back from JSON as it was."""
    config = subject.config
    written = json.loads(json.dumps(config.to_dict()))
    missing = {"operator", *(field.name for field in dataclasses.fields(config))} - set(written)
    if missing or written["operator"] != config.owner.name:
        fail("config_round_trip", f"to_dict() gave {written}; missing are {sorted(missing) or 'none'}")
    # An operator may be checked before it is registered, and is not found by its name then.
    registered = config.owner.name in available()
    again = configure(written) if registered else configure_class(config.owner, written)
    if again != config:
        fail("config_round_trip", f"{subject.config} came back from JSON as {again}")


def check_shape_and_dtype(subject: Subject) -> None:
    """Outputs have the shape and precision of the inputs, which may lie in memory as projections leave them."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        # As projections leave them: heads are strided, and a `view` of tokens fails.
        inputs = [tensor.transpose(1, -2).contiguous().transpose(1, -2) for tensor in subject.inputs(dtype=dtype)]
        output = run(subject.build().to(dtype), inputs, subject.context)
        if output.shape != inputs[0].shape or output.dtype != dtype:
            fail("shape_and_dtype", f"{tuple(inputs[0].shape)} {dtype} became {tuple(output.shape)} {output.dtype}")


def check_bfloat16_close(subject: Subject) -> None:
    """In bfloat16 the outputs are those of float64 on the same numbers to within 5 %."""
    operator = subject.build().bfloat16()
    inputs = subject.inputs(dtype=torch.bfloat16)
    rough = run(operator, inputs, subject.context).double()
    # Of the rounded weights and inputs: rounding a router's scores may send a token elsewhere, which is no error of
    # arithmetic.
    precise = run(operator.double(), [tensor.double() for tensor in inputs], subject.context)
    error = ((rough - precise).norm() / precise.norm().clamp(min=1e-9)).item()
    if not error < 0.05:
        fail("bfloat16_close", f"relative error {error:.3g} to float64")


def check_finite_on_large_inputs(subject: Subject) -> None:
    """Inputs of size 100 do not overflow in float32."""
    # Activations of pretrained models reach that size in some channels.
    inputs = [100 * tensor.float() for tensor in subject.inputs()]
    if not run(subject.build().float(), inputs, subject.context).isfinite().all():
        fail("finite_on_large_inputs", "inputs of size 100 gave values that are not finite")


def check_every_grid(subject: Subject) -> None:
    """Odd, oblong and larger grids give finite outputs, or are refused with words."""
    for there in subject.accepted():
        if not run(there.build(), there.inputs(), there.context).isfinite().all():
            fail("every_grid", f"values that are not finite on the grid {there.grid}")


def check_site_shapes(subject: Subject) -> None:
    """On sites of other widths and heads it gives outputs of their shapes, or is refused with words."""
    for there in subject.on_other_sites():
        inputs = there.inputs()
        output = run(there.build(), inputs, there.context)
        if output.shape != inputs[0].shape or not output.isfinite().all():
            fail(
                "site_shapes",
                f"{tuple(inputs[0].shape)} became {tuple(output.shape)}, or is not finite, at {there.site}",
            )


def check_one_instance_on_grids(subject: Subject) -> None:
    """One operator gives on grid after grid what a fresh one gives, also for as many tokens in another shape."""
    # What is cached by the number of tokens alone serves the wrong grid.
    operator = subject.build()
    for there in subject.accepted():
        grid = there.grid
        for turned in (grid, dataclasses.replace(grid, height=grid.width, width=grid.height), _halved(grid)):
            subject_there = there.on(turned)
            try:
                expected = run(subject_there.build(), subject_there.inputs(), subject_there.context)
            except GraftError:
                continue  # the shape is refused with words
            output = run(operator, subject_there.inputs(), subject_there.context)
            if not torch.allclose(output, expected, rtol=1e-9, atol=1e-9):
                fail("one_instance_on_grids", f"after other grids its outputs differ on the grid {turned}")


def _halved(grid: Grid) -> Grid:
    """Return a grid of as many tokens on half the rows, where that is possible."""
    if grid.height % 2:
        return grid
    return dataclasses.replace(grid, height=grid.height // 2, width=2 * grid.width)


def check_training_mode(subject: Subject) -> None:
    """In training mode it gives the same outputs, so that a run can be resumed bit for bit."""
    operator = subject.build()
    inputs = subject.inputs()
    expected = run(operator, inputs, subject.context)
    if not torch.equal(run(operator.train(), inputs, subject.context), expected):
        fail("training_mode", "outputs in training mode are others than in evaluation mode")


def check_warm_start(subject: Subject) -> None:
    """A start from the replaced part is finite, and the seed alone decides it."""
    # In float32, as grafts are made: what overflows there does not in float64.
    one = subject.start(seed=4)
    other = subject.start(seed=4)
    odd = [name for name, tensor in one.state_dict().items() if not tensor.isfinite().all()]
    if odd:
        fail("warm_start", f"after init_from values are not finite: {', '.join(odd)}")
    if not _have_same_state(one, other):
        fail("warm_start", "two starts under one seed differ")
    inputs = [tensor.float() for tensor in subject.inputs()]
    if not run(one, inputs, subject.context).isfinite().all():
        fail("warm_start", "after init_from its outputs are not finite")


def _have_same_state(one: Operator, other: Operator) -> bool:
    first = one.state_dict()
    second = other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def check_output_layer(subject: Subject) -> bool | None:
    """The layer that `output_layer` names is a linear one, and what it gives is the output."""
    operator = subject.build()
    if operator.output_layer is None:
        return False
    layer = dict(operator.named_modules()).get(operator.output_layer)
    if not isinstance(layer, nn.Linear):
        fail("output_layer", f"output_layer is {operator.output_layer!r}, which is not a linear layer of the operator")
    # A solved layer must be the last step, or its solution is not one of the output.
    results = []
    with layer.register_forward_hook(lambda _, inputs, output: results.append(output)):
        output = run(operator, subject.inputs(), subject.context)
    if len(results) != 1 or not torch.equal(results[0], output):
        fail("output_layer", f"the output is not what the layer {operator.output_layer!r} gives")
    return None


def check_needs_grid(subject: Subject) -> None:
    """A grid is asked for exactly where that is declared."""
    operator = subject.build()
    try:
        run(operator, subject.inputs(), Context())
    except GeometryError:
        if not operator.needs_grid:
            fail("needs_grid", "needs_grid is False, but it refuses to run without a grid")
    else:
        if operator.needs_grid:
            fail("needs_grid", "needs_grid is True, but it runs without a grid")


def check_gradients_reach_everything(subject: Subject) -> None:
    """Every input and parameter gets a gradient, unless `unused_inputs` names it.

    Those that `idle_parameters` names may go without on some grids, but not on all.
    """
    # In each precision, since an operator may take another way in one of them.
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        dead = _find_dead(subject, dtype)
        idle = dead & set(subject.build().idle_parameters)
        dead -= idle
        if idle:
            dead |= idle.intersection(*(_find_dead(there, dtype) for there in subject.accepted()))
        if dead:
            fail("gradients_reach_everything", f"no useful gradient for {', '.join(sorted(dead))} in {dtype}")


def _find_dead(subject: Subject, dtype: torch.dtype) -> set[str]:
    """Return the inputs and parameters that get no useful gradient, and are not declared as unused."""
    operator = subject.build().to(dtype)
    inputs = subject.inputs(dtype=dtype)
    _, found = gradients(operator, operator, inputs, subject.context)
    names = [f"input {n}" for n in range(len(inputs))] + [name for name, _ in operator.named_parameters()]
    dead = {name for name, gradient in zip(names, found, strict=True) if not _is_useful(gradient)}
    return dead - set(operator.unused_inputs)


def _is_useful(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool(gradient.isfinite().all() and gradient.any())


def check_batch_rows_independent(subject: Subject) -> None:
    """A row gives the same alone as in a batch."""
    operator = subject.build()
    inputs = subject.inputs(batch=3)
    batch = run(operator, inputs, subject.context)
    row = run(operator, [tensor[1:2] for tensor in inputs], subject.context)
    if not torch.allclose(batch[1:2], row, rtol=1e-9, atol=1e-9):
        fail("batch_rows_independent", f"a row alone differs by {(batch[1:2] - row).abs().max():.3g}")


def check_deterministic(subject: Subject) -> None:
    """Equal inputs give equal outputs."""
    operator = subject.build()
    inputs = subject.inputs()
    if not torch.equal(run(operator, inputs, subject.context), run(operator, inputs, subject.context)):
        fail("deterministic", "two runs in evaluation mode differ")


def check_same_without_gradients(subject: Subject) -> None:
    """Under `no_grad`, where an operator may take a faster way, it gives the same outputs."""
    for there in subject.accepted():
        operator = there.build()
        inputs = there.inputs()
        expected = run(operator, inputs, there.context)
        with torch.no_grad():
            given = run(operator, inputs, there.context)
        if not torch.allclose(given, expected, rtol=1e-9, atol=1e-9):
            fail("same_without_gradients", f"outputs under no_grad differ on the grid {there.grid}")


def check_leaves_inputs_alone(subject: Subject) -> None:
    """Inputs are not changed in place."""
    operator = subject.build()
    inputs = subject.inputs()
    before = [tensor.clone() for tensor in inputs]
    run(operator, inputs, subject.context)
    # Without gradients operators write in place, where they may.
    with torch.no_grad():
        run(operator, inputs, subject.context)
    if not all(map(torch.equal, inputs, before)):
        fail("leaves_inputs_alone", "an input was changed in place")


def check_leaves_generators_alone(subject: Subject) -> None:
    """Forward does not draw from torch's global generator."""
    operator = subject.build()
    before = torch.get_rng_state()
    run(operator, subject.inputs(), subject.context)
    if not torch.equal(before, torch.get_rng_state()):
        fail("leaves_generators_alone", "forward drew from torch's global generator")


def check_same_seed_same_start(subject: Subject) -> None:
    """The seed alone decides the start."""
    if not _have_same_state(subject.build(seed=4), subject.build(seed=4)):
        fail("same_seed_same_start", "two builds under one seed differ")


def check_state_dict_round_trip(subject: Subject) -> None:
    """Loaded weights and deep copies give the same outputs."""
    source = subject.build(seed=0)
    target = subject.build(seed=5)
    target.load_state_dict(source.state_dict())
    expected = run(source, subject.inputs(), subject.context)
    if not torch.equal(run(target, subject.inputs(), subject.context), expected):
        fail("state_dict_round_trip", "an operator that loaded another's weights gives other outputs")
    if not torch.equal(run(copy.deepcopy(source), subject.inputs(), subject.context), expected):
        fail("state_dict_round_trip", "a deep copy gives other outputs")


def check_builds_on_meta(subject: Subject) -> None:
    """Building obeys the default device."""
    with torch.device("meta"):
        operator = subject.config.resolved(subject.site).build(subject.site)
    if any(not parameter.is_meta for parameter in operator.parameters()):
        fail("builds_on_meta", "a parameter was made on another device than the default one")


def check_compiles(subject: Subject) -> None:
    """`torch.compile(fullgraph=True)` gives the same outputs, with gradients and without."""
    operator = subject.build()
    inputs = subject.inputs()
    expected = run(operator, inputs, subject.context)
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    # Code compiled for other operators would count against torch's limit.
    torch._dynamo.reset()
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    for grad in (True, False):
        try:
            with torch.set_grad_enabled(grad):
                output = compiled(*in_context(operator, inputs, subject.context))
        except TorchDynamoException as error:
            first_line = str(error).splitlines()[0]
            fail("compiles", f"torch.compile(fullgraph=True) gave {type(error).__name__}: {first_line}")
        if not torch.allclose(output, expected, rtol=1e-9, atol=1e-9):
            fail("compiles", f"compiled outputs differ, gradients being {'on' if grad else 'off'}")


def check_trains_after_inference(subject: Subject) -> None:
    """It trains after a run in inference mode, whatever that left in its caches."""
    # A grid that no other check runs on, so that what is cached from grid to grid is made here.
    grid = subject.grid
    there = subject.on(dataclasses.replace(grid, height=grid.height + 3, width=grid.width + 10))
    operator = there.build()
    inputs = there.inputs()
    with torch.inference_mode():
        run(operator, there.inputs(), there.context)
    try:
        gradients(operator, operator, inputs, there.context)
    except RuntimeError as error:
        fail("trains_after_inference", str(error))


def check_checkpointing(subject: Subject) -> None:
    """Gradients under checkpointing are the same."""
    operator = subject.build()

    def checkpointed(*arguments):
        return checkpoint(operator, *arguments, use_reentrant=False)

    _, plain = gradients(operator, operator, subject.inputs(), subject.context)
    _, again = gradients(checkpointed, operator, subject.inputs(), subject.context)
    # Where a gradient is missing, checkpointing may give zeros or nothing.
    pairs = [(a, b) for a, b in zip(plain, again, strict=True) if a is not None]
    if not all(b is not None and torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in pairs):
        fail("checkpointing", "gradients under checkpointing differ")


def check_agrees_with_reference(subject: Subject) -> bool | None:
    """Outputs and gradients are those of `reference`."""
    if not hasattr(subject.config.owner, "reference"):
        return False
    for there in subject.accepted():
        operator = there.build()
        fast = gradients(operator, operator, there.inputs(), there.context)
        reference: Any = operator.reference
        plain = gradients(reference, operator, there.inputs(), there.context)
        for number, (a, b) in enumerate(zip((fast[0], *fast[1]), (plain[0], *plain[1]), strict=True)):
            if not _are_close(a, b):
                result = f"gradient {number}" if number else "output"
                fail("agrees_with_reference", f"{result} differs from the reference on the grid {there.grid}")
    return None


def _are_close(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.allclose(one, other, rtol=1e-7, atol=1e-7)


def check_flops(subject: Subject) -> None:
    """Within 1 % of what torch's counter sees, plus `uncounted_flops(tokens)` to which it is blind, at every size."""
    for there in (*subject.accepted(), *subject.on_other_sites()):
        operator = there.build()
        tokens = there.grid.tokens
        # Prices depend on the grid, which operators know from the forward that ran last.
        operator.slot.current = there.context
        operator.bind_context(operator.slot)
        declared = operator.flops(tokens)
        if type(declared) is not int or declared < 0:
            fail("flops", f"flops(tokens) is a whole number; got {declared!r}")
        counter = FlopCounterMode(display=False)
        # The counter does not know the softmax kernel of CPUs.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
            arguments = in_context(operator, there.inputs(batch=1), there.context)
            getattr(operator, "countable", operator)(*arguments)
        expected = counter.get_total_flops() + operator.uncounted_flops(tokens)
        if abs(declared - expected) > 0.01 * max(expected, 1):
            fail(
                "flops",
                f"flops({tokens}) is {declared:,} on the grid {there.grid}; torch's counter and what it is blind to "
                f"make {expected:,}",
            )


# Cheap ones first; what a token may see is asked of operators that run at all.
CHECKS: tuple[Callable[[Subject], bool | None], ...] = (
    check_config_round_trip,
    check_shape_and_dtype,
    check_bfloat16_close,
    check_finite_on_large_inputs,
    check_every_grid,
    check_site_shapes,
    check_needs_grid,
    check_gradients_reach_everything,
    check_batch_rows_independent,
    check_deterministic,
    check_training_mode,
    check_one_instance_on_grids,
    check_same_without_gradients,
    check_leaves_inputs_alone,
    check_leaves_generators_alone,
    check_same_seed_same_start,
    check_warm_start,
    check_output_layer,
    check_state_dict_round_trip,
    check_builds_on_meta,
    check_compiles,
    check_trains_after_inference,
    check_checkpointing,
    check_agrees_with_reference,
    check_flops,
    check_honours_mask,
    check_mask_bias,
    check_honours_others,
    check_scale,
    check_sees_ahead,
    check_receptive_field,
)
