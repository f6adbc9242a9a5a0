"""Train a graft with checkpoints, so that a run that is killed goes on exactly where it was: start it again.

    python examples/train_and_resume.py [folder]

On several devices: accelerate launch examples/train_and_resume.py
With the model's weights spread over them: accelerate launch --use_fsdp --fsdp_version 2 examples/train_and_resume.py
"""

import sys

import diffusers_graft as dg
from diffusers_graft import testbed
from diffusers_graft.testbed.sampling import scheduler


def main(folder: str = "my-graft", steps: int = 300) -> None:
    common = {"save_every": max(1, steps // 5), "log_every": max(1, steps // 20)}
    arguments = dg.GraftTrainingArguments(
        output_dir=folder,
        distill=dg.DistillConfig(steps=steps, lr=2e-3, evaluate_every=max(1, steps // 5), **common),
        finetune=dg.FinetuneConfig(steps=max(1, steps // 3), lr=5e-4, ema_decay=0.98, **common),
    )
    trainer = dg.GraftTrainer(
        testbed.load(),
        {"self_attention[1::2]": "neighborhood"},
        arguments,
        train_dataset=testbed.letter_batches(32, seed=0),
        eval_dataset=list(testbed.letter_batches(250, seed=1, fonts=testbed.HELD_OUT_FONTS, steps=2)),
        noise_scheduler=scheduler(),
    )
    trainer.train(resume_from_checkpoint=True)  # goes on from the last checkpoint in the folder, or starts
    scores = trainer.evaluate()
    trainer.save_model()
    sys.stdout.write(
        f"{scores}\nThe graft is in {folder}, with its card; how it went stands there, and in training.jsonl.\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
