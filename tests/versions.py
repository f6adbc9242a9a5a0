"""Tests of what the lowest declared versions lack (`make test-lowest`) are skipped under them, each with its reason."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def needs(package: str, lowest: str, reason: str) -> pytest.MarkDecorator:
    """Skip a test under an older version of a package."""
    return pytest.mark.skipif(
        Version(version(package)) < Version(lowest), reason=f"{reason} from {package} {lowest} on"
    )


has_varlen_attention = needs("torch", "2.10", "torch has attention over sequences of several lengths")
compiles_layers_once = needs("torch", "2.11", "torch compiles the layers of one config once")
compiles_all_families = needs("torch", "2.11", "torch compiles every family as one graph")
counts_recompilations = needs("torch", "2.7", "torch bounds recompilations by recompile_limit")
offloads_without_accelerator = needs("diffusers", "0.40", "groups are offloaded where there is no accelerator")
checks_cards_at_its_endpoint = needs("huggingface-hub", "2.0", "cards are checked at the endpoint that is set")
trusts_no_folder = needs("diffusers", "0.40", "code in a local folder runs only where it is trusted")
indexes_float8 = needs("torch", "2.7", "tensors of float8 are indexed on the CPU")
refers_to_float64 = needs("transformers", "5.23", "the reference of the gated delta rule computes in float64")
