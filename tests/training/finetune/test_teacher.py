"""The teacher of stage two."""

import pytest
import torch
from diffusers.models.embeddings import LabelEmbedding

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError
from diffusers_graft.training.finetune.teacher import Teacher, masked_error
from diffusers_graft.training.fsdp import find_blocks
from diffusers_graft.training.metrics_log import read_metrics
from diffusers_graft.training.noised_batch import Noising

from ...models import SCHEDULER, batches, predict, tiny_dit
from ..runs import calls_of, grafted_model, run_finetune


@pytest.mark.parametrize(
    ("settings", "forwards"), [({}, 1), ({"distill_output": 1.0}, 2), ({"distill_features": 1.0}, 2)], ids=str
)
def test_a_teacher_costs_one_forward_and_is_off_by_default(settings, forwards):
    model = grafted_model()
    counts = calls_of(model)
    run_finetune(model, steps=3, **settings)
    assert counts[0] == 3 * forwards


def test_the_teacher_is_the_untrained_model_also_where_all_weights_train():
    """After some steps of everything, the distance to the teacher is that to the original, computed by itself."""
    model = grafted_model()
    run_finetune(model, steps=4, lr=1e-2)
    from diffusers_graft.training.finetune.teacher import Teacher

    inputs = Noising(scheduler=SCHEDULER)(model, batches()[0], torch.Generator().manual_seed(0)).inputs
    teacher = Teacher(model, output_weight=1.0)
    teacher.run(inputs)
    with torch.no_grad():
        assert torch.equal(teacher.prediction, tiny_dit()(**inputs).sample)


def test_distillation_brings_the_model_back_to_its_teacher():
    distances = {}
    before = predict(tiny_dit())
    for weight in (0.0, 10.0):
        model = grafted_model()
        run_finetune(model, batches(1, size=16), steps=80, lr=2e-3, distill_output=weight)
        distances[weight] = (predict(model) - before).norm()
    assert distances[10.0] < distances[0.0]


def test_massive_activations_are_left_out():
    teacher = torch.rand(2, 16, 8)  # none of them is massive
    student = teacher + 0.1
    sizes = teacher.square()
    sizes[0, 0, 0] = 0.0
    expected = ((127 * 0.01 / sizes[0].sum() + 128 * 0.01 / sizes[1].sum()) / 2).item()
    teacher[0, 0, 0], student[0, 0, 0] = 1000.0, -1000.0
    assert masked_error(student, teacher).item() == pytest.approx(expected, rel=1e-4)
    assert masked_error(30 * student, 30 * teacher).item() == pytest.approx(expected, rel=1e-4)
    assert torch.nn.functional.mse_loss(student, teacher) > 1000
    halves = [masked_error(one, other).item() for one, other in zip(student.split(1), teacher.split(1), strict=True)]
    assert masked_error(student, teacher).item() == pytest.approx(sum(halves) / 2)  # however a batch is shared out
    model = grafted_model()
    assert find_blocks(model, model.graft.sites) == [f"transformer_blocks.{i}" for i in range(4)]


def test_every_term_of_the_loss_is_logged(tmp_path):
    run_finetune(grafted_model(), output_dir=tmp_path, log_every=1, distill_output=1.0, distill_features=1.0)
    rows = read_metrics(tmp_path)
    assert [set(row["terms"]) for row in rows] == [{"denoising", "output", "features"}] * 3
    assert all(term > 0 for row in rows for term in row["terms"].values())
    assert rows[0]["loss"] == pytest.approx(sum(rows[0]["terms"].values()), rel=1e-5)
    assert all(0 < row["lr"] <= 1e-3 for row in rows)


def test_the_teacher_leaves_label_dropout_of_grafted_blocks_off():
    model, training = grafted_model(rules={"block_pair[0]": "parallel"}), []

    class Watcher:
        def on_step_end(self, args, state, control, **_):
            training.extend(module.training for module in model.modules() if isinstance(module, LabelEmbedding))

    run_finetune(model, steps=2, distill_output=1.0, callbacks=[Watcher()])
    assert training
    assert not any(training)


def test_a_part_in_the_place_of_two_blocks_is_compared_behind_the_second():
    model = grafted_model(rules={"block_pair[0]": "parallel"})
    blocks = Teacher(model, feature_weight=1.0).blocks
    assert "transformer_blocks.0" not in blocks
    assert "transformer_blocks.1" in blocks
    # Such a part that does what both blocks did has nothing to learn.
    inputs = Noising(scheduler=SCHEDULER)(model, batches()[0], torch.Generator().manual_seed(0)).inputs
    seat, *_ = model.graft.seats.values()
    first, second = (
        block for name, block in tiny_dit().named_modules() if name in ("transformer_blocks.0", "transformer_blocks.1")
    )
    seat.forward = lambda *args, **kwargs: second(first(*args, **kwargs), *args[1:], **kwargs)
    teacher = Teacher(model, feature_weight=1.0)
    teacher.run(inputs)
    with torch.no_grad(), teacher.capture_features(model.eval()):
        prediction = model(**inputs).sample
    assert teacher.losses(prediction)["features"] == 0


def test_the_teacher_alone_needs_no_target():
    """The gradient of the first step is that of the distance to the original's prediction, and of nothing else."""
    model = grafted_model()
    noised = Noising(scheduler=SCHEDULER)(model, batches()[0], torch.Generator().manual_seed(0))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    distance = (model(**noised.inputs).sample - tiny_dit()(**noised.inputs).sample).square().mean()
    gradients = torch.autograd.grad(3 * distance, list(model.parameters()))
    settings = {"optimizer": "SGD", "schedule": "constant", "lr": 0.1, "max_grad_norm": 1e9}
    run_finetune(model, [noised.inputs], steps=1, denoising=0, distill_output=3.0, **settings)
    for parameter, start, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), start - 0.1 * gradient, rtol=1e-4, atol=1e-6)
    with pytest.raises(TrainingError, match="what to predict"):
        run_finetune(model, [noised.inputs], steps=1, distill_output=3.0)


def test_a_teacher_that_is_the_student_is_told(caplog):
    settings = {"steps": 1, "denoising": 0, "distill_output": 1.0}
    run_finetune(grafted_model(rules={"self_attention[1]": "self_attention"}), **settings)
    assert "there is nothing to learn" in caplog.text
    model = tiny_dit()
    model.set_graft(dg.build_graft(model, dg.GraftPlan(type(model).__name__, ())))
    with pytest.raises(TrainingError, match="replaces nothing"):
        run_finetune(model, **settings)
