"""Find the design that does the least harm within a budget of latency, finetune it, and save it.

    python examples/plan_under_budget.py [folder] [latency|flops|parameters] [share]

The survey trains every candidate at every site by itself, measures what each costs and harms on this machine, and
answers for any budget afterwards. 0.9 of the original's latency unless given. On the letters' 64 tokens it is
feed-forwards that save time; attention pays at longer sequences (`dg.benchmark` says from where on).
"""

import sys

import diffusers_graft as dg
from diffusers_graft import testbed
from diffusers_graft.testbed.sampling import scheduler

# The first is the mixer that loses least at equal latency in examples/benchmarks/mixers/mixers.md.
CANDIDATES = {
    "self_attention[:]": ["block_sparse(block=2, keep=0.25)", "hyena_x"],
    "feed_forward[:]": ["mlp(expansion=2)", "linear_mlp"],
}


def main(folder: str = "my-plan", measure: str = "latency", share: float | str = 0.9, steps: int = 100) -> None:
    model = testbed.load()
    batches = testbed.letter_batches(32, seed=0)
    judged = testbed.letter_batches(25, seed=1, steps=2)
    held_out = list(testbed.letter_batches(250, seed=1, fonts=testbed.HELD_OUT_FONTS, steps=2))

    config = dg.DistillConfig(steps=steps, lr=2e-3, warmup=steps // 10)
    survey = dg.survey(model, CANDIDATES, judged, batches=batches, config=config, noise_scheduler=scheduler())
    plan = survey.plan(**{measure: float(share)})  # as survey.plan(latency=0.9)
    model.set_graft(survey.graft(model, plan))
    settle = dg.FinetuneConfig(steps=steps, lr=5e-4, warmup=steps // 10, ema_decay=0.98)
    dg.finetune(model, batches, settle, noise_scheduler=scheduler())
    scores = dg.evaluate(model, held_out, noise_scheduler=scheduler())
    model.save_graft(folder, scores={"planned": scores})
    survey.save(f"{folder}/survey.json")
    sys.stdout.write(f"{survey}\n\n{plan}\n\n{scores}\n{folder} has the graft, and the survey for other budgets.\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
