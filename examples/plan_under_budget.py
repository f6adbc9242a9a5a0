"""Find the design that does the least harm within 80 % of the FLOPs, finetune it, and save it.

python examples/plan_under_budget.py [folder]
"""

import sys

import diffusers_graft as dg
from diffusers_graft import testbed
from diffusers_graft.testbed.sampling import scheduler

CANDIDATES = {"self_attention[:]": ["neighborhood", "hyena_x"], "feed_forward[:]": ["mlp(expansion=2)", "linear_mlp"]}


def main(folder: str = "my-plan", steps: int = 100) -> None:
    model = testbed.load()
    batches = testbed.letter_batches(32, seed=0)
    judged = testbed.letter_batches(25, seed=1, steps=2)
    held_out = list(testbed.letter_batches(250, seed=1, fonts=testbed.HELD_OUT_FONTS, steps=2))

    config = dg.DistillConfig(steps=steps, lr=2e-3, warmup=steps // 10)
    survey = dg.survey(model, CANDIDATES, judged, batches=batches, config=config, noise_scheduler=scheduler())
    plan = survey.plan(flops=0.8)  # at once for any other budget, too: latency=, parameters=
    model.set_graft(survey.graft(model, plan))
    settle = dg.FinetuneConfig(steps=steps, lr=5e-4, warmup=steps // 10, ema_decay=0.98)
    dg.finetune(model, batches, settle, noise_scheduler=scheduler())
    scores = dg.evaluate(model, held_out, noise_scheduler=scheduler())
    model.save_graft(folder, scores={"planned": scores})
    survey.save(f"{folder}/survey.json")
    sys.stdout.write(f"{survey}\n\n{plan}\n\n{scores}\n{folder} has the graft, and the survey for other budgets.\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
