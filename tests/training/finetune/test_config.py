"""Settings of stage two."""

from peft import LoraConfig

import diffusers_graft as dg


def test_lora_alone_means_operators_and_lora():
    assert dg.FinetuneConfig(lora=LoraConfig(r=2)).train == "operators+lora"
    assert dg.FinetuneConfig().train == "all"
